"""Which patches a query kept, as coloured points in space: geometry on arrays, no ROS.

The grid lies over the image as the model saw it: turned by `rotation_deg`, then its middle
`crop_side`. Points go the way back, to the pixel of the camera's own image and along its ray.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from specprune_ros.errors import ObservationError
from specprune_ros.overlay import COLORS
from specprune_ros.types import PruneReport, Reason

KEPT, PRUNED = (200, 200, 200), (64, 64, 64)  # RGB of a patch kept without a reason, and of none
MM = 1e-3
POINT = np.dtype([('x', '<f4'), ('y', '<f4'), ('z', '<f4'), ('rgb', '<u4')])
DEPTHS = {'16UC1': np.uint16, 'mono16': np.uint16, '32FC1': np.float32}  # mm, mm, m: REP 118


@dataclass(frozen=True)
class Camera:
    """A pinhole camera without distortion, as a rectified depth image has it.

    Attributes:
        fx, fy: focal lengths in pixels.
        cx, cy: principal point in pixels; 0 is the middle of the first pixel.
        width, height: of the images that these numbers are for.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int

    def scaled_to(self, width: int, height: int) -> Camera:
        """The same camera for its image at another size.

        Raises:
            ObservationError: it is not calibrated.
        """
        if not (self.fx > 0 and self.fy > 0 and self.width > 0 and self.height > 0):
            raise ObservationError('camera_missing', 'camera_info.k', self, 'is not calibrated')
        x, y = width / self.width, height / self.height
        return Camera(
            fx=self.fx * x,
            fy=self.fy * y,
            cx=(self.cx + 0.5) * x - 0.5,
            cy=(self.cy + 0.5) * y - 0.5,
            width=width,
            height=height,
        )


def depth_from(
    encoding: str, height: int, width: int, step: int, data: object, *, big_endian: bool = False
) -> np.ndarray:
    """[height, width] float32 m of a depth image's fields; 0, NaN and infinity stay what they are.

    Raises:
        ObservationError: not a depth encoding, or rows that do not fit the data.
    """
    if encoding not in DEPTHS:
        raise ObservationError(
            'image_encoding', 'depth.encoding', encoding, f'must be one of {", ".join(DEPTHS)}'
        )
    kind = np.dtype(DEPTHS[encoding]).newbyteorder('>' if big_endian else '<')
    raw = np.frombuffer(data, np.uint8)
    row = width * kind.itemsize
    if step < row or len(raw) < step * (height - 1) + row or not height * width:
        got = f'{height}x{width}, step {step}, {len(raw)} bytes'
        raise ObservationError('image_shape', 'depth', got, f'rows need {row} bytes each')
    padded = np.zeros(step * height, np.uint8)
    padded[: min(len(raw), len(padded))] = raw[: len(padded)]
    values = padded.reshape(height, step)[:, :row].copy().view(kind)
    scale = MM if kind.itemsize == 2 else 1.0
    return values.astype(np.float32) * np.float32(scale)


def patch_colors(reason: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """RGB per patch: the overlay's palette for what was kept, dark for what was pruned.

    Args:
        reason: uint8 of any shape, Reason bits.
        pruned: bool of the same shape.

    Returns:
        [*shape, 3] uint8.
    """
    colors = np.broadcast_to(np.array(KEPT, np.uint8), (*reason.shape, 3)).copy()
    votes = np.zeros(reason.shape, int)
    for bit, name in ((Reason.GLOBAL, 'global'), (Reason.DYNAMIC, 'dynamic'),
                      (Reason.LOCAL, 'local'), (Reason.FILL, 'fill')):  # fmt: skip
        is_set = reason & int(bit) > 0
        colors[is_set] = COLORS[name]
        votes += is_set & (bit != Reason.FILL)
    colors[votes > 1] = COLORS['several']
    colors[pruned] = PRUNED
    return colors


def patch_centres(rows: int, cols: int, rotation_deg: int, crop_side: float) -> np.ndarray:
    """Where the patches' centres lie in the camera's own image.

    Returns:
        [rows, cols, 2] float64, x and y as shares of the image's width and height, 0..1.
    """
    down, across = ((np.arange(n) + 0.5) / n for n in (rows, cols))
    centres = np.stack(np.meshgrid(across, down), axis=-1)
    centres = 0.5 + (centres - 0.5) * crop_side
    return 1.0 - centres if rotation_deg == 180 else centres


def patches_at(
    x: np.ndarray, y: np.ndarray, grid: tuple[int, int], rotation_deg: int, crop_side: float
) -> np.ndarray:
    """Which patch covers each place of the camera's own image.

    Args:
        x, y: [n] shares of the image's width and height, 0..1.
        grid: patch rows and columns.
        rotation_deg: 0 or 180.
        crop_side: share of the turned image's side that the grid covers.

    Returns:
        [n] int, row * columns + column; -1 where the model did not look.
    """
    sign = -1.0 if rotation_deg == 180 else 1.0
    down, across = (
        np.floor((sign * (place - 0.5) / crop_side + 0.5) * n).astype(int)
        for place, n in ((y, grid[0]), (x, grid[1]))
    )
    inside = (down >= 0) & (down < grid[0]) & (across >= 0) & (across < grid[1])
    return np.where(inside, down * grid[1] + across, -1)


def token_points(
    report: PruneReport,
    name: str,
    depth_m: np.ndarray,
    camera: Camera,
    *,
    per_pixel: bool = False,
    show_pruned: bool = False,
) -> np.ndarray:
    """Points of one camera in its optical frame: z forward, x right, y down.

    Args:
        report: of the query.
        name: the camera's, in the report.
        depth_m: [rows, cols] float32, distance along the optical axis, aligned with the camera's
            image; not positive or not finite: unknown, which gives no point.
        camera: of the depth image, or of the same view at another size.
        per_pixel: a point per pixel within the model's view, not one per patch centre.
        show_pruned: pruned patches too.

    Returns:
        [n] POINT; rgb is 0x00RRGGBB.

    Raises:
        KeyError: the report has no such camera.
        ObservationError: the camera is not calibrated.
    """
    reason, gone = report.camera_grid(name)
    index = report.cameras.index(name)
    turned, grid = int(report.rotation_deg[index]), reason.shape
    rows, cols = depth_m.shape
    if per_pixel:
        v, u = (axis.ravel() for axis in np.indices((rows, cols)))
        patch = patches_at((u + 0.5) / cols, (v + 0.5) / rows, grid, turned, report.crop_side)
    else:
        centres = patch_centres(*grid, turned, report.crop_side).reshape(-1, 2)
        u = np.minimum((centres[:, 0] * cols).astype(int), cols - 1)
        v = np.minimum((centres[:, 1] * rows).astype(int), rows - 1)
        patch = np.arange(reason.size)
    z = depth_m[v, u]
    pruned = gone.ravel() > 0
    wanted = (patch >= 0) & np.isfinite(z) & (z > 0)
    if not show_pruned:
        wanted &= ~pruned[patch]
    colors = patch_colors(reason, gone > 0).reshape(-1, 3)[patch[wanted]]
    return _points(u[wanted], v[wanted], z[wanted], colors, camera.scaled_to(cols, rows))


def _points(
    u: np.ndarray, v: np.ndarray, z: np.ndarray, colors: np.ndarray, camera: Camera
) -> np.ndarray:
    points = np.empty(len(z), POINT)
    points['x'] = (u - camera.cx) / camera.fx * z
    points['y'] = (v - camera.cy) / camera.fy * z
    points['z'] = z
    red, green, blue = colors.astype(np.uint32).T
    points['rgb'] = red << 16 | green << 8 | blue
    return points
