"""Recordings: rosbag2, video file, or npz observation, read without ROS."""

from __future__ import annotations

from pathlib import Path

from specprune_ros.errors import RecordingError
from specprune_ros.recordings.bag import BagRecording
from specprune_ros.recordings.base import Recording
from specprune_ros.recordings.npz import NpzRecording
from specprune_ros.recordings.video import VideoRecording

BAG_SUFFIXES = ('.mcap', '.db3')


def open_recording(
    path: str | Path,
    *,
    cameras: dict[str, str] | None = None,
    camera: str = 'side',
    instruction: str = '',
) -> Recording:
    """Open a recording by what its path is.

    Args:
        path: a rosbag2 folder or file, an .npz, or a video file.
        cameras: camera -> topic, for a bag.
        camera: the camera's name, for a video.
        instruction: the task; empty takes the recording's own.

    Raises:
        RecordingError: it does not exist or cannot be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise RecordingError(path, 'no such file or folder')
    if path.is_dir() or path.suffix in BAG_SUFFIXES:
        return BagRecording(path, cameras, instruction)
    if path.suffix == '.npz':
        return NpzRecording(path, instruction)
    return VideoRecording(path, camera, instruction)
