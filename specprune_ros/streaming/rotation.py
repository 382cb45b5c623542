"""Rotations as unit quaternions x, y, z, w."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def from_rotation_vector(vector: Sequence[float]) -> np.ndarray:
    """Quaternion [4] of a rotation about an axis: [3] axis times angle, rad."""
    x, y, z = (float(value) for value in vector)
    angle = math.hypot(x, y, z)
    # sin(a / 2) / a, by its series where the quotient would lose its digits
    share = math.sin(angle / 2) / angle if angle > 1e-6 else 0.5 - angle * angle / 48
    return np.array((x * share, y * share, z * share, math.cos(angle / 2)))


def rotation_vector(quaternion: Sequence[float]) -> np.ndarray:
    """[3] axis times angle, rad, of a unit quaternion: the shorter way, at most pi."""
    x, y, z, w = (float(value) for value in quaternion)
    half = math.hypot(x, y, z)
    # By its series where the quotient would lose its digits; -q is the same rotation.
    share = 2 * math.atan2(half, abs(w)) / half if half > 1e-6 else 2.0
    return math.copysign(share, w) * np.array((x, y, z))


def between(start: Sequence[float], end: Sequence[float]) -> np.ndarray:
    """Rotation vector [3] in the common frame, rad, from one orientation to another."""
    x, y, z, w = start
    return rotation_vector(compose(end, (-x, -y, -z, w)))


def compose(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Quaternion [4] of the rotation `right` followed by `left`, of norm 1."""
    a, b, c, d = (float(value) for value in left)
    e, f, g, h = (float(value) for value in right)
    product = (
        d * e + a * h + b * g - c * f,
        d * f - a * g + b * h + c * e,
        d * g + a * f - b * e + c * h,
        d * h - a * e - b * f - c * g,
    )
    # Without this, rounding lets the norm wander over thousands of steps.
    norm = math.hypot(*product)
    return np.array(product) / norm
