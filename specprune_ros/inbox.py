"""The newest value of every input, and the observation they make. No ROS, no torch.

Latest-value slots, not queues: a robot acts on what is, not on what was. Bad values are refused
where they come in, so that they are counted one by one and never replace a good one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from specprune_ros.checks import check_instruction
from specprune_ros.config import RobotConfig, RuntimeConfig
from specprune_ros.errors import ObservationError
from specprune_ros.images import CameraImage
from specprune_ros.types import Observation

NS = 1_000_000_000
INFINITY = float('inf')
JOINTS, POSE = 'joint_states', 'eef_pose'
# Names in RobotConfig.joint_names that the end-effector pose gives: position in m, axis-angle in
# rad.
POSE_NAMES = ('eef_x', 'eef_y', 'eef_z', 'eef_ax', 'eef_ay', 'eef_az')
NORM_TOLERANCE = 1e-3  # of a quaternion; more is no rounding, but a sender's mistake
KINDS = {JOINTS: 'joint', POSE: 'pose'}  # input -> how its error codes begin; else camera


def proprio_inputs(robot: RobotConfig) -> tuple[str, ...]:
    """Which of `joint_states` and `eef_pose` the robot's proprioception needs."""
    from_pose = [name in POSE_NAMES for name in robot.joint_names]
    needed = {JOINTS: not all(from_pose), POSE: any(from_pose)}
    return tuple(name for name, is_needed in needed.items() if is_needed)


def axis_angle(quaternion_xyzw: Sequence[float]) -> np.ndarray:
    """The rotation of a unit quaternion as its axis times its angle.

    As LIBERO's observations, and with them the training data, have it: the angle lies in 0..2 pi,
    so that q and -q, the same rotation, give different vectors (no flip to the shorter way). An
    arm that points down lies near pi, where the sign decides: send the one that the training data
    have.

    Args:
        quaternion_xyzw: [4], of norm 1.

    Returns:
        [3] rad; zero where half the angle has no sine.

    Source: robosuite's quaternion-to-axis-angle conversion, used by LIBERO.
    """
    *vector, w = np.asarray(quaternion_xyzw, float)
    if abs(w) >= 1.0:
        return np.zeros(3)
    # Not from the cosine alone: near the identity it has no digits left.
    sine = math.hypot(*vector)
    return np.array(vector) * (2.0 * math.atan2(sine, w) / sine) if sine else np.zeros(3)


