"""What a command may be, as an interval around the command before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specprune_ros.config import RobotConfig
from specprune_ros.streaming.config import LimitConfig

TOLERANCE = 1e-9  # rad or m: rounding of a sum is no violation


@dataclass(frozen=True, eq=False)
class Limits:
    """Limits of the M motion elements, of which position limits hold for the first P.

    Joints: M = P joints. End effector: M = 6, translation and rotation, and P = 3.

    Attributes:
        low, high: [P] least and greatest position.
        speed_step: [M] what velocity_max allows in one control period.
        max_step: [M] what max_step allows.
        initial: greatest distance of the first command.
        cartesian: True: `initial` bounds the length of the translation, else every element.
    """

    low: np.ndarray
    high: np.ndarray
    speed_step: np.ndarray
    max_step: np.ndarray
    initial: float
    cartesian: bool

    @classmethod
    def of(
        cls, limits: LimitConfig, robot: RobotConfig, columns: np.ndarray, *, cartesian: bool
    ) -> Limits:
        """The limits of the action `columns` [M]; an empty list is no limit."""
        width = len(robot.action_names)

        def per_element(values: tuple[float, ...], absent: float = np.inf) -> np.ndarray:
            values = values or (absent,)
            return np.array(values * width if len(values) == 1 else values)[columns]

        def per_position(values: tuple[float, ...], absent: float) -> np.ndarray:
            if cartesian:
                return np.broadcast_to(values or (absent,), 3).astype(float)
            return per_element(values, absent)

        return cls(
            low=per_position(limits.position_min, -np.inf),
            high=per_position(limits.position_max, np.inf),
            speed_step=per_element(limits.velocity_max) * robot.step_dt_s,
            max_step=per_element(limits.max_step),
            initial=limits.max_initial_step,
            cartesian=cartesian,
        )

    @property
    def reach(self) -> np.ndarray:
        """[M] greatest displacement of one control period."""
        return np.minimum(self.speed_step, self.max_step)

    def outside(self, position: np.ndarray) -> np.ndarray:
        """[P] bool, which elements of a position [P] lie beyond their limits."""
        return (position < self.low) | (position > self.high)

    def violations(
        self, moves: np.ndarray, positions: np.ndarray, *, first: bool
    ) -> dict[str, np.ndarray]:
        """Which limits a sequence of commands breaks.

        Args:
            moves: [K, M] displacement of each command from the one before.
            positions: [K, P] where each command leads.
            first: the first command starts from the measured state.

        Returns:
            Fault code -> [M] bool, the elements that break it; codes that nothing breaks are
            absent, the gravest comes first.
        """
        size, count = np.abs(moves), positions.shape[1]
        over = np.zeros((4, moves.shape[1]), bool)
        outside = (positions < self.low - TOLERANCE) | (positions > self.high + TOLERANCE)
        over[0, :count] = outside.any(0)
        if first and len(moves):
            over[1] = self._initial_excess(moves[0])
        over[2] = (size > self.speed_step + TOLERANCE).any(0)
        over[3] = (size > self.max_step + TOLERANCE).any(0)
        codes = ('position_limit', 'initial_step', 'velocity_limit', 'step_limit')
        return {code: mask for code, mask in zip(codes, over, strict=True) if mask.any()}

    def _initial_excess(self, move: np.ndarray) -> np.ndarray:
        if not self.cartesian:
            return np.abs(move) > self.initial + TOLERANCE
        excess = np.zeros(len(move), bool)
        excess[:3] = np.linalg.norm(move[:3]) > self.initial + TOLERANCE
        return excess

    def clamp(self, move: np.ndarray, position: np.ndarray, *, first: bool) -> np.ndarray | None:
        """The displacement nearest to `move` that all limits allow at once.

        Args:
            move: [M] wanted displacement.
            position: [P] where it starts.
            first: it starts from the measured state.

        Returns:
            [M]; None when the limits exclude each other, as they can for a start outside the
            position limits, and only for that.
        """
        reach = self.reach
        if first and self.cartesian:
            move = move.copy()
            move[:3] *= min(1.0, self.initial / max(float(np.linalg.norm(move[:3])), 1e-12))
        elif first:
            reach = np.minimum(reach, self.initial)
        low, high, count = -reach, reach.copy(), len(position)
        low[:count] = np.maximum(low[:count], self.low - position)
        high[:count] = np.minimum(high[:count], self.high - position)
        if (low > high).any():
            return None
        allowed = np.minimum(np.maximum(move, low), high)
        if first and self._initial_excess(allowed).any():
            return None
        return allowed
