"""Configuration of action_streamer: what leaves for the robot, and what must not."""

from __future__ import annotations

from dataclasses import dataclass, field

from specprune_ros.config import RobotConfig, check_fields, setting
from specprune_ros.errors import ConfigError

JOINT_SPACES = ('joint_position', 'joint_velocity', 'joint_delta')
CARTESIAN_SPACES = ('eef_delta_pose', 'eef_twist')
OUTPUTS = {  # output -> action spaces that it can be made of
    'chunk': JOINT_SPACES + CARTESIAN_SPACES,
    'joint_trajectory': JOINT_SPACES,
    'twist': CARTESIAN_SPACES,
    'pose': CARTESIAN_SPACES,
}


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """What becomes of a chunk."""

    output: str = setting(
        'chunk',
        'what goes to the robot: nothing, another node executes the chunks and ~/enable is '
        'refused (chunk); trajectory_msgs/JointTrajectory of one point (joint_trajectory); '
        'geometry_msgs/TwistStamped (twist); geometry_msgs/PoseStamped (pose)',
        choices=tuple(OUTPUTS),
    )
    dry_run: bool = setting(
        True, 'compute, check and report commands, but send none; set it false for motion'
    )
    blending: str = setting(
        'replace',
        'at the seam of two chunks: the new one from its due row on (replace); the mean of all '
        'chunks for a step, weighted (ensemble); the rows that the newer chunk was conditioned '
        'on stay (frozen_prefix: only a diffusion or flow-matching head can be conditioned)',
        choices=('replace', 'ensemble', 'frozen_prefix'),
    )
    ensemble_decay: float = setting(
        0.01,
        'm of the weights exp(-m i), i = 0 for the oldest chunk: 0 weighs all alike',
        low=0.0, high=100.0, unit='1',
    )  # fmt: skip
    translation_unit_m: float = setting(
        0.0,
        'metres that a translation of 1 really moves in a control step, where robot.action_units '
        'says 1 (LIBERO: 0.013, although its controller asks for 0.05); 0: not known',
        low=0.0, high=1.0, unit='m',
    )  # fmt: skip
    rotation_unit_rad: float = setting(
        0.0,
        'radians that a rotation of 1 really moves in a control step, where robot.action_units '
        'says 1 (LIBERO: 0.13, although its controller asks for 0.5); 0: not known',
        low=0.0, high=3.2, unit='rad',
    )  # fmt: skip
    twist: str = setting(
        'speed',
        'numbers of a twist: m/s and rad/s; or the action itself, -1..1, as MoveIt Servo takes it '
        'with command_in_type unitless',
        choices=('speed', 'unitless'),
    )
    trajectory_start: str = setting(
        'now',
        'stamp of a joint trajectory: 0, which means at once (now), or the time of sending (sent)',
        choices=('now', 'sent'),
    )
    gripper: str = setting(
        'none',
        'how grippers (robot.gripper_names, and in joint spaces what has unit 1) are commanded: '
        'not at all; std_msgs/Float64MultiArray of their positions (position); within the joint '
        'trajectory, for grippers that are joints of it (joint)',
        choices=('none', 'position', 'joint'),
    )
    gripper_closed: float = setting(0.0, 'action value that means closed', unit='action unit')
    gripper_open: float = setting(1.0, 'action value that means open', unit='action unit')
    gripper_closed_position: float = setting(0.0, 'position sent for closed', unit='m or rad')
    gripper_open_position: float = setting(0.04, 'position sent for open', unit='m or rad')
    on_stall: str = setting(
        'hold',
        'the one safety output when streaming has to end: the measured position, or zero speed '
        '(hold; without a fresh measurement as stop); zero speed, or a trajectory without points, '
        'which ends the running one in controllers that know it (stop); nothing (none)',
        choices=('hold', 'stop', 'none'),
    )
    command_latency_s: float = setting(
        0.0,
        'from sending a command until an observation shows all that it did: rows that went out '
        'so shortly before the observation of a chunk count as executed; too much skips rows',
        low=0.0, high=1.0, unit='s',
    )  # fmt: skip
    command_timeout_s: float = setting(
        1.5,
        'a chunk whose observation is older than this is never executed',
        low=0.01, high=60.0, unit='s',
    )  # fmt: skip
    max_state_age_s: float = setting(
        0.25,
        'streaming ends when the measured joint state or pose is older than this',
        low=0.01, high=60.0, unit='s',
    )  # fmt: skip
    peer_timeout_s: float = setting(
        1.0, 'vla_node counts as gone when its status is older than this',
        low=0.3, high=60.0, unit='s',
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields('stream', self)
        if self.gripper_closed == self.gripper_open:
            raise ConfigError(
                'stream.gripper_open', self.gripper_open, 'is also stream.gripper_closed'
            )


def _as_long(*lists: tuple[float, ...]) -> list[tuple[float, ...]]:
    """The lists, those of one value as long as the longest."""
    longest = max(map(len, lists))
    return [values * longest if len(values) == 1 else values for values in lists]


@dataclass(frozen=True, kw_only=True)
class LimitConfig:
    """What may leave, grippers aside: they only move between their two positions.

    Lists hold one value for all action elements or one each; position limits of an end effector
    one for all axes, or one for each of x, y, z.
    """

    policy: str = setting(
        'reject',
        'what becomes of a command beyond a limit: the whole chunk is refused (reject), or the '
        'element is brought within it (clamp)',
        choices=('reject', 'clamp'),
    )
    position_min: tuple[float, ...] = setting(
        (), 'least joint position (rad or m), or end-effector x, y, z (m); empty: no limit'
    )
    position_max: tuple[float, ...] = setting(
        (), 'greatest joint position (rad or m), or end-effector x, y, z (m); empty: no limit'
    )
    velocity_max: tuple[float, ...] = setting(
        (),
        'greatest speed of an action element, rad/s or m/s, as change of the command per control '
        'period; of the first command, as distance from the measured state; empty: no limit',
        low=1e-9,
    )
    max_step: tuple[float, ...] = setting(
        (),
        'greatest change of an action element from one command to the next, rad or m; of the '
        'first command, from the measured state; of a twist, what it moves in a control period; '
        'empty: no limit',
        low=1e-9,
    )
    max_initial_step: float = setting(
        0.1,
        'greatest distance of the first command from the measured state, if velocity_max and '
        'max_step allow so much: any joint (rad or m), or the end-effector position (m)',
        low=1e-9, high=10.0, unit='rad or m',
    )  # fmt: skip
    max_tracking_error: float = setting(
        0.3,
        'greatest distance of the measured state from the last command, any joint (rad or m) or '
        'end-effector coordinate (m); an arm that is further behind does not follow: streaming '
        'ends until ~/enable',
        low=1e-9, high=10.0, unit='rad or m',
    )  # fmt: skip
    max_rotation_error: float = setting(
        0.5,
        'likewise, greatest angle between the measured orientation and that of the last command, '
        'where poses are commanded',
        low=1e-9, high=4.0, unit='rad',
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_fields('limits', self)
        if bool(self.position_min) != bool(self.position_max):
            raise ConfigError(
                'limits.position_max', self.position_max, 'needs limits.position_min, or neither'
            )
        pairs = zip(*_as_long(self.position_min, self.position_max), strict=False)
        if any(low > high for low, high in pairs):
            raise ConfigError(
                'limits.position_min', self.position_min, 'lies above limits.position_max'
            )


@dataclass(frozen=True, kw_only=True)
class StreamerConfig:
    """All axes of action_streamer. The robot's is the one that vla_node reads."""

    robot: RobotConfig = field(default_factory=RobotConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    limits: LimitConfig = field(default_factory=LimitConfig)

    def __post_init__(self) -> None:
        space, output = self.robot.action_space, self.stream.output
        if space not in OUTPUTS[output]:
            makes = ', '.join(name for name, spaces in OUTPUTS.items() if space in spaces)
            raise ConfigError(
                'stream.output', output, f'cannot be made of {space} actions; these can: {makes}'
            )
        if self.stream.blending == 'frozen_prefix':
            raise ConfigError(
                'stream.blending',
                'frozen_prefix',
                'needs a head that is conditioned on the rows that stay. No model here has one: '
                'openvla_oft not (L1 regression cannot be, its diffusion head is not), openvla '
                'and univla not (action tokens), nor the random stand-ins; take replace or '
                'ensemble',
            )
        if output == 'chunk':
            return
        self._check_latency()
        self._check_limits()
        self._check_gripper()
        if space == 'joint_velocity' and not self.limits.velocity_max:
            raise ConfigError('limits.velocity_max', (), 'is needed for joint velocities')
        if not (self.stream.dry_run or self.limits.velocity_max or self.limits.max_step):
            raise ConfigError(
                'limits.velocity_max', (), 'or limits.max_step is needed before anything moves'
            )

    @property
    def grippers(self) -> tuple[str, ...]:
        """Action elements that are grippers: by name, and in joint spaces those of unit 1."""
        units = zip(self.robot.action_names, self.robot.per_action('action_units'), strict=True)
        joints = self.robot.action_space in JOINT_SPACES
        return tuple(
            name
            for name, unit in units
            if name in self.robot.gripper_names or (joints and unit == '1')
        )

    def _check_latency(self) -> None:
        latency_s = self.stream.command_latency_s
        limit_s = (self.robot.horizon - 1) * self.robot.step_dt_s
        if latency_s > limit_s + 1e-9:  # a sum of periods is not exact
            why = f'is beyond {limit_s:g} s, the last row of a chunk: none would be left'
            raise ConfigError('stream.command_latency_s', latency_s, why)

    def _check_limits(self) -> None:
        width = len(self.robot.action_names)
        axes = width if self.robot.action_space in JOINT_SPACES else 3
        sizes = {
            'position_min': axes, 'position_max': axes, 'velocity_max': width, 'max_step': width,
        }  # fmt: skip
        for name, count in sizes.items():
            if len(getattr(self.limits, name)) not in (0, 1, count):
                raise ConfigError(
                    f'limits.{name}', getattr(self.limits, name), f'needs 1 or {count} elements'
                )

    def _check_gripper(self) -> None:
        how = self.stream.gripper
        if how == 'joint' and self.stream.output != 'joint_trajectory':
            raise ConfigError('stream.gripper', how, 'needs stream.output joint_trajectory')
        if how != 'none' and not self.grippers:
            raise ConfigError(
                'stream.gripper', how, 'no action element is a gripper: set robot.gripper_names'
            )