class Inbox:
    """Newest image per camera, joint state, end-effector pose and instruction of one robot.

    Args:
        robot: what belongs to it; images, joints and poses of anything else are ignored.
        runtime: how old inputs may be; None takes them at any age.
    """

    def __init__(self, robot: RobotConfig, runtime: RuntimeConfig | None):
        self._robot = robot
        self._joint_names = [name for name in robot.joint_names if name not in POSE_NAMES]
        self._inputs = proprio_inputs(robot)
        self._limits_s = dict.fromkeys(('camera', *KINDS.values()), INFINITY)
        if runtime is not None:
            self._limits_s = dict.fromkeys(KINDS.values(), runtime.max_joint_age_s)
            self._limits_s['camera'] = runtime.max_image_age_s
        self._images: dict[str, tuple[int, np.ndarray | CameraImage]] = {}
        # input -> stamp, and its elements of the proprioceptive state by name
        self._proprio: dict[str, tuple[int, dict[str, float]]] = {}
        self._instruction: str | None = None

    @property
    def joint_names(self) -> tuple[str, ...]:
        """Elements of the proprioceptive state, in model order."""
        return self._robot.joint_names

    @property
    def instruction(self) -> str | None:
        """The newest instruction."""
        return self._instruction

    @property
    def images(self) -> Mapping[str, np.ndarray | CameraImage]:
        """Camera -> its newest image, as it came."""
        return {name: image for name, (_, image) in self._images.items()}

    def recent_images(self, now_ns: int) -> Mapping[str, np.ndarray | CameraImage]:
        """Camera -> its newest image, without the cameras whose image is stale."""
        oldest = now_ns - self._limits_s['camera'] * NS
        return {name: image for name, (stamp, image) in self._images.items() if stamp >= oldest}

    @property
    def image_stamps_ns(self) -> Mapping[str, int]:
        """Camera -> stamp of its newest image."""
        return {name: stamp for name, (stamp, _) in self._images.items()}

    def put_image(self, camera: str, stamp_ns: int, image: np.ndarray | CameraImage) -> None:
        """Keep a camera's newest image."""
        if camera in self._robot.camera_names:
            self._images[camera] = (stamp_ns, image)

    def put_joints(self, stamp_ns: int, names: Sequence[str], positions: Sequence[float]) -> None:
        """Keep the newest joint state; joints are found by name, in any order, extra ones ignored.

        Raises:
            ObservationError: names and positions differ in number, a joint of the robot is
                missing, or its position is not finite.
        """
        if JOINTS not in self._inputs:
            return
        if len(names) != len(positions):
            got = f'{len(names)} names, {len(positions)} positions'
            raise ObservationError('joint_width', JOINTS, got, 'must be as many')
        by_name = dict(zip(names, positions, strict=True))
        missing = [name for name in self._joint_names if name not in by_name]
        if missing:
            raise ObservationError(
                'joint_missing', f'{JOINTS}.name', list(names), f'lacks {missing}'
            )
        values = {name: float(by_name[name]) for name in self._joint_names}
        if not all(map(math.isfinite, values.values())):
            bad = {n: v for n, v in by_name.items() if not np.isfinite(v)}
            raise ObservationError('joint_not_finite', f'{JOINTS}.position', bad, 'must be finite')
        self._proprio[JOINTS] = (stamp_ns, values)

    def put_pose(
        self, stamp_ns: int, position: Sequence[float], quaternion_xyzw: Sequence[float]
    ) -> None:
        """Keep the newest end-effector pose, in the frame of the training data.

        Args:
            stamp_ns: when it was measured.
            position: [3] m.
            quaternion_xyzw: [4]; its norm may be off by NORM_TOLERANCE.

        Raises:
            ObservationError: something is not finite, or the quaternion is no rotation.
        """
        if POSE not in self._inputs:
            return
        position, quaternion = np.asarray(position, float), np.asarray(quaternion_xyzw, float)
        if not np.isfinite((*position, *quaternion)).all():
            got = f'position {position.tolist()}, orientation {quaternion.tolist()}'
            raise ObservationError('pose_not_finite', POSE, got, 'must be finite')
        norm = math.hypot(*quaternion)
        if abs(norm - 1.0) > NORM_TOLERANCE:
            why = f'must have norm 1, has {norm:.4g}'
            raise ObservationError(
                'pose_quaternion', f'{POSE}.orientation', quaternion.tolist(), why
            )
        values = (*position.tolist(), *axis_angle(quaternion / norm).tolist())
        self._proprio[POSE] = (stamp_ns, dict(zip(POSE_NAMES, values, strict=True)))

    def put_instruction(self, text: str) -> bool:
        """Keep the newest instruction.

        Returns:
            Whether it differs from the former one.

        Raises:
            ObservationError: it is empty; the former one stays.
        """
        check_instruction(text)
        former, self._instruction = self._instruction, text.strip()
        return former != self._instruction

    def forget_inputs(self) -> None:
        """Drop images, joint state and pose, as when the node stops; the instruction stays."""
        self._images.clear()
        self._proprio.clear()

    def age_s(self, now_ns: int) -> dict[str, float]:
        """Input -> seconds since its stamp; infinity for one that never came."""
        stamps = dict.fromkeys(
            (*(f'cameras/{name}' for name in self._robot.camera_names), *self._inputs)
        )
        stamps |= {f'cameras/{name}': stamp for name, (stamp, _) in self._images.items()}
        stamps |= {name: stamp for name, (stamp, _) in self._proprio.items()}
        return {
            name: INFINITY if stamp is None else (now_ns - stamp) / NS
            for name, stamp in stamps.items()
        }

    def check(self, now_ns: int) -> None:
        """Refuse inputs that are no observation, whatever the instruction.

        Raises:
            ObservationError: an input never came, or is older than allowed.
        """
        for name, age in self.age_s(now_ns).items():
            self._check_age(name, age)

    def observation(self, now_ns: int, instruction: str = '') -> Observation:
        """All inputs together.

        Args:
            now_ns: what ages count to.
            instruction: instead of the newest one.

        Raises:
            ObservationError: an input never came, or is older than allowed.
        """
        instruction = instruction or self._instruction
        if instruction is None:
            raise ObservationError(
                'instruction_missing', 'instruction', None, 'no instruction came yet'
            )
        self.check(now_ns)
        inputs = (*self._images.values(), *self._proprio.values())
        return Observation(
            images=self.images,
            proprio=self.proprio,
            instruction=instruction,
            stamp_ns=min(stamp for stamp, _ in inputs),
            image_stamps_ns=self.image_stamps_ns,
            proprio_stamps_ns=tuple(self._proprio[name][0] for name in self._inputs),
        )

    @property
    def proprio_lag_s(self) -> float:
        """By how much the proprioceptive state is older than the newest image; 0: it is not."""
        if not self._images or not self._proprio:
            return 0.0
        newest = max(stamp for stamp, _ in self._images.values())
        return max(0.0, newest - min(stamp for stamp, _ in self._proprio.values())) / NS

    @property
    def proprio(self) -> np.ndarray | None:
        """[P] in the order of the robot's joint_names; None before all of it came, or without."""
        if not self._inputs or len(self._proprio) < len(self._inputs):
            return None
        values: dict[str, float] = {}
        for _, elements in self._proprio.values():
            values |= elements
        return np.array([values[name] for name in self._robot.joint_names])

    def _check_age(self, name: str, age: float) -> None:
        kind = KINDS.get(name, 'camera')
        limit = self._limits_s[kind]
        if age == INFINITY:
            raise ObservationError(f'{kind}_missing', name, None, 'nothing came yet')
        if not -limit <= age <= limit:  # from the future: the clock jumped back
            raise ObservationError(
                f'{kind}_stale', name, f'{age:.3f} s old', f'must be within {limit:g} s of now'
            )


