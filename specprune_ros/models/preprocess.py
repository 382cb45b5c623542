"""Camera images to model images: what OpenVLA-OFT did to its training data, exactly or fast.

Source: openvla-oft 213c5ff, openvla_utils.py and processing_prismatic.py. Normalisation is the
vision backbone's.
"""

from __future__ import annotations

import io
import math
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache, reduce
from importlib import import_module
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from specprune_ros.errors import ConfigError, MissingDependencyError
from specprune_ros.loading import COMMANDS
from specprune_ros.models.resample import (
    CROP_AREA,
    CROP_SCALE,
    available_cpus,
    bicubic_matrix,
    blocks,
    center_crop,
    contiguous,
    crop_matrix,
    interleaved,
    lanczos3_spans,
    resample,
    resize_lanczos3,
)

JPEG_QUALITY = 95
CHROMA_HALVED = 2  # Pillow's word for 4:2:0
SIZES = 16  # camera sizes whose weights a FastPreprocessor on a CPU remembers

Size = tuple[int, int]  # rows, cols
Staged = tuple[Tensor, ...]  # V images on the device, [H, W, 3] uint8 each, of any sizes


class Preprocessor(Protocol):
    """Makes model images of camera images, in two halves: the host's and the device's.

    What the second does depends on shapes alone, so it can be a part of a recorded query.

    Attributes:
        crop_side: share of a camera image's side that the result shows.
    """

    crop_side: float

    def stage(self, images: Sequence[np.ndarray]) -> Staged:
        """The host's half, for all images that a query needs in one call.

        Args:
            images: [H, W, 3] uint8 RGB each, of any sizes and strides; at least one.

        Returns:
            What `fit` takes, whole or in parts.
        """

    def fit(self, images: Staged) -> Tensor:
        """The device's half: [V, rows, cols, 3] uint8."""

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """Both halves."""


def make_preprocessor(
    mode: str,
    *,
    size: Size,
    center_crop: bool,
    source_size: Size | None,
    device: torch.device,
    skip_at_size: bool = True,
) -> Preprocessor:
    """The preprocessor of a mode.

    Args:
        mode: 'exact' or 'fast'.
        size: rows and columns of the model's images.
        center_crop: whether the model sees the centre 0.9 of the image area only.
        source_size: rows and columns to which an image is shrunk before all else; None: not.
        device: where the result lies.
        skip_at_size: for 'exact', see there.

    Raises:
        ConfigError: there is no such mode.
        MissingDependencyError: 'exact' without Pillow or simplejpeg.
    """
    modes = {'exact': ExactPreprocessor, 'fast': FastPreprocessor}
    if mode not in modes:
        raise ConfigError('model.preprocessing', mode, f'must be one of {", ".join(modes)}')
    settings = {'size': size, 'center_crop': center_crop, 'source_size': source_size}
    if mode == 'exact':
        settings['skip_at_size'] = skip_at_size
    return modes[mode](**settings, device=device)


class _Preprocessor:
    """What both modes are told, and the halves of one that leaves nothing to the device."""

    def __init__(
        self,
        *,
        size: Size = (224, 224),
        center_crop: bool,
        source_size: Size | None = None,
        device: torch.device,
    ):
        self.crop_side = math.sqrt(CROP_AREA) if center_crop else 1.0
        self._size = tuple(size)
        self._center_crop = center_crop
        self._source_size = tuple(source_size) if source_size else None
        self._device = torch.device(device)

    def __call__(self, images: Sequence[np.ndarray]) -> Tensor:
        """See Preprocessor."""
        return self.fit(self.stage(images))

    def fit(self, images: Staged) -> Tensor:
        """See Preprocessor."""
        return torch.stack(images)


# Exact -----------------------------------------------------------------------------------------


