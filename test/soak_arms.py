"""The robots of the soak: their parameters, and arms that check all that they are told."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from geometry_msgs.msg import PoseStamped, TwistStamped
from ros_world import JOINTS
from trajectory_msgs.msg import JointTrajectory

from specprune_ros.ros import conversions

DT_S, NS = 0.05, 1_000_000_000
# rad or m: limits of every arm; REACH is that of velocity_max.
POSITION, REACH, INITIAL = 1.0, 0.08, 0.07
EPS = 1e-9
Expect = Callable[[bool, str], None]


@dataclasses.dataclass(frozen=True)
class Setup:
    """One robot, its output, and how it stops."""

    space: str
    output: str
    on_stall: str

    def __str__(self) -> str:
        return f'{self.space} as {self.output}, {self.on_stall}'

    @property
    def arm(self) -> type[Arm]:
        return {'joint_trajectory': JointArm, 'pose': PoseArm, 'twist': TwistArm}[self.output]

    def robot(self) -> dict[str, object]:
        """Parameters of both nodes."""
        return {'robot.action_space': self.space, **self.arm.ROBOT}

    def stream(self) -> dict[str, object]:
        """Parameters of action_streamer alone."""
        return {'stream.output': self.output, 'stream.on_stall': self.on_stall}


SETUPS = [
    Setup(space, output, on_stall)
    for space, output in (
        ('joint_position', 'joint_trajectory'),
        ('joint_delta', 'joint_trajectory'),
        ('joint_velocity', 'joint_trajectory'),
        ('eef_delta_pose', 'pose'),
        ('eef_delta_pose', 'twist'),
        ('eef_twist', 'twist'),
    )
    for on_stall in ('stop', 'hold')
]


@dataclasses.dataclass(frozen=True)
class Told:
    """A message to an arm.

    Attributes:
        at: [3] rad or m, where it leads.
        periods: control periods that it may take.
    """

    at: np.ndarray
    periods: float = 1.0


def inside(at: np.ndarray) -> bool:
    """Whether a position [3] is within the limits."""
    return abs(at).max() <= POSITION + EPS


class Arm(ABC):
    """Goes where it is told, at once.

    Attributes:
        TOPIC, KIND: of the messages to it.
        MEASURED: what action_streamer measures of it, as in fault codes.
        ROBOT: parameters of both nodes.
        START: [3] where it is at first.
        at: [3] where it is.
    """

    TOPIC: ClassVar[str]
    KIND: ClassVar[type]
    MEASURED: ClassVar[str]
    ROBOT: ClassVar[dict[str, object]]
    START: ClassVar[np.ndarray]

    def __init__(self, setup: Setup):
        # Of a stop that only differs from a command in what it says, the wire does not tell.
        self.tells_stops = self.KIND is JointTrajectory and setup.on_stall == 'stop'
        self.at = self.START.copy()

    @abstractmethod
    def read(self, msg: object, expect: Expect) -> Told | None:
        """What a message says, its numbers checked; None: stop."""

    def check(
        self, told: Told, last: np.ndarray | None, measured: list[np.ndarray], expect: Expect
    ) -> None:
        """A command leads nowhere but a step away.

        Args:
            told: the command.
            last: [3] the one before; None: streaming begins.
            measured: [3] each, what was measured lately.
            expect: called with whether something holds, and what it means if it does not.
        """
        expect(inside(told.at), f'position {told.at}')
        near = last is not None and abs(told.at - last).max() <= told.periods * REACH + EPS
        if not near and (last is None or not self.tells_stops):
            near = any(self._begins(told.at - each) for each in measured)
        expect(near, f'{told.at} after {last}')

    def _begins(self, move: np.ndarray) -> bool:
        """Whether a first command may be so far from the measured state."""
        return abs(move).max() <= min(REACH, INITIAL) + EPS


class JointArm(Arm):
    """Follows joint trajectories of one point; one without points stops it."""

    TOPIC, KIND, MEASURED = 'joint_trajectory', JointTrajectory, 'joint'
    ROBOT: ClassVar = {
        'robot.action_names': list(JOINTS),
        'robot.action_units': ['rad'],
        'robot.translation_names': [''],
        'robot.rotation_names': [''],
    }
    START = np.array([0.1, -0.2, 0.3])

    def read(self, msg: JointTrajectory, expect: Expect) -> Told | None:
        expect(tuple(msg.joint_names) == JOINTS, f'joints {msg.joint_names}')
        if not msg.points:
            return None
        numbers = [n for p in msg.points for n in (*p.positions, *p.velocities, *p.accelerations)]
        expect(bool(np.isfinite(numbers).all()), f'not finite: {numbers}')
        point = msg.points[0]
        expect((len(msg.points), len(point.positions)) == (1, 3), f'{msg.points}')
        periods = conversions.to_ns(point.time_from_start) / (DT_S * NS)
        expect(periods == 1.0 or (periods > 1.0 and not self.tells_stops), f'{periods} periods')
        return Told(np.array(point.positions), periods)


class CartesianArm(Arm):
    """An end effector."""

    MEASURED = 'pose'
    ROBOT: ClassVar = {
        'robot.action_names': ['x', 'y', 'z', 'roll', 'pitch', 'yaw'],
        'robot.action_units': ['1'],
        'robot.translation_names': ['x', 'y', 'z'],
        'robot.rotation_names': ['roll', 'pitch', 'yaw'],
    }
    START = np.array([0.4, 0.0, 0.3])

    def __init__(self, setup: Setup):
        super().__init__(setup)
        self.turn = np.array([0.0, 0.0, 0.0, 1.0])


class PoseArm(CartesianArm):
    """Follows poses."""

    TOPIC, KIND = 'pose_command', PoseStamped

    def read(self, msg: PoseStamped, expect: Expect) -> Told:
        at, turn = (np.array(each) for each in conversions.pose_from_msg(msg))
        expect(bool(np.isfinite([*at, *turn]).all()), f'not finite: {at} {turn}')
        expect(msg.header.frame_id == 'base_link', f'frame {msg.header.frame_id}')
        expect(abs(np.linalg.norm(turn) - 1.0) < 1e-6, f'orientation {turn}')
        angle = 2 * np.arccos(min(1.0, abs(float(turn @ self.turn))))
        expect(angle <= np.sqrt(3) * REACH + 1e-6, f'turned by {angle:.3f} rad')
        self.turn = turn
        return Told(at)

    def _begins(self, move: np.ndarray) -> bool:
        return np.linalg.norm(move) <= INITIAL + EPS


class TwistArm(CartesianArm):
    """Moves at a speed for one control period, between its end stops."""

    TOPIC, KIND = 'delta_twist_cmds', TwistStamped

    def read(self, msg: TwistStamped, expect: Expect) -> Told | None:
        linear, angular = msg.twist.linear, msg.twist.angular
        numbers = np.array([linear.x, linear.y, linear.z, angular.x, angular.y, angular.z])
        expect(bool(np.isfinite(numbers).all()), f'not finite: {numbers}')
        expect(msg.header.frame_id == 'base_link', f'frame {msg.header.frame_id}')
        if not numbers.any():
            return None
        move = numbers * DT_S
        expect(abs(move).max() <= REACH + EPS, f'speeds {numbers}')
        self.move = move[:3]
        return Told(np.clip(self.at + self.move, -POSITION, POSITION))

    def check(
        self, told: Told, last: np.ndarray | None, measured: list[np.ndarray], expect: Expect
    ) -> None:
        """From where it was measured the speed leads out of no limit."""
        expect(any(inside(each + self.move) for each in measured), f'{self.move} m from {self.at}')
