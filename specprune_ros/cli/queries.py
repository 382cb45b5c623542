"""A recording through a policy on a terminal: what `run`, `explain` and `calibrate` share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from specprune_ros.cli.options import (
    add_config_arguments,
    add_recording_arguments,
    at_least,
    config_from,
    recording_from,
)
from specprune_ros.errors import SpecPruneError

if TYPE_CHECKING:
    from rich.console import Console

    from specprune_ros.types import Observation, PolicyResult


def add_query_arguments(parser: argparse.ArgumentParser) -> None:
    """The recording, the configuration, and how often to query."""
    add_recording_arguments(parser)
    add_config_arguments(parser)
    parser.add_argument(
        '--every', type=int, default=0, help='control steps between queries; 0: the horizon'
    )


class Queries:
    """The queries along a recording, with a progress bar.

    Args:
        arguments: of `add_query_arguments`.
        console: that is told what was left out and why.

    Attributes:
        recording: the source.
        policy: fitted to the recording and warmed up.
        skipped: why queries were skipped, so far, in order.

    Raises:
        RecordingError, ConfigError, CheckpointError, MissingDependencyError: it cannot begin.
    """

    def __init__(self, arguments: argparse.Namespace, console: Console):
        from specprune_ros.loading import load_policy
        from specprune_ros.offline import fit_robot

        self._every = at_least('every', arguments.every, 0)
        self._console = console
        config = config_from(arguments)
        self.recording = recording_from(arguments, config.robot)
        self.skipped: list[SpecPruneError] = []
        config = fit_robot(config, self.recording)
        used = config.robot.camera_names
        left_out = [name for name in self.recording.cameras if name not in used]
        if left_out:
            console.print(f'cameras left out: {", ".join(left_out)}')
        self.policy = load_policy(config)
        self.policy.warm_up()

    def __iter__(self) -> Iterator[tuple[Observation, PolicyResult]]:
        """Run the recording.

        Raises:
            RecordingError: no query was possible, or the data is damaged from here on.
        """
        from rich.progress import track

        from specprune_ros.offline import run_recording

        steps = run_recording(self.policy, self.recording, every=self._every)
        total = self.recording.control_steps
        for outcome in track(steps, 'queries', total=total, console=self._console):
            if isinstance(outcome, SpecPruneError):
                self.skipped.append(outcome)
                self._console.print(f'skipped: {outcome}', style='yellow')
            elif outcome is not None:
                yield outcome

    def skipped_words(self) -> str:
        """How many queries were skipped, and why, in one line; empty when none was."""
        from specprune_ros.offline import skipped_words

        return skipped_words(self.skipped)
