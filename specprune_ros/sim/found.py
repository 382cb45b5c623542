"""How much a method keeps of the object that the task is about: the simulator knows where it is.

Success tells that a method lost something that was needed, this tells whether it was the object,
and whether static or dynamic pruning took it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from specprune_ros.types import PruneReport

REACH_PATCHES = 1.0  # an object is in the patches this near to its centre, in x and in y


def share_left(
    report: PruneReport, centres: Mapping[str, np.ndarray], size: int
) -> tuple[float, float]:
    """Share of the object's patches that is left, all cameras together.

    Args:
        report: of the query.
        centres: camera -> [2] px to the right and down, where the object is; outside of the image
            or NaN where the camera does not see it.
        size: height and width of the images, px.

    Returns:
        after static pruning, and at the end; NaN where no camera sees the object.
    """
    static, end = [], []
    for camera, centre in centres.items():
        _, went = report.camera_grid(camera)
        if not ((centre >= 0) & (centre < size)).all():
            continue
        near = _near(centre / size, went.shape)
        end += (went[near] == 0).tolist()
        static += ((went[near] == 0) | (went[near] > report.static_layer)).tolist()
    return (float(np.mean(static)), float(np.mean(end))) if end else (np.nan, np.nan)


def _near(centre: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[rows, cols] bool, for a centre [2] in widths and heights of the image."""
    rows, cols = ((np.arange(count) + 0.5) for count in shape)
    off_x, off_y = np.abs(cols - centre[0] * shape[1]), np.abs(rows - centre[1] * shape[0])
    return (off_y <= REACH_PATCHES)[:, None] & (off_x <= REACH_PATCHES)[None]
