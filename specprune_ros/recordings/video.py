"""A video file as a recording of one camera."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import cv2

from specprune_ros.errors import RecordingError
from specprune_ros.recordings.base import CameraEvent, Event, InstructionEvent

NS = 1_000_000_000
MAX_FPS = 1000.0


class VideoRecording:
    """One camera from a video; no joint states, no poses, no executed actions.

    Args:
        path: anything that OpenCV reads.
        camera: the camera's name.
        instruction: the task; empty takes the file's name as words.

    Raises:
        RecordingError: not readable as a video.
    """

    joint_names: tuple[str, ...] = ()
    has_poses = False
    has_actions = False

    def __init__(self, path: Path, camera: str = 'side', instruction: str = ''):
        self.path = str(path)
        self.cameras = (camera,)
        self._instruction = instruction or re.sub(r'[_\-\s]+', ' ', path.stem).strip()
        capture = self._open()
        fps = capture.get(cv2.CAP_PROP_FPS)
        frames = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        readable, _ = capture.read()
        capture.release()
        if not readable or not 0 < fps <= MAX_FPS:
            raise RecordingError(path, f'no readable frame (fps {fps:g}, {frames:g} frames)')
        self._period_ns = round(NS / fps)
        self.duration_s = frames / fps
        self.control_steps = int(frames)

    def events(self) -> Iterator[Event]:
        """The instruction, then every frame."""
        yield InstructionEvent(0, self._instruction)
        capture = self._open()
        try:
            index = 0
            while True:
                good, frame = capture.read()
                if not good:
                    return
                image = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                yield CameraEvent(index * self._period_ns, self.cameras[0], image)
                index += 1
        finally:
            capture.release()

    def _open(self) -> cv2.VideoCapture:
        capture = cv2.VideoCapture(self.path)
        if not capture.isOpened():
            raise RecordingError(self.path, 'OpenCV cannot read it as a video')
        return capture
