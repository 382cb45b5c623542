"""Recordings: rosbag2, video file, or npz observation, read without ROS."""

from __future__ import annotations

from pathlib import Path

from specprune_ros.config import RobotConfig
from specprune_ros.errors import RecordingError
from specprune_ros.recordings.bag import BagRecording
from specprune_ros.recordings.base import Recording
from specprune_ros.recordings.npz import NpzRecording
from specprune_ros.recordings.topics import recorded_cameras
from specprune_ros.recordings.video import VideoRecording

BAG_SUFFIXES = ('.mcap', '.db3')


def open_recording(
    path: str | Path,
    *,
    cameras: dict[str, str] | None = None,
    camera: str = 'side',
    instruction: str = '',
    robot: RobotConfig | None = None,
) -> Recording:
    """Open a recording by what its path is.

    Args:
        path: a rosbag2 folder or file, an .npz, or a video file.
        cameras: camera -> topic, for a bag; empty: the robot's where they can be told, others as
            BagRecording finds them.
        camera: the camera's name, for a video.
        instruction: the task; empty takes the recording's own.
        robot: that was recorded; its topics say which camera is which.

    Raises:
        RecordingError: it does not exist or cannot be read.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise RecordingError(path, 'no such file or folder')
    if path.is_dir() or path.suffix in BAG_SUFFIXES:
        bag = BagRecording(path, cameras, instruction)
        own = recorded_cameras(bag.topics, robot) if robot and not cameras else {}
        taken = {*own.values()}
        others = {c: t for c, t in bag.image_topics.items() if c not in own and t not in taken}
        return BagRecording(path, {**own, **others}, instruction, near=taken) if own else bag
    if path.suffix == '.npz':
        return NpzRecording(path, instruction)
    return VideoRecording(path, camera, instruction)