class QueryTrigger:
    """When to query: at a rate, and then on the image that completes a set of new ones.

    A timer alone would take images that are up to a frame period old. So would waiting for a set
    that begins after the query fell due, where it falls due amid one. When a camera is late, the
    query goes out without its new image, or tells what is missing. A set waits, but not long, for
    the arm's state of its time: a message of its own may come a little later than the images.

    Args:
        cameras: whose images make a set.
        period_ns: between queries, on average at least.
        state_patience_ns: that a complete set waits for the arm's state.
    """

    PATIENCE_NS = NS // 10  # that a due query waits for a set; a camera of 10 Hz gives one
    START_PATIENCE_NS = NS // 2  # likewise, the first one: streams have yet to be discovered

    def __init__(self, cameras: Sequence[str], period_ns: int, state_patience_ns: int = 0):
        self._cameras = frozenset(cameras)
        self._period_ns, self._state_patience_ns = period_ns, state_patience_ns
        self._patience_ns = self.START_PATIENCE_NS
        self._due_ns = 0
        self._new: set[str] = set()
        self._held_ns: int | None = None  # since when a complete set waits for the arm's state

    def start(self, now_ns: int) -> None:
        """A query is due from now on."""
        self._due_ns, self._patience_ns = now_ns, self.START_PATIENCE_NS
        self._begin_set()

    def image(self, camera: str, now_ns: int) -> bool:
        """An image came; whether it completes a set while a query is due."""
        self._mind_the_clock(now_ns)
        self._new.add(camera)
        complete, due = self._new >= self._cameras, now_ns >= self._due_ns
        if complete and not due:
            self._begin_set()
        return complete and due

    @property
    def is_held(self) -> bool:
        """Whether a complete set waits for the arm's state."""
        return self._held_ns is not None

    def hold(self, now_ns: int) -> bool:
        """The arm's state is older than the images: begin to wait, or go on.

        Returns:
            whether to; False without a complete set, and after `state_patience_ns`.
        """
        if not self._new >= self._cameras:
            return False
        if self._held_ns is None:
            self._held_ns = now_ns
        return 0 <= now_ns - self._held_ns < self._state_patience_ns

    def is_overdue(self, now_ns: int) -> bool:
        """Whether a due query has waited long enough for its set."""
        self._mind_the_clock(now_ns)
        return now_ns - self._due_ns >= self._patience_ns

    def _mind_the_clock(self, now_ns: int) -> None:
        """A clock that was set back would make the next query wait until it has caught up."""
        if now_ns < self._due_ns - self._period_ns:
            self.start(now_ns)

    def queried(self, now_ns: int) -> None:
        """A query went out; the next is due a period after this one was."""
        self._due_ns = max(self._due_ns + self._period_ns, now_ns)
        self._patience_ns = min(self.PATIENCE_NS, self._period_ns // 2)
        self._begin_set()

    def _begin_set(self) -> None:
        self._new.clear()
        self._held_ns = None
