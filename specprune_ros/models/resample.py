"""Resampling of RGB images as TensorFlow and Pillow do it, as weights per output row and column.

All of it is separable: rows first, then columns. `resize_lanczos3` and `center_crop` equal
TensorFlow in every bit; `blocks` and `resample` compute any product of such steps quickly.

Source: openvla-oft 213c5ff, openvla_utils.py; the order of TensorFlow's operations was checked
against TensorFlow 2.15 on images of 17 sizes.
"""

from __future__ import annotations

import ctypes
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def available_cpus() -> int:
    """Cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


F32 = np.float32
CHANNELS = 3
CROP_AREA = 0.9  # share of the image area that the centre crop keeps
CROP_SCALE = 255.5  # the crop's result in 0..1 times this, truncated, is its uint8 value
LOBES = 3  # of the Lanczos kernel on either side
TF_PI = F32(3.14159265359)
TF_CENTER = F32(1e-3)  # TensorFlow takes the kernel as 1 up to this distance
BICUBIC_A = -0.5  # Pillow's
ROWS_PER_BLOCK, COLS_PER_BLOCK = 8, 16  # more waste work on zeros, fewer waste time on calls
BLOCKS_PER_CONVERSION = 4  # of rows: more fall out of the cache, fewer convert the overlaps anew
# OpenBLAS keeps a product of so few multiplications on the calling thread. On a busy machine,
# threads that wait for each other inside a larger one made it 25 times slower.
PRODUCT_SIZE = 2**18 if available_cpus() > 1 else 2**62
UNSURE_SHARE = 1 / 16  # of values; beyond it, computing all of them in order is quicker
_MEMORY = threading.local()
TABLES = 32  # sizes whose tables are remembered


@dataclass(frozen=True, eq=False)
class Spans:
    """One axis of a filter: every target is a weighted sum of consecutive sources.

    Attributes:
        length: number of sources.
        first: [M] first source of each target.
        weights: [M, taps] float32, 0 past the last source of a target.
    """

    length: int
    first: np.ndarray
    weights: np.ndarray

    @property
    def taps(self) -> int:
        """Most sources of a target."""
        return self.weights.shape[1]

    def sources(self, tap: int | np.ndarray) -> np.ndarray:
        """Index of each target's source number `tap`; a valid one where its weight is 0."""
        return np.minimum(self.first + tap, self.length - 1)

    def dense(self) -> np.ndarray:
        """[M, length] float64."""
        matrix = np.zeros((len(self.first), self.length))
        targets = np.arange(len(self.first))
        for tap in range(self.taps):
            matrix[targets, self.sources(tap)] += self.weights[:, tap]
        return matrix


def contiguous(image: np.ndarray) -> np.ndarray:
    """An [H, W, 3] image itself, or a copy if it is padded, mirrored, or turned.

    NumPy copies a mirrored image five times as fast if told to go channel by channel.
    """
    if image.flags.c_contiguous:
        return image
    copy = np.empty(image.shape, image.dtype)
    for channel in range(CHANNELS):
        copy[..., channel] = image[..., channel]
    return copy


# Lanczos-3 -------------------------------------------------------------------------------------


@lru_cache(maxsize=TABLES)
def lanczos3_spans(length: int, target: int) -> Spans:
    """Weights of TensorFlow's antialiased Lanczos-3 resize of one axis, in its float32 arithmetic.

    Args:
        length: pixels of the image along the axis.
        target: pixels of the result.
    """
    inverse_scale = F32(1 / float(F32(target) / F32(length)))
    kernel_scale = max(inverse_scale, F32(1))
    centers = (np.arange(target, dtype=F32) + F32(0.5)) * inverse_scale
    reach = F32(LOBES) * kernel_scale
    bounds = np.ceil(centers - reach - F32(0.5)), np.floor(centers + reach - F32(0.5))
    first, last = (np.clip(bound, 0, length - 1).astype(np.int64) for bound in bounds)
    sources = first[:, None] + np.arange((last - first).max() + 1)
    distance = np.abs(sources.astype(F32) + F32(0.5) - centers[:, None])
    weights = _lanczos3(distance * (F32(1) / kernel_scale))
    weights[sources > last[:, None]] = 0
    total = np.add.accumulate(weights, axis=1)[:, -1:]  # in order, unlike sum()
    return Spans(length, first, weights * (F32(1) / total))


