"""Grippers: absolute in every action space, and moving between two positions only."""

from __future__ import annotations

import dataclasses

import numpy as np

from specprune_ros.streaming.config import StreamerConfig
from specprune_ros.streaming.targets import JointTarget


class Grippers:
    """From the gripper elements of an action to positions.

    Attributes:
        columns: [G] their action columns.
        names: [G].
    """

    def __init__(self, config: StreamerConfig):
        stream, names = config.stream, config.robot.action_names
        self.names = config.grippers
        self.columns = np.array([names.index(name) for name in self.names], int)
        self._closed = stream.gripper_closed
        self._span = stream.gripper_open - stream.gripper_closed
        self._at = (stream.gripper_closed_position, stream.gripper_open_position)

    def limited(self, row: np.ndarray) -> np.ndarray:
        """[G] of a row [A], brought between closed and open."""
        return self._closed + self._span * self._opening(row[self.columns])

    def positions(self, row: np.ndarray) -> tuple[float, ...]:
        """[G] m or rad, on the line from the closed to the open position."""
        closed, opened = self._at
        return tuple((closed + (opened - closed) * self._opening(row[self.columns])).tolist())

    def joined(self, target: JointTarget, positions: tuple[float, ...]) -> JointTarget:
        """A joint target with the grippers among its joints; one without points stays so."""
        arm = target.positions
        both = np.concatenate((arm, positions)) if len(arm) else arm
        return dataclasses.replace(target, names=(*target.names, *self.names), positions=both)

    def _opening(self, values: np.ndarray) -> np.ndarray:
        """[G] 0 closed to 1 open."""
        return np.minimum(np.maximum((values - self._closed) / self._span, 0.0), 1.0)
