"""Draw which patches a query kept, and why, over the image as the model sees it.

Kept patches are tinted by the reason for which they were kept, layer-pruned ones half as much and
darker, statically pruned ones are dimmed. What lies around the model's crop is dimmed a little. A
one-line legend stands below.
"""

from __future__ import annotations

import cv2
import numpy as np

from specprune_ros.types import Mode, PruneReport, Reason

COLORS = {  # RGB; distinguishable with the common colour-vision deficiencies (Okabe-Ito)
    'global': (0, 114, 178),
    'dynamic': (213, 94, 0),
    'local': (0, 158, 115),
    'several': (240, 228, 66),
    'fill': (204, 121, 167),
}
DIMMED, LAYER_DIMMED = 0.4, 0.7  # brightness of statically and of layer-pruned patches
UNSEEN = 0.7  # brightness of what the model does not see
LEGEND_ROWS = 34
MIN_WIDTH = 448  # smaller images are enlarged, so that the legend can be read
MAX_ROWS = 1024  # to which an image may be enlarged
FONT = cv2.FONT_HERSHEY_SIMPLEX


def draw_overlay(
    image: np.ndarray, report: PruneReport, camera: str, opacity: float = 0.45
) -> np.ndarray:
    """One camera's overlay.

    Args:
        image: [rows, cols, 3] uint8 RGB, the image that the report speaks of, at any size and as
            the camera gave it: it is turned here.
        report: of the query that read the image.
        camera: its name in the report.
        opacity: of the tint on kept patches, 0..1.

    Returns:
        [rows', cols', 3] uint8 RGB, a new array.

    Raises:
        KeyError: the report has no such camera.
    """
    reason, gone = report.camera_grid(camera)
    picture = _enlarged(_as_the_model_sees_it(image, report, camera))
    crop = tuple(_middle(length, report.crop_side) for length in picture.shape[:2])
    seen = picture[crop]
    if report.mode in (Mode.COARSE, Mode.FINE):
        seen = _tinted(seen, reason, gone, report.static_layer, opacity)
    canvas = cv2.convertScaleAbs(picture, alpha=UNSEEN)
    canvas[crop] = seen
    return np.vstack((canvas, _legend(canvas.shape[1], report, camera)))


def _as_the_model_sees_it(image: np.ndarray, report: PruneReport, camera: str) -> np.ndarray:
    """The image, turned as the report says; a report of old says nothing."""
    # Not images.turned: what follows needs a copy, and OpenCV's is ten times faster.
    rotations = dict(zip(report.cameras, report.rotation_deg, strict=False))
    return cv2.rotate(image, cv2.ROTATE_180) if rotations.get(camera) == 180 else image


def _enlarged(image: np.ndarray) -> np.ndarray:
    rows, cols = image.shape[:2]
    if cols >= MIN_WIDTH:
        return np.ascontiguousarray(image)
    scale = max(min(-(-MIN_WIDTH // cols), MAX_ROWS // rows), 1)
    return cv2.resize(image, (cols * scale, rows * scale), interpolation=cv2.INTER_CUBIC)


def _middle(length: int, side: float) -> slice:
    """The middle pixels of a length, as many as the share `side` of it, but at least one."""
    edge = min(round(length * (1.0 - side) / 2), (length - 1) // 2)
    return slice(edge, length - edge)


def _tinted(
    image: np.ndarray, reason: np.ndarray, gone: np.ndarray, static_layer: int, opacity: float
) -> np.ndarray:
    """Blend image * gain + color * weight, both constant within a patch."""
    bits = [int(bit) for bit in (Reason.GLOBAL, Reason.DYNAMIC, Reason.LOCAL)]
    votes = sum((reason & bit > 0).astype(np.int32) for bit in bits)
    color = np.zeros((*reason.shape, 3))
    for bit, name in zip((*bits, int(Reason.FILL)), ('global', 'dynamic', 'local', 'fill'),
                         strict=True):  # fmt: skip
        color[reason & bit > 0] = COLORS[name]
    color[votes > 1] = COLORS['several']
    by_static, by_layer = (gone > 0) & (gone <= static_layer), gone > static_layer
    weight = np.select([by_static, by_layer], [0.0, opacity / 2], opacity)
    gain = np.select([by_static, by_layer], [DIMMED, LAYER_DIMMED - opacity / 4], 1.0 - opacity)
    # In eight bits: images of floating-point numbers take several times as long.
    gain = _spread(np.repeat(255.0 * gain[..., None], 3, axis=2), image.shape)
    tint = _spread(color * weight[..., None], image.shape)
    cv2.multiply(image, gain, dst=gain, scale=1 / 255)
    cv2.add(gain, tint, dst=tint)
    _outline(tint, gone == 0)
    return tint


def _spread(patches: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """[grid rows, grid cols, ...] values 0..255 -> [rows, cols, ...] uint8, patch by patch."""
    down, across = (
        np.arange(pixels) * cells // pixels
        for pixels, cells in zip(shape[:2], patches.shape[:2], strict=True)
    )
    return np.rint(patches).astype(np.uint8).take(across, axis=1).take(down, axis=0)


def _outline(image: np.ndarray, kept: np.ndarray) -> None:
    """White border around every region of patches that survived to the end."""
    mask = _spread(kept, image.shape)
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(image, contours, -1, (255, 255, 255), 1)


def legend_text(report: PruneReport, camera: str) -> str:
    """Mode, patches kept, and latency in one line."""
    index = report.cameras.index(camera)
    total, static, kept = (
        int(counts[index])
        for counts in (report.tokens_total, report.tokens_static, report.tokens_kept)
    )
    return (
        f'{camera} {Mode(report.mode).name.lower()} {total}>{static}>{kept} '
        f'{report.latency_total_s * 1e3:.0f} ms'
    )


def _legend(width: int, report: PruneReport, camera: str) -> np.ndarray:
    band = np.full((LEGEND_ROWS, width, 3), 24, np.uint8)
    text = legend_text(report, camera) + ('  STAND-IN MODEL' if report.stand_in else '')
    cv2.putText(band, text, (4, 13), FONT, 0.42, (255, 255, 255), 1, cv2.LINE_AA)
    at = 4
    for name, color in COLORS.items():
        cv2.rectangle(band, (at, 20), (at + 10, 30), color, -1)
        cv2.putText(band, name, (at + 14, 30), FONT, 0.38, (200, 200, 200), 1, cv2.LINE_AA)
        at += 22 + 8 * len(name)
    cv2.putText(band, 'dark: pruned', (at, 30), FONT, 0.38, (200, 200, 200), 1, cv2.LINE_AA)
    return band
