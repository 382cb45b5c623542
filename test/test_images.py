"""Camera images of every encoding, padded or broken, against an encoder of our own."""

import array
from contextlib import contextmanager

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprune_ros.errors import ObservationError
from specprune_ros.images import ENCODINGS, CompressedImage, LateImage, RawImage, as_rgb

FIELD = 'cameras/wrist'
BYTES = {'rgba8': 4, 'bgra8': 4, 'rgb8': 3, 'bgr8': 3, '8UC3': 3, 'mono8': 1, '8UC1': 1}
YUV = ('uyvy', 'yuv422', 'yuyv', 'yuv422_yuy2')
BUFFERS = {
    'bytes': bytes,
    'bytearray': bytearray,
    'array': lambda data: array.array('B', data),
    'memoryview': memoryview,
    'ndarray': lambda data: np.frombuffer(bytearray(data), np.uint8),
    'read-only ndarray': lambda data: np.frombuffer(data, np.uint8),
}


def bytes_per_pixel(encoding: str) -> int:
    if encoding in YUV:
        return 2
    return 1 if encoding.startswith('bayer') else BYTES[encoding]


def picture(encoding: str, rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """A random RGB picture that the encoding can carry without loss of detail."""
    rng = np.random.default_rng(seed)
    if encoding.startswith('bayer'):  # one colour: what lies between the samples is interpolated
        return np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (rows, cols, 3))
    if encoding in YUV:  # two neighbours share their chroma
        return rng.integers(0, 256, (rows, cols // 2, 3), np.uint8).repeat(2, axis=1)
    if encoding in ('mono8', '8UC1'):
        return rng.integers(0, 256, (rows, cols, 1), np.uint8).repeat(3, axis=2)
    return rng.integers(0, 256, (rows, cols, 3), np.uint8)


def pack(rgb: np.ndarray, encoding: str) -> np.ndarray:
    """[rows, bytes] as a camera driver would send it, without padding."""
    rows, cols, _ = rgb.shape
    if encoding.startswith('bayer'):
        raw = np.empty((rows, cols), np.uint8)
        for index, letter in enumerate(encoding[6:10]):
            where = (slice(index // 2, None, 2), slice(index % 2, None, 2))
            raw[where] = rgb[..., 'rgb'.index(letter)][where]
    elif encoding in YUV:
        r, g, b = (rgb[..., channel] / 255 for channel in range(3))  # BT.601, limited range
        luma = 16 + 65.481 * r + 128.553 * g + 24.966 * b
        u = 128 - 37.797 * r - 74.203 * g + 112.0 * b
        v = 128 + 112.0 * r - 93.786 * g - 18.214 * b
        chroma = np.where(np.arange(cols) % 2 == 0, u, v)
        pair = (chroma, luma) if encoding in ('uyvy', 'yuv422') else (luma, chroma)
        raw = np.stack(pair, axis=-1).round()
    elif encoding in ('mono8', '8UC1'):
        raw = rgb[..., 0]
    else:
        raw = rgb if encoding.startswith('rgb') else rgb[..., ::-1]
        if encoding.endswith('a8'):
            raw = np.dstack((raw, np.full((rows, cols), 77)))
    return raw.astype(np.uint8).reshape(rows, -1)


def padded(raw: np.ndarray, padding: int, last_row: bool = True) -> bytes:
    """Rows with junk after each; drivers differ in whether the last row has it too."""
    junk = np.full((len(raw), padding), 0xA5, np.uint8)
    data = np.hstack((raw, junk)).tobytes()
    return data if last_row or not padding else data[:-padding]


def raw_image(encoding: str, rgb: np.ndarray, padding: int = 0, /, **changes) -> RawImage:
    rows, cols, _ = rgb.shape
    fields = {
        'field': FIELD,
        'encoding': encoding,
        'height': rows,
        'width': cols,
        'step': cols * bytes_per_pixel(encoding) + padding,
        'data': padded(pack(rgb, encoding), padding),
    }
    return RawImage(**{**fields, **changes})


def compressed(data: object, kind: str = 'rgb8; jpeg compressed bgr8') -> CompressedImage:
    return CompressedImage(FIELD, kind, data)


def encode(rgb: np.ndarray, suffix: str) -> bytes:
    return cv2.imencode(suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes()


# Raw: what is right ----------------------------------------------------------------------------


@st.composite
def raw_cases(draw) -> tuple[str, np.ndarray, int]:
    """Encoding, picture and row padding."""
    encoding = draw(st.sampled_from(ENCODINGS))
    least = 3 if encoding.startswith('bayer') else 1
    rows, cols = draw(st.integers(least, 12)), draw(st.integers(least, 12))
    cols *= 2 if encoding in YUV else 1
    rgb = picture(encoding, rows, cols, draw(st.integers(0, 99)))
    return encoding, rgb, draw(st.integers(0, 9))


def tolerance(encoding: str) -> int:
    """Rounding of 8-bit chroma; all else is exact."""
    return 3 if encoding in YUV else 0


@pytest.mark.parametrize('encoding', ENCODINGS)
@pytest.mark.parametrize('padding', [0, 5])
def test_every_encoding_becomes_rgb(encoding, padding):
    rgb = picture(encoding, 6, 8)
    got = raw_image(encoding, rgb, padding).rgb()
    assert (got.dtype, got.shape) == (np.uint8, (6, 8, 3))
    np.testing.assert_allclose(got.astype(int), rgb, atol=tolerance(encoding))


@given(raw_cases(), st.sampled_from(sorted(BUFFERS)), st.booleans())
def test_any_size_padding_and_buffer(case, buffer, last_row):
    encoding, rgb, padding = case
    data = padded(pack(rgb, encoding), padding, last_row)
    got = raw_image(encoding, rgb, padding, data=BUFFERS[buffer](data)).rgb()
    np.testing.assert_allclose(got.astype(int), rgb, atol=tolerance(encoding))


@pytest.mark.parametrize('encoding', ENCODINGS)
@pytest.mark.parametrize('buffer', BUFFERS)
def test_the_buffer_is_left_as_it_was(encoding, buffer):
    rgb = picture(encoding, 4, 6)
    data = padded(pack(rgb, encoding), 3)
    held = BUFFERS[buffer](data)
    raw_image(encoding, rgb, 3, data=held).rgb()
    assert bytes(held) == data


@pytest.mark.parametrize('padding', [0, 4])
@pytest.mark.parametrize('buffer', ['bytes', 'bytearray', 'array', 'ndarray'])
def test_rgb8_is_a_view_of_the_buffer(buffer, padding):
    rgb = picture('rgb8', 5, 7)
    data = BUFFERS[buffer](padded(pack(rgb, 'rgb8'), padding))
    got = raw_image('rgb8', rgb, padding, data=data).rgb()
    assert np.shares_memory(got, np.frombuffer(data, np.uint8))
    np.testing.assert_array_equal(got, rgb)


def test_a_late_image_is_made_when_it_is_looked_at_and_once():
    made = []
    late = LateImage(lambda: made.append(1) or np.full((2, 2, 3), len(made), np.uint8))
    assert not made
    assert late.rgb() is as_rgb(late)
    assert late.rgb().max() == 1


def test_as_rgb_takes_arrays_and_images():
    rgb = picture('bgr8', 4, 4)
    assert as_rgb(rgb) is rgb
    np.testing.assert_array_equal(as_rgb(raw_image('bgr8', rgb)), rgb)
    np.testing.assert_array_equal(as_rgb(compressed(encode(rgb, '.png'))), rgb)


# Raw: what is wrong ----------------------------------------------------------------------------


@contextmanager
def refused(code: str, *told: str):
    """Expects an ObservationError with this code, whose message holds these words."""
    with pytest.raises(ObservationError) as caught:
        yield
    error = caught.value
    assert error.code == code
    assert error.field.startswith(FIELD)
    for text in (error.field, *told):
        assert text in str(error)


@pytest.mark.parametrize('encoding', ['mono16', '32FC1', '16UC1', 'RGB8', 'nv21', ''])
def test_unknown_encoding(encoding):
    with refused('image_encoding', f"'{encoding}'", 'rgb8', 'bayer_rggb8'):
        raw_image('rgb8', picture('rgb8', 4, 4), encoding=encoding)


@pytest.mark.parametrize(('rows', 'cols'), [(0, 0), (0, 4), (4, 0)])
@pytest.mark.parametrize('encoding', ENCODINGS)
def test_no_pixels(encoding, rows, cols):
    with refused('image_empty', f'{rows}x{cols}'):
        RawImage(FIELD, encoding, rows, cols, cols * 4, bytes(64))


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_step_shorter_than_a_row(encoding):
    rgb = picture(encoding, 4, 6)
    row = 6 * bytes_per_pixel(encoding)
    for step in (0, row - 1):
        with refused('image_step', f'= {step}:', f'{row} bytes'):
            raw_image(encoding, rgb, step=step)


@given(raw_cases(), st.data())
def test_any_truncation_is_refused(case, data):
    encoding, rgb, padding = case
    whole = padded(pack(rgb, encoding), padding, last_row=False)
    left = data.draw(st.integers(0, len(whole) - 1))
    with refused('image_truncated', f'{left} bytes', f'needs {len(whole)}'):
        raw_image(encoding, rgb, padding, data=whole[:left])


@pytest.mark.parametrize('encoding', ENCODINGS)
def test_greatest_sizes_that_a_message_can_claim(encoding):
    """A corrupt header must not make us allocate 2**64 bytes."""
    most = 2**32 - 1
    with refused('image_truncated', '12 bytes'):
        RawImage(FIELD, encoding, most, 1, most, bytes(12))
    with refused('image_step', f'{most * bytes_per_pixel(encoding)} bytes'):
        RawImage(FIELD, encoding, 1, most, 12, bytes(12))


@pytest.mark.parametrize('encoding', YUV)
@pytest.mark.parametrize('cols', [1, 3])
def test_odd_width_of_a_422_encoding(encoding, cols):
    """Bug: OpenCV's own exception came through, though chroma pairs need an even width."""
    with pytest.raises(ObservationError, match=FIELD):
        RawImage(FIELD, encoding, 2, cols, 2 * cols, bytes(4 * cols)).rgb()


# Compressed ------------------------------------------------------------------------------------


@pytest.mark.parametrize('buffer', BUFFERS)
def test_png_is_exact(buffer):
    rgb = picture('rgb8', 9, 13)
    np.testing.assert_array_equal(compressed(BUFFERS[buffer](encode(rgb, '.png'))).rgb(), rgb)


@pytest.mark.parametrize('color', [(255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 200, 90)])
def test_jpeg_keeps_the_order_of_colours(color):
    rgb = np.full((16, 24, 3), color, np.uint8)
    got = compressed(encode(rgb, '.jpg'), 'jpeg').rgb()
    np.testing.assert_allclose(got.astype(int), rgb, atol=4)


def test_grey_and_transparent_files_become_rgb():
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    got = compressed(cv2.imencode('.png', grey)[1].tobytes()).rgb()
    np.testing.assert_array_equal(got, np.dstack([grey] * 3))
    bgra = np.dstack((grey, grey + 1, grey + 2, np.full_like(grey, 255)))
    got = compressed(cv2.imencode('.png', bgra)[1].tobytes()).rgb()
    np.testing.assert_array_equal(got, bgra[..., 2::-1])


def test_no_data():
    with refused('image_empty', '0 bytes'):
        compressed(b'')


def test_compressed_depth():
    with refused('image_encoding', '16UC1; compressedDepth png'):
        compressed(encode(picture('rgb8', 4, 4), '.png'), '16UC1; compressedDepth png')


@pytest.mark.parametrize('data', [b'x', b'not an image at all', bytes(range(256)), bytes(400)])
def test_garbage_does_not_decode(data):
    with refused('image_truncated', f'{len(data)} bytes', 'jpeg'):
        compressed(data).rgb()


@pytest.mark.parametrize('suffix', ['.jpg', '.png'])
@given(share=st.floats(0, 1, exclude_max=True))
def test_any_truncated_file_is_refused(suffix, share):
    whole = encode(picture('rgb8', 24, 32), suffix)
    left = int(share * len(whole))
    with refused('image_truncated' if left else 'image_empty', f'{left} bytes'):
        compressed(whole[:left]).rgb()
