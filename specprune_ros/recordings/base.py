"""What a recording is: a stream of timed events, whatever file it lies in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from specprune_ros.errors import ObservationError
from specprune_ros.images import CameraImage
from specprune_ros.types import ExecutedAction


@dataclass(frozen=True, eq=False)
class CameraEvent:
    """One camera image, as an array or as it was recorded."""

    stamp_ns: int
    camera: str
    image: np.ndarray | CameraImage


@dataclass(frozen=True, eq=False)
class JointEvent:
    """Joint positions by name, rad or m."""

    stamp_ns: int
    names: tuple[str, ...]
    positions: np.ndarray


@dataclass(frozen=True, eq=False)
class PoseEvent:
    """The end effector's position [3] in m and orientation [4] as x, y, z, w."""

    stamp_ns: int
    position: np.ndarray
    quaternion_xyzw: np.ndarray
    frame_id: str = ''


@dataclass(frozen=True)
class InstructionEvent:
    """The task, from here on."""

    stamp_ns: int
    text: str


# An ObservationError stands for an image that cannot be used, in its place in the stream.
Event = CameraEvent | JointEvent | PoseEvent | InstructionEvent | ExecutedAction | ObservationError


class Recording(Protocol):
    """A recording that can be read again and again.

    Attributes:
        path: the file or folder.
        cameras: names of the cameras in it.
        joint_names: joints in it, in recorded order; empty without joint states.
        has_poses: whether it holds end-effector poses.
        has_actions: whether it holds executed actions.
        duration_s: length.
        control_steps: how many `offline.run_recording` makes of it; an estimate.
    """

    path: str
    cameras: tuple[str, ...]
    joint_names: tuple[str, ...]
    has_poses: bool
    has_actions: bool
    duration_s: float
    control_steps: int

    def events(self) -> Iterator[Event]:
        """All events by ascending stamp.

        Raises:
            RecordingError: the data is damaged from here on.
        """
