"""What policies are put through: a recording, or anything else that asks a policy for actions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from specprune_ros.config import PolicyConfig, RobotConfig
from specprune_ros.errors import SpecPruneError
from specprune_ros.images import CameraImage
from specprune_ros.offline import run_recording
from specprune_ros.recordings.base import CameraEvent, Event, Recording
from specprune_ros.types import ExecutedAction, Observation, PolicyResult


class Driven(Protocol):
    """What a task may ask of a policy: `policy.Policy` has it, and so has `panel.Panel`."""

    config: PolicyConfig

    def reset(self) -> None:
        """A new episode begins."""

    def infer(self, observation: Observation) -> PolicyResult:
        """One query."""

    def observe_executed(
        self,
        action: ExecutedAction | None,
        images: Mapping[str, np.ndarray | CameraImage] | None = None,
    ) -> bool:
        """One control step was executed."""


class Task(Protocol):
    """Episodes for a policy.

    Attributes:
        name: what a reader calls it.
        closed_loop: whether what comes next depends on the policy's actions. If not, all variants
            are asked about the same observations in one run, else each has a run of its own.
        queries: of one seed, an estimate.
        seeds: how many different ones there are.
        seed_meaning: what seed s changes, after the words 'seed s'.
    """

    name: str
    closed_loop: bool
    queries: int
    seeds: int
    seed_meaning: str

    def run(self, policy: Driven, seed: int) -> Iterator[Mapping[str, float]]:
        """Reset the policy, query it and tell it what was executed, episode by episode.

        Yields:
            Per episode what became of it, e.g. {'success': 1.0}; the same names every time.
        """


@dataclass(frozen=True)
class RecordingTask:
    """A recording as one episode: it shows the same whatever the policy does.

    A seed shifts the phase: seed s starts s control steps later, and so queries at other
    observations. After a horizon of them they come again.

    Args:
        recording: the source.
        robot: fitted to it.
    """

    recording: Recording
    robot: RobotConfig
    closed_loop = False
    seed_meaning = 'starts s control steps later, so that queries fall on other observations'

    @property
    def name(self) -> str:
        """The recording's path."""
        return str(self.recording.path)

    @property
    def queries(self) -> int:
        """One per chunk."""
        return math.ceil(self.recording.control_steps / self.robot.horizon)

    @property
    def seeds(self) -> int:
        """One per step of a chunk."""
        return self.robot.horizon

    def run(self, policy: Driven, seed: int) -> Iterator[Mapping[str, float]]:
        """Query the policy once per chunk.

        Yields:
            Once: how many queries there were, and how many observations were skipped.

        Raises:
            RecordingError: see offline.run_recording.
        """
        policy.reset()
        steps = run_recording(policy, Late(self.recording, seed, self.robot.camera_names[-1]))
        queries = skipped = 0
        for step in steps:
            queries += isinstance(step, tuple)
            skipped += isinstance(step, SpecPruneError)
        yield {'queries': queries, 'skipped': skipped}


@dataclass(frozen=True)
class Late:
    """A recording without its first control steps; their other inputs are there.

    Args:
        recording: the source.
        steps: control steps to leave out.
        camera: whose images are the control steps of a recording without executed actions.
    """

    recording: Recording
    steps: int
    camera: str

    @property
    def path(self) -> str:
        """The source's."""
        return self.recording.path

    @property
    def has_actions(self) -> bool:
        """The source's."""
        return self.recording.has_actions

    def events(self) -> Iterator[Event]:
        """All events but those of the first control steps."""
        left = self.steps
        for event in self.recording.events():
            if left and self._is_step(event):
                left -= 1
            else:
                yield event

    def _is_step(self, event: Event) -> bool:
        if self.has_actions:
            return isinstance(event, ExecutedAction)
        return isinstance(event, CameraEvent) and event.camera == self.camera
