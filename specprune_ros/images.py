"""Camera images of any common encoding to RGB arrays, without ROS and without cv_bridge.

Works on the fields of sensor_msgs/Image and CompressedImage, wherever they come from: rclpy, a bag
reader, a test. OpenCV converts what NumPy cannot; cv_bridge is not used, because its apt build
fails under NumPy 2 and misreads padded rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from specprune_ros.errors import MissingDependencyError, ObservationError

# encoding -> bytes per pixel
_CHANNELS = {'rgb8': 3, 'bgr8': 3, 'rgba8': 4, 'bgra8': 4, 'mono8': 1, '8UC1': 1, '8UC3': 3}
# encoding -> OpenCV's conversion to RGB
_CONVERSIONS = {
    'bgr8': 'COLOR_BGR2RGB',
    '8UC3': 'COLOR_BGR2RGB',
    'rgba8': 'COLOR_RGBA2RGB',
    'bgra8': 'COLOR_BGRA2RGB',
    'mono8': 'COLOR_GRAY2RGB',
    '8UC1': 'COLOR_GRAY2RGB',
    # OpenCV names a Bayer pattern by its second row, ROS by its first.
    'bayer_rggb8': 'COLOR_BayerBG2RGB',
    'bayer_bggr8': 'COLOR_BayerRG2RGB',
    'bayer_gbrg8': 'COLOR_BayerGR2RGB',
    'bayer_grbg8': 'COLOR_BayerGB2RGB',
    'uyvy': 'COLOR_YUV2RGB_UYVY',
    'yuv422': 'COLOR_YUV2RGB_UYVY',
    'yuyv': 'COLOR_YUV2RGB_YUYV',
    'yuv422_yuy2': 'COLOR_YUV2RGB_YUYV',
}
_HALVED = ('uyvy', 'yuv422', 'yuyv', 'yuv422_yuy2')  # colour at half the horizontal resolution
_BYTES = {
    **_CHANNELS,
    **{name: 1 for name in _CONVERSIONS if name.startswith('bayer')},
    **dict.fromkeys(_HALVED, 2),
}
# how a file begins -> how it ends
END_MARKERS = {b'\xff\xd8\xff': b'\xff\xd9', b'\x89PNG': b'IEND\xaeB`\x82'}
PNG_BITS_AT = 24  # byte of a PNG that says how many bits a channel has
TAIL_BYTES = 4096  # in which the end must lie; some cameras pad with zeros
ENCODINGS = tuple(sorted(_BYTES))


@dataclass(frozen=True, eq=False)
class RawImage:
    """An uncompressed image as it came; `rgb` converts it.

    Attributes:
        field: the input's name, for error messages.
        step: bytes per row, padding included.

    Raises:
        ObservationError: unknown encoding, no pixels, a row shorter than its pixels, or a buffer
            shorter than its rows.
    """

    field: str
    encoding: str
    height: int
    width: int
    step: int
    data: object  # a buffer of bytes

    def __post_init__(self) -> None:
        if self.encoding not in _BYTES:
            raise ObservationError(
                'image_encoding',
                f'{self.field}.encoding',
                self.encoding,
                f'must be one of {", ".join(ENCODINGS)}',
            )
        if self.height == 0 or self.width == 0:
            raise ObservationError(
                'image_empty',
                f'{self.field}.height x width',
                f'{self.height}x{self.width}',
                'the image has no pixels',
            )
        row = self.width * _BYTES[self.encoding]
        if self.step < row:
            raise ObservationError(
                'image_step', f'{self.field}.step', self.step, f'a row has {row} bytes'
            )
        size, needed = memoryview(self.data).nbytes, self.step * (self.height - 1) + row
        if size < needed:
            raise ObservationError(
                'image_truncated', f'{self.field}.data', f'{size} bytes', f'needs {needed}'
            )
        if self.encoding in _HALVED and self.width % 2:
            raise ObservationError(
                'image_encoding',
                f'{self.field}.width',
                self.width,
                f'must be even: two pixels of {self.encoding} share their colour',
            )

    def rgb(self) -> np.ndarray:
        """[height, width, 3] uint8; a view of the buffer for rgb8, else converted."""
        depth = _BYTES[self.encoding]
        flat = np.frombuffer(self.data, np.uint8)
        pixels = np.lib.stride_tricks.as_strided(
            flat, (self.height, self.width, depth), (self.step, depth, 1)
        )
        if self.encoding == 'rgb8':
            return pixels
        contiguous = np.ascontiguousarray(pixels[..., 0] if depth == 1 else pixels)
        cv2 = _opencv()
        return cv2.cvtColor(contiguous, getattr(cv2, _CONVERSIONS[self.encoding]))


@dataclass(frozen=True, eq=False)
class CompressedImage:
    """A JPEG or PNG as it came; `rgb` decodes it.

    Raises:
        ObservationError: no data, depth or a PNG of 16 bits, or (from `rgb`) data that does not
            decode.
    """

    field: str
    format: str
    data: object  # a buffer of bytes

    def __post_init__(self) -> None:
        if memoryview(self.data).nbytes == 0:
            raise ObservationError(
                'image_empty', f'{self.field}.data', '0 bytes', 'the image has no data'
            )
        if 'compressedDepth' in self.format:
            raise ObservationError(
                'image_encoding',
                f'{self.field}.format',
                self.format,
                'depth is not a colour image',
            )
        if self._bits_per_channel() > 8:
            # OpenCV would scale it down: depth in mm becomes an almost black picture.
            raise ObservationError(
                'image_color',
                f'{self.field}.data',
                f'{self._bits_per_channel()} bits per channel',
                'colours have 8; depth is not a colour image',
            )

    def rgb(self) -> np.ndarray:
        """[rows, cols, 3] uint8."""
        cv2 = _opencv()
        image = None
        if self._is_whole():
            image = cv2.imdecode(np.frombuffer(self.data, np.uint8), cv2.IMREAD_COLOR)
        if image is None:
            raise ObservationError(
                'image_truncated',
                f'{self.field}.data',
                f'{memoryview(self.data).nbytes} bytes of {self.format!r}',
                'does not decode',
            )
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)

    def _bits_per_channel(self) -> int:
        """As a PNG's header says; 8 for all else."""
        head = bytes(memoryview(self.data).cast('B')[: PNG_BITS_AT + 1])
        return head[PNG_BITS_AT] if head.startswith(b'\x89PNG') and len(head) > PNG_BITS_AT else 8

    def _is_whole(self) -> bool:
        """Whether a JPEG or PNG has its end: OpenCV 4 fills the rest of a cut one with grey."""
        data = memoryview(self.data).cast('B')
        for start, end in END_MARKERS.items():
            if bytes(data[: len(start)]) == start:
                return bytes(data[-TAIL_BYTES:]).rstrip(b'\0').endswith(end)
        return True


def _opencv():
    """OpenCV, imported when the first image needs it: rgb8 does not."""
    try:
        import cv2
    except ImportError as error:
        raise MissingDependencyError(
            'cv2', 'an image that is not rgb8', 'pip install opencv-python-headless', error
        ) from error
    return cv2


@dataclass(eq=False)
class LateImage:
    """An image that is made when somebody asks for it, once.

    Args:
        make: gives [rows, cols, 3] uint8.
    """

    make: Callable[[], np.ndarray]
    _made: np.ndarray | None = field(default=None, init=False)

    def rgb(self) -> np.ndarray:
        """[rows, cols, 3] uint8."""
        if self._made is None:
            self._made = self.make()
            del self.make  # and with it whatever the image is made from
        return self._made


CameraImage = RawImage | CompressedImage | LateImage


def as_rgb(image: np.ndarray | CameraImage) -> np.ndarray:
    """[rows, cols, 3] uint8 of an array (returned as it is) or of an image as it came."""
    return image if isinstance(image, np.ndarray) else image.rgb()


def turned(image: np.ndarray, rotation_deg: int) -> np.ndarray:
    """A view of [rows, cols, 3], turned by 0 or 180 degrees."""
    return image[::-1, ::-1] if rotation_deg == 180 else image