class ExactPreprocessor(_Preprocessor):
    """Bit for bit what the reference does with TensorFlow, on the CPU.

    An image goes to `source_size` (bicubic), then through a JPEG round trip and a Lanczos-3
    resize; at last it is cropped. Steps that are not asked for do nothing.

    Of several images, the codecs work side by side, each in a thread. The rest stays in the
    caller's: NumPy's short calls would hand Python's lock to and fro, and lose time by it.

    Args:
        skip_at_size: whether an image that has the model's size skips JPEG too: OpenVLA-OFT's
            scripts skip, OpenVLA's and UniVLA's of LIBERO do not.
        size, center_crop, source_size, device: as for `make_preprocessor`.

    Raises:
        MissingDependencyError: Pillow or simplejpeg is missing.
    """

    def __init__(self, *, skip_at_size: bool = True, **settings):
        super().__init__(**settings)
        self._skip_at_size = skip_at_size
        for package in ('PIL', 'simplejpeg'):
            try:
                import_module(package)
            except ImportError as error:
                raise MissingDependencyError(
                    package, "preprocessing 'exact'", COMMANDS[package], error
                ) from error
        self._pool = ThreadPoolExecutor(available_cpus(), 'preprocess')  # starts threads on demand

    def stage(self, images: Sequence[np.ndarray]) -> Staged:
        """See Preprocessor."""
        each = map if len(images) == 1 else self._pool.map
        results = [self._fit(image) for image in each(self._code, images)]
        return upload(results, self._device)

    def _code(self, image: np.ndarray) -> np.ndarray:
        if self._source_size not in (None, image.shape[:2]):
            image = resize_bicubic(image, self._source_size)
        skipped = self._skip_at_size and image.shape[:2] == self._size
        return image if skipped else jpeg_round_trip(image)

    def _fit(self, image: np.ndarray) -> np.ndarray:
        if image.shape[:2] != self._size:
            image = resize_lanczos3(image, self._size)
        return center_crop(image) if self._center_crop else image


def resize_bicubic(image: np.ndarray, size: Size) -> np.ndarray:
    """Pillow's antialiased bicubic resize, without keeping the aspect: the ALOHA client's step.

    Args:
        image: [H, W, 3] uint8.
        size: (rows, cols) of the result.

    Returns:
        [rows, cols, 3] uint8.
    """
    from PIL import Image

    return np.asarray(
        Image.fromarray(contiguous(image)).resize(size[::-1], Image.Resampling.BICUBIC)
    )


def jpeg_round_trip(image: np.ndarray) -> np.ndarray:
    """What JPEG at quality 95 and 4:2:0 leaves of an image; TensorFlow's in every bit.

    Pillow writes the coefficients that TensorFlow writes, simplejpeg can read them as TensorFlow
    does: with libjpeg's fast integer DCT. Another decoder is off by up to 12 levels.

    Args:
        image: [H, W, 3] uint8.

    Returns:
        [H, W, 3] uint8.

    Source: openvla-oft 213c5ff, openvla_utils.py; TensorFlow decodes with the fast integer DCT.
    """
    import simplejpeg
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(contiguous(image)).save(
        file, 'JPEG', quality=JPEG_QUALITY, subsampling=CHROMA_HALVED
    )
    return simplejpeg.decode_jpeg(file.getbuffer(), fastdct=True, fastupsample=False)


# Fast ------------------------------------------------------------------------------------------


