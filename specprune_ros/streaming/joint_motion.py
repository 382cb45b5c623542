"""Joint actions: positions, displacements or speeds, to joint positions."""

from __future__ import annotations

import dataclasses

import numpy as np

from specprune_ros.errors import ConfigError
from specprune_ros.streaming.config import StreamerConfig
from specprune_ros.streaming.limits import Limits
from specprune_ros.streaming.measured import Measured
from specprune_ros.streaming.motion import Motion
from specprune_ros.streaming.targets import JointTarget


class JointMotion(Motion[np.ndarray]):
    """Joint actions to joint positions; a base is the positions [M]."""

    def __init__(self, config: StreamerConfig):
        robot = config.robot
        arm = [name for name in robot.action_names if name not in config.grippers]
        self.names = tuple(arm)
        self.columns = np.array([robot.action_names.index(name) for name in arm], int)
        self.limits = Limits.of(config.limits, robot, self.columns, cartesian=False)
        self.max_lag = np.full(len(arm), config.limits.max_tracking_error)
        self._absolute = robot.action_space == 'joint_position'
        self._dt_s = robot.step_dt_s
        self._scale = robot.step_dt_s if robot.action_space == 'joint_velocity' else 1.0
        if not arm:
            raise ConfigError('robot.action_names', robot.action_names, 'has no joint')

    def measured(self, measured: Measured, now_ns: int) -> np.ndarray:
        """[M] measured positions."""
        return measured.joints(now_ns)

    def position(self, base: np.ndarray) -> np.ndarray:
        """[M] the joint positions."""
        return base

    def lag(self, commanded: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """[M] rad or m."""
        return np.abs(commanded - measured)

    def displacements(self, rows: np.ndarray, base: np.ndarray) -> np.ndarray:
        """[K, M] rad or m."""
        wanted = rows[:, self.columns]
        if not self._absolute:
            return wanted * self._scale
        moves = wanted.copy()
        moves[0] -= base
        moves[1:] -= wanted[:-1]
        return moves

    def moved(self, base: np.ndarray, move: np.ndarray) -> np.ndarray:
        """[M] joint positions."""
        return np.minimum(np.maximum(base + move, self.limits.low), self.limits.high)

    def target(self, base: np.ndarray, move: np.ndarray) -> JointTarget:
        """Positions to be reached one control period later."""
        return JointTarget(names=self.names, positions=base.copy(), duration_s=self._dt_s)

    def action(self, base: np.ndarray, move: np.ndarray) -> np.ndarray:
        """[M] positions, displacements or speeds."""
        return base if self._absolute else move / self._scale

    def hold(
        self, measured: Measured, now_ns: int, commanded: np.ndarray | None
    ) -> JointTarget | None:
        """The measured positions; nothing beyond a limit is commanded, not even to stay there.

        The measurement is a little old: as much time is given as the limits of speed and step ask
        for.
        """
        positions = measured.joints(now_ns)
        if self.limits.outside(positions).any():
            return self.stop()
        target = self.target(positions, np.zeros(len(positions)))
        if commanded is None:
            return target
        periods = float((np.abs(positions - commanded) / self.limits.reach).max())
        return dataclasses.replace(target, duration_s=self._dt_s * max(1.0, periods))

    def stop(self) -> JointTarget:
        """A target without points."""
        return JointTarget(names=self.names, positions=np.zeros(0), duration_s=self._dt_s)

    def rest(self, target: JointTarget, commanded: np.ndarray | None) -> np.ndarray | None:
        """[M] no displacement, no speed; or the position of the target, else the last one."""
        if not self._absolute:
            return np.zeros(len(self.columns))
        return target.positions if len(target.positions) else commanded
