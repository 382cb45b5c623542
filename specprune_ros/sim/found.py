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
    """Share of the patches around the object that is left, those of all cameras together.

    Args:
        report: of the query.
        centres: camera -> [2] px to the right and down, where the object is in the image that the
            policy got; outside of it or NaN where the camera does not have it in its view.
        size: height and width of these images, px.

    Returns:
        after static pruning, and at the end; NaN where no camera has the object in its view.
    """
    static, end = [], []
    for camera, centre in centres.items():
        _, went = report.camera_grid(camera)
        seen = _as_the_model_sees(centre / size, report, camera)
        if not ((seen >= 0) & (seen < 1)).all():
            continue
        near = _near(seen, went.shape)
        end += (went[near] == 0).tolist()
        static += ((went[near] == 0) | (went[near] > report.static_layer)).tolist()
    return (float(np.mean(static)), float(np.mean(end))) if end else (np.nan, np.nan)


def _as_the_model_sees(place: np.ndarray, report: PruneReport, camera: str) -> np.ndarray:
    """[2] in widths and heights of the image -> of what is left of it when turned and cropped."""
    turned = dict(zip(report.cameras, report.rotation_deg, strict=False)).get(camera) == 180
    place = 1.0 - place if turned else place
    return (place - 0.5) / report.crop_side + 0.5


def _near(place: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """[rows, cols] bool, for a place [2] in widths and heights of the grid."""
    rows, cols = ((np.arange(count) + 0.5) for count in shape)
    off_x, off_y = np.abs(cols - place[0] * shape[1]), np.abs(rows - place[1] * shape[0])
    return (off_y <= REACH_PATCHES)[:, None] & (off_x <= REACH_PATCHES)[None]
