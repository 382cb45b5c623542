"""State of one episode: what happened since the last reset. `Policy` owns the only instance."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from specprune_ros.images import CameraImage
from specprune_ros.models.preprocess import Staged
from specprune_ros.pruning.guard import GuardState
from specprune_ros.pruning.motion import Motion
from specprune_ros.types import FRAMES_KEPT, MAX_STEPS


@dataclass(eq=False)
class Frame:
    """The cameras' images at one control step.

    Attributes:
        step: executed control steps before it.
        images: as they came; empty once `pixels` is there.
        pixels: V images on the device, from the stager, in model order; None until needed.
        unseen: cameras, in model order, of which there was no image.
    """

    step: int
    images: Mapping[str, np.ndarray | CameraImage]
    pixels: Staged | None = None
    unseen: frozenset[int] = frozenset()


class FrameHistory:
    """The cameras' images at the last control steps, by executed step and not by wall time.

    Images are kept as they came and staged on the device only when a query compares with them: of
    twelve frames usually one is.
    """

    def __init__(self, depth: int = FRAMES_KEPT):
        self._frames: deque[Frame] = deque(maxlen=depth)

    def push(self, frame: Frame) -> None:
        """Keep the images of a control step; a step that has images already keeps those."""
        if not self._frames or self._frames[-1].step < frame.step:
            self._frames.append(frame)

    def reach(self, step: int) -> int:
        """How many control steps before `step` the oldest frame is; 0 without one."""
        return max(step - self._frames[0].step, 0) if self._frames else 0

    def find(self, step: int, age: int) -> Frame | None:
        """The newest frame that is at least `age` steps older than `step`, else the oldest.

        Returns:
            None when no frame is older than `step`, or `age` is 0.
        """
        older = [frame for frame in self._frames if frame.step < step]
        if not older or age <= 0:
            return None
        return next((f for f in reversed(older) if step - f.step >= age), older[0])

    def forget(self, frame: Frame) -> None:
        """Drop a frame that turned out not to decode."""
        self._frames.remove(frame)


@dataclass(eq=False)
class Episode:
    """Everything that a reset clears.

    Attributes:
        epoch: which episode this is; chunks of an older one are void.
        instruction: the task; a new one starts a new episode.
        stamp_ns: stamp of the last observation.
        query: queries so far.
        step: executed control steps so far.
        step_of_query: `step` at the last query.
        counts_steps: whether somebody reports executed steps; `step` then counts nothing else.
        displacement: [3] executed translation since the last query, unit 1.
        motion: the last executed action, None while none is known.
        fine: the controller's mode.
        memory: what the pruning method left for its next query.
        guard: what the guard found so far.
        recalls: recall (Eq. 1) of every query that has one, [V] each.
        frames: camera images by control step.
        sizes: camera -> (rows, cols) of its raw images.
        absent: cameras without an image at some executed step, or refused query, since the last
            query.
        executed: stamps of the newest executed actions since the last query, each with those of
            the images that were newest then, by camera.
    """

    epoch: int
    instruction: str | None = None
    stamp_ns: int | None = None
    query: int = 0
    step: int = 0
    step_of_query: int = 0
    counts_steps: bool = False
    displacement: np.ndarray = field(default_factory=lambda: np.zeros(3))
    motion: Motion | None = None
    fine: bool = False
    memory: object | None = None
    guard: GuardState = field(default_factory=GuardState)
    recalls: list[np.ndarray] = field(default_factory=list)
    frames: FrameHistory = field(default_factory=FrameHistory)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    absent: set[str] = field(default_factory=set)
    executed: deque[tuple[int, Mapping[str, int]]] = field(
        default_factory=lambda: deque(maxlen=MAX_STEPS)
    )
