"""The newest measured state of the arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specprune_ros.inbox import NORM_TOLERANCE
from specprune_ros.streaming.refusal import Refusal

# Of an action or a measurement in any unit: more is no robot's, and squares of it stay finite.
MAGNITUDE_MAX = 1e6


@dataclass(frozen=True, eq=False)
class Pose:
    """Of the end effector: position [3] m and orientation [4], a unit quaternion x, y, z, w."""

    position: np.ndarray
    quaternion: np.ndarray


class Measured:
    """Joint positions or the end-effector pose, whichever is asked for.

    Args:
        joints: [J] names of the joints that count, found by name in every message.
        max_age_s: older ones count as stale.
    """

    def __init__(self, joints: Sequence[str], max_age_s: float):
        self._names = tuple(joints)
        self._max_age_s = max_age_s
        self.forget()

    def forget(self) -> None:
        """Drop what was measured."""
        self._joints: tuple[int, np.ndarray] | None = None
        self._pose: tuple[int, Pose] | None = None

    def put_joints(
        self, stamp_ns: int, names: Sequence[str], positions: Sequence[float], now_ns: int
    ) -> None:
        """Keep a joint state unless a newer one is there; joints of other devices are ignored.

        Raises:
            Refusal: joint_width, joint_missing, joint_not_finite or joint_stale; the former state
                stays.
        """
        self._check_age('joint', stamp_ns, now_ns)
        if len(names) != len(positions):
            raise Refusal('joint_width', f'{len(names)} names, {len(positions)} positions')
        by_name = dict(zip(names, positions, strict=True))
        missing = [name for name in self._names if name not in by_name]
        if missing:
            raise Refusal('joint_missing', f'joint_states lack {missing}')
        values = np.array([by_name[name] for name in self._names], float)
        if not _usable(values):
            raise Refusal('joint_not_finite', f'joint positions {values.tolist()}')
        if self._joints is None or self._joints[0] <= stamp_ns:
            self._joints = (stamp_ns, values)

    def put_pose(
        self,
        stamp_ns: int,
        position: Sequence[float],
        quaternion_xyzw: Sequence[float],
        now_ns: int,
    ) -> None:
        """Keep an end-effector pose unless a newer one is there.

        Args:
            stamp_ns: when it was measured.
            position: [3] m.
            quaternion_xyzw: [4]; its norm may be off by inbox.NORM_TOLERANCE.
            now_ns: the time.

        Raises:
            Refusal: pose_not_finite, pose_quaternion or pose_stale; the former pose stays.
        """
        self._check_age('pose', stamp_ns, now_ns)
        where, turn = np.array(position, float), np.array(quaternion_xyzw, float)
        if where.shape != (3,) or turn.shape != (4,) or not (_usable(where) and _usable(turn)):
            got = f'position {where.tolist()}, orientation {turn.tolist()}'
            raise Refusal('pose_not_finite', got)
        norm = math.hypot(*turn)
        if abs(norm - 1.0) > NORM_TOLERANCE:
            raise Refusal('pose_quaternion', f'orientation {turn.tolist()} has norm {norm:.4g}')
        if self._pose is None or self._pose[0] <= stamp_ns:
            self._pose = (stamp_ns, Pose(where, turn / norm))

    def joints(self, now_ns: int) -> np.ndarray:
        """[J] rad or m, in the order of the names.

        Raises:
            Refusal: joint_missing or joint_stale.
        """
        return self._fresh('joint', self._joints, now_ns)

    def pose(self, now_ns: int) -> Pose:
        """The pose.

        Raises:
            Refusal: pose_missing or pose_stale.
        """
        return self._fresh('pose', self._pose, now_ns)

    def _fresh(self, kind: str, held: tuple | None, now_ns: int) -> np.ndarray | Pose:
        if held is None:
            raise Refusal(f'{kind}_missing', f'no {kind} state came yet')
        self._check_age(kind, held[0], now_ns)
        return held[1]

    def _check_age(self, kind: str, stamp_ns: int, now_ns: int) -> None:
        age_s = (now_ns - stamp_ns) / 1e9
        # A stamp from the future says as little, and would keep good ones out.
        if not -self._max_age_s <= age_s <= self._max_age_s:
            limit = f'stream.max_state_age_s is {self._max_age_s:g}'
            raise Refusal(f'{kind}_stale', f'the {kind} state is {age_s:.3f} s old, {limit}')


def _usable(values: np.ndarray) -> bool:
    return bool((np.abs(values) <= MAGNITUDE_MAX).all())
