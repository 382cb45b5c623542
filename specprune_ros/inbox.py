"""The newest value of every input, and the observation they make. No ROS, no torch.

Latest-value slots, not queues: a robot acts on what is, not on what was. Bad values are refused
where they come in, so that they are counted one by one and never replace a good one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from specprune_ros.checks import check_instruction
from specprune_ros.config import RobotConfig, RuntimeConfig
from specprune_ros.errors import ObservationError
from specprune_ros.images import CameraImage
from specprune_ros.types import Observation

NS = 1_000_000_000
INFINITY = float('inf')


class Inbox:
    """Newest image per camera, joint state and instruction of one robot.

    Args:
        robot: what belongs to it; images and joints of anything else are ignored.
        runtime: how old inputs may be; None takes them at any age.
    """

    def __init__(self, robot: RobotConfig, runtime: RuntimeConfig | None):
        self._robot = robot
        self._limits_s = {'camera': INFINITY, 'joint': INFINITY}
        if runtime is not None:
            self._limits_s = {
                'camera': runtime.max_image_age_s,
                'joint': runtime.max_joint_age_s,
            }
        self._images: dict[str, tuple[int, np.ndarray | CameraImage]] = {}
        self._joints: tuple[int, np.ndarray] | None = None
        self._instruction: str | None = None

    @property
    def has_task(self) -> bool:
        """Whether an instruction came."""
        return self._instruction is not None

    @property
    def images(self) -> Mapping[str, np.ndarray | CameraImage]:
        """Camera -> its newest image, as it came."""
        return {name: image for name, (_, image) in self._images.items()}

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
        if not self._robot.joint_names:
            return
        if len(names) != len(positions):
            got = f'{len(names)} names, {len(positions)} positions'
            raise ObservationError('joint_width', 'joint_states', got, 'must be as many')
        by_name = dict(zip(names, positions, strict=True))
        missing = [name for name in self._robot.joint_names if name not in by_name]
        if missing:
            raise ObservationError(
                'joint_missing', 'joint_states.name', list(names), f'lacks {missing}'
            )
        values = np.array([by_name[name] for name in self._robot.joint_names], float)
        if not np.isfinite(values).all():
            bad = {n: v for n, v in by_name.items() if not np.isfinite(v)}
            raise ObservationError(
                'joint_not_finite', 'joint_states.position', bad, 'must be finite'
            )
        self._joints = (stamp_ns, values)

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
        """Drop images and joint state, as when the node stops; the instruction stays."""
        self._images.clear()
        self._joints = None

    def age_s(self, now_ns: int) -> dict[str, float]:
        """Input -> seconds since its stamp; infinity for one that never came."""
        stamps = {f'cameras/{name}': None for name in self._robot.camera_names}
        stamps |= {f'cameras/{name}': stamp for name, (stamp, _) in self._images.items()}
        if self._robot.joint_names:
            stamps['joint_states'] = self._joints[0] if self._joints else None
        return {
            name: INFINITY if stamp is None else (now_ns - stamp) / NS
            for name, stamp in stamps.items()
        }

    def observation(self, now_ns: int) -> Observation:
        """All inputs together.

        Raises:
            ObservationError: an input never came, or is older than allowed.
        """
        if self._instruction is None:
            raise ObservationError(
                'instruction_missing', 'instruction', None, 'no instruction came yet'
            )
        for name, age in self.age_s(now_ns).items():
            self._check_age(name, age)
        stamps = [stamp for stamp, _ in self._images.values()]
        if self._joints:
            stamps.append(self._joints[0])
        return Observation(
            images=self.images,
            proprio=self._joints[1] if self._robot.joint_names else None,
            instruction=self._instruction,
            stamp_ns=min(stamps),
            image_stamps_ns={name: stamp for name, (stamp, _) in self._images.items()},
        )

    def _check_age(self, name: str, age: float) -> None:
        kind = 'joint' if name == 'joint_states' else 'camera'
        limit = self._limits_s[kind]
        if age == INFINITY:
            raise ObservationError(f'{kind}_missing', name, None, 'nothing came yet')
        if not -limit <= age <= limit:  # from the future: the clock jumped back
            raise ObservationError(
                f'{kind}_stale', name, f'{age:.3f} s old', f'must be within {limit:g} s of now'
            )
