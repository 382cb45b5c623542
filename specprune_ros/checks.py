"""What an observation and an executed action must be; pure functions on arrays."""

from __future__ import annotations

import numpy as np

from specprune_ros.config import RobotConfig
from specprune_ros.errors import ObservationError
from specprune_ros.types import ExecutedAction


def check_instruction(instruction: str) -> None:
    """Refuse an empty instruction.

    Raises:
        ObservationError: instruction_empty.
    """
    if not instruction.strip():
        raise ObservationError('instruction_empty', 'instruction', instruction, 'must say a task')


def check_image(camera: str, image: np.ndarray) -> None:
    """Refuse what is not a [rows, cols, 3] uint8 image with pixels.

    Raises:
        ObservationError: image_shape or image_empty.
    """
    field = f'cameras/{camera}'
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        got = f'{image.dtype} {image.shape}'
        raise ObservationError('image_shape', field, got, 'must be uint8 [rows, cols, 3]')
    if 0 in image.shape:
        raise ObservationError('image_empty', field, image.shape[:2], 'the image has no pixels')


def check_proprio(proprio: np.ndarray | None, width: int) -> None:
    """Refuse anything but `width` finite joint positions; a width of 0 takes anything.

    Raises:
        ObservationError: joint_missing, joint_width or joint_not_finite.
    """
    if not width:
        return
    if proprio is None:
        raise ObservationError('joint_missing', 'joint_states', None, 'no joint state')
    if len(proprio) != width:
        raise ObservationError(
            'joint_width', 'joint_states', f'{len(proprio)} positions', f'must be {width}'
        )
    if not np.isfinite(proprio).all():
        raise ObservationError(
            'joint_not_finite', 'joint_states', np.asarray(proprio).tolist(), 'must be finite'
        )


def executed_displacement(
    action: ExecutedAction, robot: RobotConfig
) -> tuple[np.ndarray, np.ndarray] | None:
    """What an executed action moved, found by the elements' names.

    Returns:
        Translation [3] and rotation [3] per control step, unit 1 (a full command); None for a
        robot whose actions do not say what moved (no translation_names).

    Raises:
        ObservationError: action_names or action_not_finite.
    """
    values = dict(zip(action.names, np.asarray(action.data, float), strict=False))
    wanted = (*robot.translation_names, *robot.rotation_names)
    if not wanted:
        return None
    missing = [name for name in wanted if name not in values]
    if missing:
        raise ObservationError(
            'action_names', 'executed_action.names', action.names, f'lacks {missing}'
        )
    picked = np.array([values[name] for name in wanted])
    if not np.isfinite(picked).all():
        raise ObservationError(
            'action_not_finite',
            'executed_action.data',
            np.asarray(action.data).tolist(),
            'must be finite',
        )
    return picked[:3] / robot.translation_scale, picked[3:] / robot.rotation_scale
