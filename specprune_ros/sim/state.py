"""What the simulator knows at one control step, as plain numbers.

Poses are in the world frame of LIBERO: x away from the robot, y to its left, z up, in m.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from specprune_ros.errors import ConfigError
from specprune_ros.inbox import POSE_NAMES, axis_angle

ARM_JOINTS = tuple(f'panda_joint{index}' for index in range(1, 8))
FINGER_JOINTS = ('panda_finger_joint1', 'panda_finger_joint2')
JOINTS = ARM_JOINTS + FINGER_JOINTS
PROPRIO_NAMES = JOINTS + POSE_NAMES
# What one action commands; LIBERO's OSC_POSE controller takes each in -1..1, gripper +1 = close.
ACTION_NAMES = ('x', 'y', 'z', 'roll', 'pitch', 'yaw', 'gripper')
METRES_PER_UNIT = 0.05
RADIANS_PER_UNIT = 0.5
OPEN, CLOSE = -1.0, 1.0
STEP_NS = 50_000_000  # 20 Hz


@dataclass(frozen=True, eq=False, kw_only=True)
class SimState:
    """One control step; nothing of it but the proprioception is known to a policy.

    Attributes:
        step: control steps since the episode began.
        joints: [9] of JOINTS, rad, fingers in m. The second finger counts negative, as in
            robosuite and in the data that LIBERO's checkpoints were trained on.
        hand: [3] point between the fingertips.
        hand_xyzw: [4] its orientation.
        places: name -> [3] of every object, and of every region that a goal can name.
    """

    step: int
    joints: np.ndarray
    hand: np.ndarray
    hand_xyzw: np.ndarray
    places: Mapping[str, np.ndarray]

    def proprio(self, names: tuple[str, ...] = PROPRIO_NAMES) -> np.ndarray | None:
        """Values of joints and elements of the end-effector pose; None when none is asked for.

        Args:
            names: out of PROPRIO_NAMES.

        Returns:
            [P] rad or m, in the order of `names`.

        Raises:
            ConfigError: see `check_names`.
        """
        if not names:
            return None
        check_names(names)
        values = (*self.joints, *self.hand, *axis_angle(self.hand_xyzw))
        known = dict(zip(PROPRIO_NAMES, values, strict=True))
        return np.array([known[name] for name in names])


def check_names(names: tuple[str, ...]) -> None:
    """Nothing, when the simulated robot has all of it.

    Raises:
        ConfigError: a name is not in PROPRIO_NAMES.
    """
    unknown = [name for name in names if name not in PROPRIO_NAMES]
    if unknown:
        raise ConfigError(
            'robot.joint_names', unknown, f'the simulated robot has {list(PROPRIO_NAMES)}'
        )
