"""From the model's un-normalised actions to what the robot takes; pure functions on arrays."""

from __future__ import annotations

import numpy as np

from specprune_ros.config import RobotConfig


def to_robot(actions: np.ndarray, robot: RobotConfig) -> np.ndarray:
    """Apply the robot's gripper convention.

    Args:
        actions: [L, A] un-normalised, grippers 0..1 with 1 = open.
        robot: names the grippers and the convention.

    Returns:
        [L, A], a new array where anything changes.

    Source: openvla-oft 213c5ff, robot_utils.py (the sign comes before the inversion, sign(0) = 0).
    """
    if robot.gripper == 'unchanged':
        return actions
    columns = [robot.action_names.index(n) for n in robot.gripper_names if n in robot.action_names]
    converted = actions.copy()
    opening = np.sign(2 * actions[:, columns] - 1)
    converted[:, columns] = opening if robot.gripper == 'open_positive' else -opening
    return converted


def within_limits(actions: np.ndarray, robot: RobotConfig) -> np.ndarray:
    """[L, A] clipped to the robot's action_min and action_max."""
    low, high = (np.array(robot.per_action(name)) for name in ('action_min', 'action_max'))
    return np.clip(actions, low, high)
