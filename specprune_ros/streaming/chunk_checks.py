"""What a chunk must be before a row of it may be executed."""

from __future__ import annotations

import numpy as np

from specprune_ros.streaming.config import JOINT_SPACES, StreamerConfig
from specprune_ros.streaming.measured import MAGNITUDE_MAX
from specprune_ros.streaming.refusal import Refusal
from specprune_ros.types import ActionChunk, ActionSpace

STEP_TOLERANCE_S = 1e-6  # a control period goes through messages and floats, not through a clock
FUTURE_S = 0.1  # how far ahead the clock of another machine may be


def rows_of(chunk: ActionChunk, config: StreamerConfig) -> np.ndarray:
    """[L, A] the chunk's rows with their columns in the robot's order, found by name.

    Raises:
        Refusal: chunk_names, chunk_shape, chunk_not_finite, chunk_space, chunk_step_dt,
            chunk_stand_in or chunk_dry_run.
    """
    _check_kind(chunk, config)
    names = config.robot.action_names
    if sorted(chunk.names) != sorted(names):
        raise Refusal('chunk_names', f'chunk of {list(chunk.names)}, not {list(names)}')
    data = np.asarray(chunk.data, float)
    wanted = (config.robot.horizon, len(names))
    if data.shape != wanted or len(chunk.units) != len(names):
        raise Refusal(
            'chunk_shape', f'rows and columns {data.shape}, {len(chunk.units)} units, not {wanted}'
        )
    order = [chunk.names.index(name) for name in names]
    units = tuple(chunk.units[column] for column in order)
    if units != config.robot.per_action('action_units'):
        raise Refusal('chunk_names', f'chunk in units {units}')
    if not (np.abs(data) <= MAGNITUDE_MAX).all():
        raise Refusal('chunk_not_finite', f'an action is not finite, or beyond {MAGNITUDE_MAX:g}')
    return data[:, order]


def _check_kind(chunk: ActionChunk, config: StreamerConfig) -> None:
    robot = config.robot
    if chunk.space != ActionSpace[robot.action_space.upper()]:
        raise Refusal('chunk_space', f'space {chunk.space}, not {robot.action_space}')
    cartesian = robot.action_space not in JOINT_SPACES
    if cartesian and chunk.frame_id != robot.frame_id:
        raise Refusal('chunk_space', f'frame {chunk.frame_id!r}, not {robot.frame_id!r}')
    if not abs(chunk.step_dt_s - robot.step_dt_s) <= STEP_TOLERANCE_S:
        raise Refusal('chunk_step_dt', f'{chunk.step_dt_s:g} s, not {robot.step_dt_s:g}')
    if config.stream.dry_run:
        return
    if chunk.stand_in:
        raise Refusal('chunk_stand_in', 'random stand-in weights made it: needs stream.dry_run')
    if chunk.dry_run:
        raise Refusal('chunk_dry_run', 'marked as not to be executed: needs stream.dry_run')


def check_age(chunk: ActionChunk, now_ns: int, timeout_s: float) -> None:
    """Refuse a chunk that is too old to be used, or that cannot say how old it is.

    Raises:
        Refusal: chunk_stale or chunk_stamp.
    """
    ages = {
        'observation': (now_ns - chunk.observation_stamp_ns) / 1e9,
        'chunk': (now_ns - chunk.stamp_ns) / 1e9,
    }
    for name, age in ages.items():
        if age < -FUTURE_S:
            raise Refusal('chunk_stamp', f'the {name} is stamped {-age:.3f} s in the future')
    if ages['observation'] > timeout_s:
        raise Refusal(
            'chunk_stale',
            f'its observation is {ages["observation"]:.3f} s old, stream.command_timeout_s is '
            f'{timeout_s:g}',
        )


def check_start(chunk: ActionChunk, now_ns: int) -> None:
    """Refuse a chunk whose time to be started is over.

    Raises:
        Refusal: chunk_stale.
    """
    late_s = (now_ns - chunk.stamp_ns) / 1e9 - chunk.valid_for_s
    if not late_s <= 0:
        raise Refusal('chunk_stale', f'it had to be started {late_s:.3f} s ago')
