"""What the actions of a robot move.

Whatever the action space, a row becomes a displacement of the M motion elements from a base: the
last commanded target while streaming, the measured state at the start. Limits act on it there,
and what is left becomes a target, and an action again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import numpy as np

from specprune_ros.streaming.limits import Limits
from specprune_ros.streaming.measured import Measured
from specprune_ros.streaming.targets import Target

Base = TypeVar('Base')


class Motion(ABC, Generic[Base]):
    """What the streamer asks of an action space and an output.

    Attributes:
        columns: [M] action columns that move the arm.
        max_lag: [M] greatest `lag` of an arm that follows.
        limits: theirs.
        accumulates: displacements add up from the last command; else each starts from the
            measured state.
    """

    columns: np.ndarray
    max_lag: np.ndarray
    limits: Limits
    accumulates = True

    @abstractmethod
    def measured(self, measured: Measured, now_ns: int) -> Base:
        """The measured state as a base.

        Raises:
            Refusal: it is missing or stale.
        """

    @abstractmethod
    def position(self, base: Base) -> np.ndarray:
        """[P] what position limits are about."""

    @abstractmethod
    def lag(self, commanded: Base, measured: Base) -> np.ndarray:
        """[M] how far the measured state is from the last command, not below 0."""

    @abstractmethod
    def displacements(self, rows: np.ndarray, base: Base) -> np.ndarray:
        """[K, M] displacement of each row [K, A] from the one before, of the first from base."""

    @abstractmethod
    def moved(self, base: Base, move: np.ndarray) -> Base:
        """The base after a displacement [M], within the position limits to the last bit."""

    @abstractmethod
    def target(self, base: Base, move: np.ndarray) -> Target:
        """What goes to the robot to get to `base`, by displacement `move` [M]."""

    @abstractmethod
    def action(self, base: Base, move: np.ndarray) -> np.ndarray:
        """[M] the action that commands `base`, by displacement `move` [M], in action units."""

    @abstractmethod
    def hold(self, measured: Measured, now_ns: int, commanded: Base | None) -> Target | None:
        """What keeps the arm where it was measured, and gets it there from the last command.

        Raises:
            Refusal: where that is, is not known.
        """

    @abstractmethod
    def stop(self) -> Target | None:
        """What ends the running motion without a position; None where nothing does."""

    @abstractmethod
    def rest(self, target: Target, commanded: Base | None) -> np.ndarray | None:
        """[M] the action, in action units, that says as `hold` or `stop` does: stay.

        Args:
            target: what `hold` or `stop` gave.
            commanded: the last command; None: there was none.

        Returns:
            None where an action is a position, and nobody knows which.
        """

    def positions(self, base: Base, moves: np.ndarray) -> np.ndarray:
        """[K, P] where a sequence of displacements [K, M] leads."""
        start = self.position(base)
        return start + np.cumsum(moves[:, : len(start)], axis=0)
