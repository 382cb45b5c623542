"""One observation in an npz file, as a recording that holds still."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from specprune_ros.errors import RecordingError
from specprune_ros.recordings.base import CameraEvent, Event, InstructionEvent, JointEvent

NS = 1_000_000_000
IMAGE_SUFFIX = '_image'
STILL_S, STILL_HZ = 5.0, 10.0  # one observation is repeated for as long, as often


class NpzRecording:
    """Arrays `<camera>_image` [rows, cols, 3] uint8 RGB, `state` [P], `task_description`.

    This is the layout of OpenVLA-OFT's sample observation: `full_image` and `wrist_image` become
    cameras `full` and `wrist`, element i of `state` becomes joint `state_i`.

    Raises:
        RecordingError: not an npz, no image, or an array of another shape or type.
    """

    has_poses = False
    has_actions = False

    def __init__(self, path: Path, instruction: str = ''):
        self.path = str(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except Exception as error:  # zip, inflate and the array header each raise their own
            raise RecordingError(path, f'cannot be read as npz: {error}') from error
        self._images = {
            name.removesuffix(IMAGE_SUFFIX): array
            for name, array in arrays.items()
            if name.endswith(IMAGE_SUFFIX)
        }
        if not self._images:
            raise RecordingError(path, f'has no *{IMAGE_SUFFIX} array, only {sorted(arrays)}')
        for name, array in self._images.items():
            if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
                got = f'{array.dtype} {array.shape}'
                raise RecordingError(path, f'{name}{IMAGE_SUFFIX} is {got}, not uint8 [y, x, 3]')
        state = np.atleast_1d(arrays.get('state', np.zeros(0)))
        if state.ndim != 1 or state.dtype.kind not in 'fiu':
            raise RecordingError(path, f'state is {state.dtype} {state.shape}, not numbers [P]')
        self._state = state.astype(float)
        words = re.sub(r'[_\-\s]+', ' ', path.stem).strip()
        self._instruction = instruction or str(arrays.get('task_description', words))
        self.cameras = tuple(self._images)
        self.joint_names = tuple(f'state_{index}' for index in range(len(self._state)))
        self.duration_s = STILL_S
        self.control_steps = round(STILL_S * STILL_HZ)

    def events(self) -> Iterator[Event]:
        """The instruction, then the same images and state again and again."""
        yield InstructionEvent(0, self._instruction)
        for index in range(round(STILL_S * STILL_HZ)):
            stamp = round(index * NS / STILL_HZ)
            if len(self._state):
                yield JointEvent(stamp, self.joint_names, self._state)
            for name, image in self._images.items():
                yield CameraEvent(stamp, name, image)
