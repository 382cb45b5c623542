"""End-effector actions: displacements or speeds, to poses or twists."""

from __future__ import annotations

import dataclasses

import numpy as np

from specprune_ros.errors import ConfigError
from specprune_ros.streaming import rotation
from specprune_ros.streaming.config import StreamerConfig
from specprune_ros.streaming.limits import Limits
from specprune_ros.streaming.measured import Measured, Pose
from specprune_ros.streaming.motion import Motion
from specprune_ros.streaming.targets import PoseTarget, Target, TwistTarget


class CartesianMotion(Motion[Pose]):
    """End-effector actions to poses or twists.

    A row displaces the end effector by a translation in the robot's frame and a rotation vector,
    also in the robot's frame: the orientation becomes exp(rotation) * orientation.

    Source: OSC_POSE of robosuite, as LIBERO's demonstrations were recorded with it (differs: it
    adds every delta to the measured pose; for pose output we add it to the last commanded one,
    so that a controller's lag does not shorten the motion).
    """

    def __init__(self, config: StreamerConfig):
        robot, stream = config.robot, config.stream
        moving = (*robot.translation_names, *robot.rotation_names)
        known = {*moving, *config.grippers}
        if not moving or set(robot.action_names) - known or set(moving) - set(robot.action_names):
            raise ConfigError(
                'robot.action_names',
                robot.action_names,
                'must be robot.translation_names, rotation_names and grippers, no more and no '
                f'less, for stream.output {stream.output}',
            )
        self.columns = np.array([robot.action_names.index(name) for name in moving], int)
        self.limits = Limits.of(config.limits, robot, self.columns, cartesian=True)
        lags = config.limits.max_tracking_error, config.limits.max_rotation_error
        self.max_lag = np.repeat(lags, 3)
        self._frame_id, self._dt_s = robot.frame_id, robot.step_dt_s
        self._scale = _scale(config, self.columns)

    def measured(self, measured: Measured, now_ns: int) -> Pose:
        """The measured pose."""
        return measured.pose(now_ns)

    def position(self, base: Pose) -> np.ndarray:
        """[3] m."""
        return base.position

    def lag(self, commanded: Pose, measured: Pose) -> np.ndarray:
        """[6] m, and the angle between the orientations, rad, three times."""
        turn = rotation.between(commanded.quaternion, measured.quaternion)
        angle = np.full(3, np.linalg.norm(turn))
        return np.concatenate((np.abs(commanded.position - measured.position), angle))

    def displacements(self, rows: np.ndarray, base: Pose) -> np.ndarray:
        """[K, 6] m and rad."""
        return rows[:, self.columns] * self._scale

    def moved(self, base: Pose, move: np.ndarray) -> Pose:
        """The pose that a translation and a rotation lead to."""
        position = np.minimum(
            np.maximum(base.position + move[:3], self.limits.low), self.limits.high
        )
        turn = rotation.from_rotation_vector(move[3:])
        return Pose(position, rotation.compose(turn, base.quaternion))

    def action(self, base: Pose, move: np.ndarray) -> np.ndarray:
        """[6] in action units."""
        return move / self._scale

    def rest(self, target: Target, commanded: Pose | None) -> np.ndarray:
        """[6] zeros: no displacement, no speed."""
        return np.zeros(6)


class PoseMotion(CartesianMotion):
    """End-effector actions to poses."""

    def target(self, base: Pose, move: np.ndarray) -> PoseTarget:
        """The pose."""
        return PoseTarget(
            position=base.position, quaternion_xyzw=base.quaternion, frame_id=self._frame_id
        )

    def hold(self, measured: Measured, now_ns: int, commanded: Pose | None) -> PoseTarget | None:
        """The measured pose; nothing beyond a limit is commanded, not even to stay there.

        Where the limits do not let one step reach it, the pose on the way that they do.
        """
        pose = measured.pose(now_ns)
        if commanded is not None:
            turn = rotation.between(commanded.quaternion, pose.quaternion)
            way = np.concatenate((pose.position - commanded.position, turn))
            move = self.limits.clamp(way, commanded.position, first=False)
            if move is None or not np.array_equal(move, way):
                pose = self.moved(commanded, np.zeros(6) if move is None else move)
        if self.limits.outside(pose.position).any():
            return None
        return self.target(pose, np.zeros(6))

    def stop(self) -> None:
        """No pose says stop."""
        return None


class TwistMotion(CartesianMotion):
    """End-effector actions to twists: displacement of a row, divided by the control period."""

    accumulates = False

    def __init__(self, config: StreamerConfig):
        super().__init__(config)
        self._unit = self._dt_s
        if config.stream.twist == 'unitless':
            self._unit = self._scale
            self.limits = self._within_one(known=config.stream.translation_unit_m > 0.0)

    def _within_one(self, known: bool) -> Limits:
        """The limits, and -1..1 besides; without metres, none on metres."""
        return dataclasses.replace(
            self.limits,
            speed_step=np.minimum(self.limits.speed_step, self._scale),
            initial=self.limits.initial if known else np.inf,
        )

    def target(self, base: Pose, move: np.ndarray) -> TwistTarget:
        """The speed."""
        twist = move / self._unit
        return TwistTarget(linear=twist[:3], angular=twist[3:], frame_id=self._frame_id)

    def hold(self, measured: Measured, now_ns: int, commanded: Pose | None) -> TwistTarget:
        """Zero speed, whatever was measured."""
        return self.stop()

    def stop(self) -> TwistTarget:
        """Zero speed."""
        return TwistTarget(linear=np.zeros(3), angular=np.zeros(3), frame_id=self._frame_id)


def _scale(config: StreamerConfig, columns: np.ndarray) -> np.ndarray:
    """[6] m and rad per control step of an action of 1; 1 where that may stay unknown.

    Raises:
        ConfigError: a unit that is not one of a translation or rotation, or of unknown size.
    """
    robot, stream = config.robot, config.stream
    twist = stream.output == 'twist' and stream.twist == 'unitless'
    period = robot.step_dt_s if robot.action_space == 'eef_twist' else 1.0
    kinds = [('translation_unit_m', 'm')] * 3 + [('rotation_unit_rad', 'rad')] * 3
    scale = np.ones(6)
    for element, (column, (field, unit)) in enumerate(zip(columns, kinds, strict=True)):
        given, size = robot.per_action('action_units')[column], getattr(stream, field)
        if given not in (unit, '1') or (twist and given != '1'):
            wanted = "'1' for stream.twist unitless" if twist else f"{unit!r} or '1'"
            raise ConfigError('robot.action_units', given, f'must be {wanted}')
        if given == unit:
            scale[element] = period
        elif size > 0.0:
            scale[element] = size
        elif not twist or _limited(config):
            raise ConfigError(
                f'stream.{field}', size, 'must be known for speeds, poses and limits in SI units'
            )
    return scale


def _limited(config: StreamerConfig) -> bool:
    limits = config.limits
    return bool(limits.position_min or limits.velocity_max or limits.max_step)