def _lanczos3(x: np.ndarray) -> np.ndarray:
    """3 sin(πx) sin(πx/3) / (πx)² of float32 x >= 0, rounded after each operation."""
    inside = np.maximum(x, TF_CENTER)
    angle = TF_PI * inside
    value = F32(LOBES) * _sinf(angle) * _sinf(angle / F32(LOBES))
    value = value / (TF_PI * TF_PI * inside * inside)
    return np.where(x > LOBES, F32(0), np.where(x <= TF_CENTER, F32(1), value))


def _sinf(x: np.ndarray) -> np.ndarray:
    """Float32 sine of the C library, which is what TensorFlow calls.

    NumPy's own differs from it in the last bit of 14 % of values, a rounded float64 sine of 1.4 %;
    either changes a few pixels in a million.
    """
    sine = ctypes.CDLL(None).sinf
    sine.restype, sine.argtypes = ctypes.c_float, (ctypes.c_float,)
    return np.fromiter(map(sine, x.ravel().tolist()), F32, x.size).reshape(x.shape)


def resize_lanczos3(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Antialiased Lanczos-3 resize without keeping the aspect, equal to TensorFlow in every bit.

    Rounding, half to even, hides the float error of almost every value. The few that lie closer
    to a half than two float32 evaluations can differ are evaluated again in TensorFlow's order.

    Args:
        image: [H, W, 3] uint8.
        size: (rows, cols) of the result.

    Returns:
        [rows, cols, 3] uint8.

    Source: tf.image.resize (lanczos3, antialias), as openvla-oft calls it.
    """
    plan = _lanczos3_plan(image.shape[:2], size)
    values = resample(image, plan.row_blocks, plan.col_blocks)
    np.clip(values, 0, 255, out=values)
    rounded = np.rint(values)
    result = rounded.astype(np.uint8)
    np.subtract(values, rounded, out=values)
    unsure = np.flatnonzero(np.abs(values, out=values) >= 0.5 - plan.error)
    if unsure.size > UNSURE_SHARE * values.size:
        return _rounded(resize_lanczos3_in_order(image, size))
    result.reshape(-1)[unsure] = _rounded(_values_in_order(image, plan.rows, plan.cols, unsure))
    return interleaved(result)


def resize_lanczos3_in_order(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """As `resize_lanczos3`, with every float32 operation in TensorFlow's order: slow.

    Returns:
        [rows, cols, 3] float32, not rounded.
    """
    rows, cols = lanczos3_spans(image.shape[0], size[0]), lanczos3_spans(image.shape[1], size[1])
    tall = _sum_in_order(rows, image)
    turned = np.ascontiguousarray(tall.transpose(1, 0, 2))
    return _sum_in_order(cols, turned).transpose(1, 0, 2)


def _sum_in_order(spans: Spans, pixels: np.ndarray) -> np.ndarray:
    """[length, N, 3] -> [M, N, 3] float32: multiply and add tap after tap, never fused."""
    total = np.zeros((len(spans.first), *pixels.shape[1:]), F32)
    for tap in range(spans.taps):
        total += spans.weights[:, tap, None, None] * pixels[spans.sources(tap)]
    return total


def _values_in_order(image: np.ndarray, rows: Spans, cols: Spans, where: np.ndarray) -> np.ndarray:
    """[N] float32 values of `resize_lanczos3_in_order` at flat indices of `resample`'s result."""
    row, channel, col = np.unravel_index(where, (len(rows.first), CHANNELS, len(cols.first)))
    source_cols = np.minimum(cols.first[col, None] + np.arange(cols.taps), cols.length - 1)
    offsets = source_cols * CHANNELS + channel[:, None]
    pixels = contiguous(image).reshape(-1)
    tall = np.zeros(offsets.shape, F32)
    for tap in range(rows.taps):
        start = rows.sources(tap)[row] * (cols.length * CHANNELS)
        tall += rows.weights[row, tap, None] * pixels[start[:, None] + offsets]
    total = np.zeros(len(where), F32)
    for tap in range(cols.taps):
        total += cols.weights[col, tap] * tall[:, tap]
    return total


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class _Lanczos3Plan:
    """What `resize_lanczos3` needs for images of one size; `error` as in `_largest_difference`."""

    rows: Spans
    cols: Spans
    row_blocks: tuple[Block, ...]
    col_blocks: tuple[Block, ...]
    error: float


@lru_cache(maxsize=TABLES)
def _lanczos3_plan(source: tuple[int, int], size: tuple[int, int]) -> _Lanczos3Plan:
    rows, cols = (lanczos3_spans(*lengths) for lengths in zip(source, size, strict=True))
    row_blocks, col_blocks = blocks(rows.dense(), cols.dense())
    return _Lanczos3Plan(rows, cols, row_blocks, col_blocks, _largest_difference(rows, cols))


def _largest_difference(rows: Spans, cols: Spans) -> float:
    """How far two float32 evaluations of a resize can lie apart, whatever their order.

    A sum of n products is off by at most γ(n) Σ|w x|, with γ(n) = n u / (1 - n u) and u = 2⁻²⁴
    (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1).
    """
    tall = _gain(rows) * 255
    tall_error = _gamma(rows.taps) * tall
    error = _gain(cols) * (_gamma(cols.taps) * (tall + tall_error) + tall_error)
    return 2 * error


def _gain(spans: Spans) -> float:
    return float(np.abs(spans.weights.astype(float)).sum(axis=1).max())


def _gamma(terms: int) -> float:
    return terms * 2.0**-24 / (1 - terms * 2.0**-24)


# Bicubic ---------------------------------------------------------------------------------------


def bicubic_matrix(length: int, target: int) -> np.ndarray:
    """[target, length] float64 weights of Pillow's antialiased bicubic resize of one axis."""
    scale = length / target
    kernel_scale = max(scale, 1.0)
    centers = (np.arange(target) + 0.5) * scale
    x = np.abs(np.arange(length) + 0.5 - centers[:, None]) / kernel_scale
    near = ((BICUBIC_A + 2) * x - (BICUBIC_A + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * BICUBIC_A
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)


# Centre crop -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CropSamples:
    """One axis of the crop: between which two pixels each target lies.

    Attributes:
        low, high: [M] the two pixels.
        fraction: [M] float32, 0 at `low`, 1 at `high`.
    """

    low: np.ndarray
    high: np.ndarray
    fraction: np.ndarray


@lru_cache(maxsize=TABLES)
def crop_samples(length: int) -> CropSamples:
    """Bilinear samples of the centre crop, as many as there are pixels, in float32.

    They run from border pixel to border pixel of the box, as tf.image.crop_and_resize has it.
    """
    side = np.sqrt(F32(CROP_AREA))
    start = (F32(1) - side) / F32(2)
    step = ((start + side) - start) * F32(length - 1) / F32(max(length - 1, 1))
    positions = start * F32(length - 1) + np.arange(length, dtype=F32) * step
    low = np.floor(positions)
    return CropSamples(low.astype(np.int64), np.ceil(positions).astype(np.int64), positions - low)


def crop_matrix(length: int) -> np.ndarray:
    """[length, length] float64 weights of the centre crop of one axis."""
    samples, targets = crop_samples(length), np.arange(length)
    matrix = np.zeros((length, length))
    matrix[targets, samples.low] += 1 - samples.fraction.astype(float)
    matrix[targets, samples.high] += samples.fraction
    return matrix


def center_crop(image: np.ndarray) -> np.ndarray:
    """The centre 0.9 of the area, enlarged to the image's size; TensorFlow's in every bit.

    Args:
        image: [H, W, 3] uint8.

    Returns:
        [H, W, 3] uint8, trunc(255.5 y) of the bilinear result y in 0..1.

    Source: tf.image.crop_and_resize, as openvla-oft calls it.
    """
    rows, cols = crop_samples(len(image)), _pixelwise(image.shape[1])
    pixels = contiguous(image).reshape(len(image), -1).astype(F32)
    pixels *= F32(1 / 255)
    wide = _between(pixels.take(cols.low, axis=1), pixels.take(cols.high, axis=1), cols.fraction)
    values = _between(wide[rows.low], wide[rows.high], rows.fraction[:, None])
    np.clip(values, 0, 1, out=values)
    values *= F32(CROP_SCALE)
    return values.astype(np.uint8).reshape(image.shape)


def _between(low: np.ndarray, high: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """low + (high - low) fraction; overwrites `high`."""
    high -= low
    high *= fraction
    high += low
    return high


@lru_cache(maxsize=TABLES)
def _pixelwise(length: int) -> CropSamples:
    """Crop samples of interleaved RGB columns."""
    samples, channel = crop_samples(length), np.arange(CHANNELS)
    low, high = (
        (pixel[:, None] * CHANNELS + channel).reshape(-1) for pixel in (samples.low, samples.high)
    )
    return CropSamples(low, high, samples.fraction.repeat(CHANNELS))


# Any linear map --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Block:
    """Consecutive targets of one axis, and the sources that have weight in any of them.

    Attributes:
        targets, sources: along the axis.
        weights: float32, [targets, sources] for rows, [sources, targets] for columns.
    """

    targets: slice
    sources: slice
    weights: np.ndarray


def blocks(rows: np.ndarray, cols: np.ndarray) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """Cut banded matrices along their diagonals, so that a product skips most of the zeros.

    Args:
        rows: [R, H] weights.
        cols: [C, W] weights.

    Returns:
        Blocks of the rows and of the columns, as `resample` takes them.
    """
    return (
        tuple(Block(*band) for band in _diagonal(rows, ROWS_PER_BLOCK)),
        tuple(
            Block(targets, sources, np.ascontiguousarray(weights.T))
            for targets, sources, weights in _diagonal(cols, COLS_PER_BLOCK)
        ),
    )


def _diagonal(matrix: np.ndarray, size: int) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Targets, sources and [targets, sources] weights of every `size` targets."""
    for start in range(0, len(matrix), size):
        part = matrix[start : start + size]
        used = np.flatnonzero(part.any(axis=0))
        sources = slice(int(used[0]), int(used[-1]) + 1)
        yield (
            slice(start, start + len(part)),
            sources,
            np.ascontiguousarray(part[:, sources], F32),
        )


def resample(image: np.ndarray, rows: tuple[Block, ...], cols: tuple[Block, ...]) -> np.ndarray:
    """Apply a linear map per axis; no element goes through more than two float32 sums.

    The columns' products are of colour planes: of pixels, they would have three times the terms.

    Args:
        image: [H, W, 3] uint8, of any strides.
        rows, cols: from `blocks`.

    Returns:
        [R, 3, C] float32; `interleaved` makes an image of it.
    """
    pixels = contiguous(image).reshape(len(image), -1)
    tall = _scratch('tall', (rows[-1].targets.stop, pixels.shape[1]))
    for start in range(0, len(rows), BLOCKS_PER_CONVERSION):
        group = rows[start : start + BLOCKS_PER_CONVERSION]
        first, last = group[0].sources.start, max(block.sources.stop for block in group)
        source = _scratch('source', (last - first, pixels.shape[1]))
        np.copyto(source, pixels[first:last])
        for block in group:
            shifted = slice(block.sources.start - first, block.sources.stop - first)
            for part in _parts(pixels.shape[1], block.weights.size):
                np.matmul(block.weights, source[shifted, part], out=tall[block.targets, part])
    planes = _scratch('planes', (len(tall), CHANNELS, image.shape[1]))
    np.copyto(planes, tall.reshape(len(tall), -1, CHANNELS).transpose(0, 2, 1))
    lines = planes.reshape(len(tall) * CHANNELS, -1)
    result = np.empty((len(lines), cols[-1].targets.stop), F32)
    for block in cols:
        for part in _parts(len(lines), block.weights.size):
            np.matmul(lines[part, block.sources], block.weights, out=result[part, block.targets])
    return result.reshape(-1, CHANNELS, result.shape[1])


def _scratch(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 memory of this thread, overwritten by the next call with the name.

    Fresh arrays of this size come from the operating system page by page: up to 1 ms an image.
    """
    size = math.prod(shape)
    memory = getattr(_MEMORY, name, None)
    if memory is None or memory.size < size:
        memory = np.empty(size, F32)
        setattr(_MEMORY, name, memory)
    return memory[:size].reshape(shape)


def interleaved(planes: np.ndarray) -> np.ndarray:
    """[R, 3, C] -> [R, C, 3]."""
    return np.stack([planes[:, channel] for channel in range(CHANNELS)], axis=-1)


def _parts(length: int, weights: int) -> list[slice]:
    """Slices of 0..length, so that each times the weights is at most PRODUCT_SIZE."""
    step = max(PRODUCT_SIZE // weights, 1)
    return [slice(start, start + step) for start in range(0, length, step)]