class FastPreprocessor(_Preprocessor):
    """The reference's resize and crop as one linear step, without JPEG and without its roundings.

    Differs from `ExactPreprocessor` by what JPEG and the intermediate roundings change: about one
    level on average, most of it because the reference's decoder darkens red and blue where there
    is texture.

    A CPU skips the zeros of the weights; another device takes the images as they are and does one
    batched product for all of a size, without making the host wait.

    Attributes:
        on_host: whether the host fits the images, as on a CPU; the device's form works there too.

    Args:
        size, center_crop, source_size, device: as for `make_preprocessor`.
    """

    def __init__(self, **settings):
        super().__init__(**settings)
        self.on_host = self._device.type == 'cpu'
        self._blocks = lru_cache(SIZES)(lambda size: blocks(*self._weights(size)))
        self._matrices = cache(self._matrices_of)  # a recorded query reads them at any later time

    def stage(self, images: Sequence[np.ndarray]) -> Staged:
        """See Preprocessor."""
        if self.on_host:
            images = [self._one(image) for image in images]
        return upload(images, self._device)

    def fit(self, images: Staged) -> Tensor:
        """See Preprocessor."""
        if self.on_host:
            return super().fit(images)
        alike = defaultdict(list)
        for index, image in enumerate(images):
            alike[image.shape].append(index)
        fitted: dict[int, Tensor] = {}
        for indices in alike.values():
            stack = torch.stack([images[index] for index in indices])
            fitted.update(zip(indices, self.fitted(stack), strict=True))
        return torch.stack([fitted[index] for index in range(len(images))])

    def fitted(self, stack: Tensor) -> Tensor:
        """Images of one size at the model's.

        Args:
            stack: [M, H, W, 3] uint8 on the device.

        Returns:
            [M, rows, cols, 3] uint8.
        """
        size = tuple(stack.shape[1:3])
        if self._unchanged(size):
            return stack
        values = resample_batch(stack, *self._matrices(size))
        values = values if self._center_crop else values.round_()
        return values.clamp_(0, 255).to(torch.uint8)

    def _one(self, image: np.ndarray) -> np.ndarray:
        size = image.shape[:2]
        if self._unchanged(size):
            return image
        values = resample(image, *self._blocks(size))
        if not self._center_crop:
            np.rint(values, out=values)
        return interleaved(np.clip(values, 0, 255, out=values).astype(np.uint8))

    def _unchanged(self, size: Size) -> bool:
        return size == self._size and not self._center_crop and not self._shrinks(size)

    def _shrinks(self, size: Size) -> bool:
        return self._source_size not in (None, size)

    def _matrices_of(self, size: Size) -> tuple[Tensor, Tensor]:
        """Weights of rows and columns on the device."""
        return tuple(
            torch.from_numpy(weights).to(self._device, torch.float32)
            for weights in self._weights(size)
        )

    def _weights(self, size: Size) -> tuple[np.ndarray, np.ndarray]:
        """[rows, H] and [cols, W] float64: all steps of either axis in one."""
        between = self._source_size if self._shrinks(size) else size
        rows, cols = (
            _axis_weights(*lengths, self._center_crop)
            for lengths in zip(size, between, self._size, strict=True)
        )
        # The crop truncates 255.5 y of y in 0..1, where the pixels here are 0..255.
        return rows * (CROP_SCALE / 255 if self._center_crop else 1), cols


def _axis_weights(length: int, between: int, target: int, crop: bool) -> np.ndarray:
    """[target, length]: bicubic to `between`, Lanczos-3 to `target`, crop; equal sizes skip."""
    steps = [crop_matrix(target) if crop else np.eye(target)]
    if between != target:
        steps.append(lanczos3_spans(between, target).dense())
    if length != between:
        steps.append(bicubic_matrix(length, between))
    return reduce(np.matmul, steps)


def resample_batch(images: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """The same linear map per axis for all images, as two dense products.

    Args:
        images: [V, H, W, 3] uint8.
        rows: [R, H] float32.
        cols: [C, W] float32.

    Returns:
        [V, R, C, 3] float32.
    """
    tall = rows @ images.float().flatten(2)
    planes = tall.unflatten(2, images.shape[2:]).transpose(2, 3)
    return (planes @ cols.T).transpose(2, 3)


def upload(images: Sequence[np.ndarray], device: torch.device) -> Staged:
    """Images of any sizes on the device, by one copy; the host does not wait.

    Pinned memory is what lets a GPU fetch the images while the host goes on; torch keeps it alive
    until then.
    """
    sizes = [image.size for image in images]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device.type == 'cuda')
    for part, image in zip(packed.split(sizes), images, strict=True):
        part.numpy().reshape(image.shape)[:] = contiguous(image)
    parts = packed.to(device, non_blocking=True).split(sizes)
    return tuple(part.view(image.shape) for part, image in zip(parts, images, strict=True))
