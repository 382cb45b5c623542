"""Camera images to model images: bit for bit TensorFlow's, or fast and close to it."""

import hashlib
import io
import json
import re
import runpy
import sys

import cv2
import numpy as np
import pytest
import torch
from conftest import DATA, GOLDEN, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from specprune_ros.errors import ConfigError, MissingDependencyError
from specprune_ros.images import as_rgb
from specprune_ros.models import preprocess, resample
from specprune_ros.models.openvla_oft import VisionBackbone
from specprune_ros.models.preprocess import (
    FastPreprocessor,
    jpeg_round_trip,
    make_preprocessor,
    resize_bicubic,
)
from specprune_ros.models.resample import (
    bicubic_matrix,
    center_crop,
    crop_matrix,
    resize_lanczos3,
    resize_lanczos3_in_order,
)
from specprune_ros.models.vit import TowerConfig
from specprune_ros.recordings import open_recording
from specprune_ros.recordings.base import CameraEvent

SIZE = (224, 224)
CPU = torch.device('cpu')
MODES = ('exact', 'fast')
FOLDER = 'openvla_oft_preprocess'
# One pixel, one row, one column, smaller and larger than the model's images, odd, as they are.
SIZES = ((1, 1), (1, 7), (9, 1), (2, 300), (300, 2), (16, 16), (223, 225), (224, 224), (600, 801))


def make(mode: str, **changes: object):
    settings = {'size': SIZE, 'center_crop': True, 'source_size': None, 'device': CPU, **changes}
    return make_preprocessor(mode, **settings)


def one(preprocessor, image: np.ndarray) -> np.ndarray:
    """The result of a single image, as an array."""
    result = preprocessor([image])
    assert result.shape[0] == 1
    return result[0].numpy()


def noise(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, cols, 3), np.uint8)


def smooth(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """A random picture without fine detail, and dull enough for no filter to leave 0..255."""
    coarse = 64 + noise(max(rows // 12, 1), max(cols // 12, 1), seed) // 2
    return cv2.resize(coarse, (cols, rows), interpolation=cv2.INTER_CUBIC)


def rounded(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# Exact: reference vectors ----------------------------------------------------------------------


def vectors() -> dict[str, np.ndarray]:
    return golden(f'{FOLDER}/preprocess.npz')


def pictures() -> dict[str, np.ndarray]:
    """The camera images of the reference, whatever their names and sizes."""
    return {
        key: image for key, image in vectors().items() if key.startswith('in_') and '__' not in key
    }


def reference(stage: str) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """Every picture that has this stage, the stage's result, and its key.

    Args:
        stage: a pattern of what follows the picture's name, e.g. 'cropped'.
    """
    data = vectors()
    found = [
        (data[match[1]], value, key)
        for key, value in data.items()
        if (match := re.fullmatch(f'(in_.+?)__{stage}', key))
    ]
    if not found:
        pytest.skip(f'reference vectors have no {stage}')
    return found


def has_model_size(image: np.ndarray) -> bool:
    return image.shape[:2] == SIZE


@pytest.mark.golden
def test_jpeg_round_trip_is_tensorflows():
    for image, expected, key in reference('jpeg_roundtrip__sha256'):
        assert sha256(jpeg_round_trip(image)) == str(expected), key


@pytest.mark.golden
def test_parts_of_the_jpeg_round_trip_are_tensorflows():
    for image, expected, key in reference(r'jpeg_roundtrip__rows\d+to\d+_cols\d+to\d+'):
        top, bottom, left, right = map(int, re.findall(r'\d+', key.split('__')[-1]))
        got = jpeg_round_trip(image)[top:bottom, left:right]
        np.testing.assert_array_equal(got, expected, err_msg=key)


@pytest.mark.golden
def test_lanczos_is_tensorflows():
    for image, expected, key in reference('lanczos224'):
        coded = jpeg_round_trip(image)
        np.testing.assert_array_equal(resize_lanczos3(coded, SIZE), expected, err_msg=key)
        in_order = rounded(resize_lanczos3_in_order(coded, SIZE))
        np.testing.assert_array_equal(in_order, expected, err_msg=key)


@pytest.mark.golden
def test_crop_is_tensorflows():
    for image, expected, key in reference('cropped'):
        got = center_crop(at_model_size(image))
        np.testing.assert_array_equal(got, expected, err_msg=key)


def at_model_size(image: np.ndarray) -> np.ndarray:
    """What the crop is given."""
    return image if has_model_size(image) else resize_lanczos3(jpeg_round_trip(image), SIZE)


@pytest.mark.golden
def test_exact_end_to_end_with_crop():
    for image, expected, key in reference('cropped'):
        np.testing.assert_array_equal(one(make('exact'), image), expected, err_msg=key)


@pytest.mark.golden
def test_exact_end_to_end_without_crop():
    """A source size that the image has already changes nothing."""
    for image, expected, key in reference('lanczos224'):
        for source_size in (None, image.shape[:2]):
            changes = {'source_size': source_size, 'skip_at_size': not has_model_size(image)}
            got = one(make('exact', center_crop=False, **changes), image)
            np.testing.assert_array_equal(got, expected, err_msg=key)


@pytest.mark.golden
def test_exact_end_to_end_of_aloha():
    """The file does not say from which picture; no other gives the same bits."""
    expected = vectors().get('aloha_lanczos224')
    if expected is None:
        pytest.skip('reference vectors have no aloha_lanczos224')
    aloha = make('exact', center_crop=False, source_size=(256, 256))
    assert any(np.array_equal(one(aloha, image), expected) for image in pictures().values())


@pytest.mark.golden
def test_pixel_values_through_the_vision_backbone():
    """What the two towers are given is the reference's processor output, to the last bit."""
    tower = TowerConfig(width=4, depth=1, heads=1, mlp_width=4, registers=None, layer_scale=False)
    backbone = VisionBackbone(tower, tower)
    seen = []
    for part in (backbone.featurizer, backbone.fused_featurizer):
        part.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for image, expected, key in reference('pixel_values'):
        seen.clear()
        with torch.inference_mode():
            backbone(make('exact')([image]))
        np.testing.assert_array_equal(torch.cat(seen, 1)[0].numpy(), expected, err_msg=key)


def scene(rows: int, cols: int) -> np.ndarray:
    """The picture behind tensorflow_sizes.json: waves of every length."""
    row, col, channel = np.ogrid[:rows, :cols, :3]
    waves = (3 * row * row + 5 * col * col + 7 * row * col) // 64
    return (waves + 85 * channel).astype(np.uint8)


@pytest.mark.golden
def test_other_sizes_are_tensorflows():
    """A rounded float64 sine in the Lanczos weights fails here: TensorFlow calls the C library."""
    path = GOLDEN / FOLDER / 'tensorflow_sizes.json'
    if not path.exists():
        pytest.skip(f'reference hashes {path} are not there')
    wrong = []
    for size, expected in json.loads(path.read_text())['sha256'].items():
        jpeg = jpeg_round_trip(scene(*map(int, size.split('x'))))
        resized = resize_lanczos3(jpeg, SIZE)
        got = {'jpeg': jpeg, 'resized': resized, 'cropped': center_crop(resized)}
        wrong += [f'{size} {stage}' for stage in got if sha256(got[stage]) != expected[stage]]
    assert not wrong


@pytest.mark.golden
def test_trap_8_truncation_of_the_crop():
    """round(255 y) instead of trunc(255.5 y): one level off, the more often the darker."""
    matrix = crop_matrix(224)
    for image, expected, key in reference('cropped'):
        values = at_model_size(image) / 255
        y = np.einsum('yr,rck,xc->yxk', matrix, values, matrix, optimize=True)
        wrong = difference(np.rint(255 * y), expected)
        assert wrong.max() == 1, key
        assert 0.02 < wrong.mean() < 0.5, key
        assert difference(np.trunc(255.5 * y), expected).mean() < 1e-3, key


@pytest.mark.golden
def test_trap_9_other_jpeg_decoders():
    """Colours that vary are what decoders differ in; a picture without may come out equal."""
    wrong = [other_decoders(image) for image in pictures().values()]
    for of_decoder in zip(*wrong, strict=True):
        assert max(w.max() for w in of_decoder) >= 3
        assert max(w.mean() for w in of_decoder) > 0.2


def other_decoders(image: np.ndarray) -> list[np.ndarray]:
    """How far Pillow's and OpenCV's defaults are from the round trip."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'JPEG', quality=95, subsampling=2)
    with_opencv = cv2.imdecode(np.frombuffer(file.getvalue(), np.uint8), cv2.IMREAD_COLOR)
    decoded = (np.asarray(Image.open(file)), cv2.cvtColor(with_opencv, cv2.COLOR_BGR2RGB))
    return [difference(other, jpeg_round_trip(image)) for other in decoded]


@pytest.mark.golden
def test_without_skip_an_image_of_the_models_size_is_coded_too():
    """As OpenVLA's and UniVLA's scripts do it; other sizes are coded either way."""
    for name, image in pictures().items():
        expected = resize_lanczos3(jpeg_round_trip(image), SIZE)
        coded = one(make('exact', skip_at_size=False, center_crop=False), image)
        np.testing.assert_array_equal(coded, expected, err_msg=name)
        cropped = one(make('exact', skip_at_size=False), image)
        np.testing.assert_array_equal(cropped, center_crop(expected), err_msg=name)
        skipped = one(make('exact', center_crop=False), image)
        assert difference(skipped, expected).any() == has_model_size(image), name
        fast, skips = (
            one(make('fast', center_crop=False, skip_at_size=skip), image)
            for skip in (False, True)
        )
        np.testing.assert_array_equal(fast, skips, err_msg=name)


# Exact: the quick resize and the slow one ------------------------------------------------------


def ramp(rows: int, cols: int) -> np.ndarray:
    """Halved, all of it lies midway between two levels."""
    line = np.arange(cols) % 250
    return np.broadcast_to(line[:, None], (rows, cols, 3)).astype(np.uint8)


def patch_of_ramp(rows: int, cols: int) -> np.ndarray:
    image = noise(rows, cols)
    image[: rows // 3, : cols // 5] = ramp(rows // 3, cols // 5)
    return image


SIDES = st.integers(1, 60)


@settings(max_examples=60)
@given(st.tuples(SIDES, SIDES), st.tuples(SIDES, SIDES), st.sampled_from([noise, smooth, ramp]))
def test_resize_equals_the_one_in_order(source, target, picture):
    image = picture(*source)
    expected = rounded(resize_lanczos3_in_order(image, target))
    np.testing.assert_array_equal(resize_lanczos3(image, target), expected)


@pytest.mark.parametrize('picture', [ramp, patch_of_ramp])
def test_values_midway_between_two_levels(picture):
    """Only the order of float32 operations decides to which side they go."""
    image = picture(200, 300)
    values = resize_lanczos3_in_order(image, (100, 150))
    assert (np.abs(values % 1 - 0.5) < 1e-4).mean() > 0.02
    np.testing.assert_array_equal(resize_lanczos3(image, (100, 150)), rounded(values))


@pytest.mark.parametrize(('length', 'target'), [(640, 256), (480, 256), (100, 256), (256, 256)])
def test_bicubic_weights_are_pillows(length, target):
    image = noise(3, length)
    expected = resize_bicubic(image, (3, target))
    got = np.einsum('xc,rck->rxk', bicubic_matrix(length, target), image)
    assert difference(rounded(got), expected).max() <= 1


# Fast ------------------------------------------------------------------------------------------


def without_jpeg(image: np.ndarray, crop: bool) -> np.ndarray:
    """The exact steps, but for the JPEG round trip."""
    resized = image if image.shape[:2] == SIZE else resize_lanczos3(image, SIZE)
    return center_crop(resized) if crop else resized


@pytest.mark.parametrize('crop', [True, False])
@pytest.mark.parametrize('size', SIZES)
def test_fast_is_close_to_exact_without_jpeg(size, crop):
    image = smooth(*size)
    wrong = difference(one(make('fast', center_crop=crop), image), without_jpeg(image, crop))
    assert wrong.max() <= 1
    assert wrong.mean() < (0.25 if crop else 1e-3)


def test_fast_shrinks_to_the_source_size_first():
    image = smooth(480, 640)
    aloha = make('fast', source_size=(256, 256), center_crop=False)
    wrong = difference(one(aloha, image), resize_lanczos3(resize_bicubic(image, (256, 256)), SIZE))
    assert wrong.max() <= 2
    assert wrong.mean() < 0.3
    assert difference(one(aloha, image), one(make('fast', center_crop=False), image)).any()


def test_fast_on_a_recorded_picture(capsys):
    """What a user of `fast` gives up, on the wrist camera's picture, enlarged to 640x480."""
    events = open_recording(DATA / 'pick_place').events()
    image = next(
        as_rgb(e.image) for e in events if isinstance(e, CameraEvent) and e.camera == 'wrist'
    )
    large = cv2.resize(image, (640, 480), interpolation=cv2.INTER_CUBIC)
    wrong = difference(one(make('fast'), large), one(make('exact'), large))
    with capsys.disabled():
        print(f'\nfast against exact: mean {wrong.mean():.2f}, max {wrong.max()} of 255 levels')
    assert wrong.mean() < 1.5
    assert wrong.max() <= 24


@pytest.mark.parametrize('crop', [True, False])
@pytest.mark.parametrize('source_size', [None, (256, 256)])
def test_batched_form_equals_the_one_of_the_cpu(crop, source_size):
    """Sizes mixed, so that images of one size are not neighbours."""
    sizes = ((120, 160), SIZE, (120, 160), (20, 31), SIZE)
    images = [noise(*size, seed) for seed, size in enumerate(sizes)]
    fast = make('fast', center_crop=crop, source_size=source_size)
    expected = fast(images)
    fast.on_host = False
    got = fast(images)
    assert (got.dtype, got.shape) == (torch.uint8, expected.shape)
    wrong = difference(got.numpy(), expected.numpy())
    assert wrong.max() <= 1
    assert wrong.mean() < 1e-3


def test_another_device_is_never_waited_for():
    """The meta device raises at whatever would read a value back."""
    fast = make('fast', device=torch.device('meta'))
    result = fast([noise(480, 640), noise(20, 30)])
    assert (result.device.type, result.dtype) == ('meta', torch.uint8)
    assert result.shape == (2, *SIZE, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_equals_the_cpu_and_is_not_waited_for():
    images = [noise(480, 640, seed) for seed in range(2)]
    fast = make('fast', device=torch.device('cuda'))
    fast(images)  # uploads the weights, which waits
    torch.cuda.set_sync_debug_mode('error')
    try:
        result = fast(images)
    finally:
        torch.cuda.set_sync_debug_mode('default')
    wrong = difference(result.cpu().numpy(), make('fast')(images).numpy())
    assert wrong.max() <= 1
    assert wrong.mean() < 1e-3


# Both ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('crop', [True, False])
def test_any_size_becomes_the_models(mode, size, crop):
    result = make(mode, center_crop=crop)([noise(*size)])
    assert (result.dtype, result.shape) == (torch.uint8, (1, *SIZE, 3))
    assert result.is_contiguous()


@pytest.mark.parametrize('mode', MODES)
def test_another_model_size(mode):
    result = make(mode, size=(28, 42))([noise(224, 224), noise(28, 42)])
    assert result.shape == (2, 28, 42, 3)


@settings(max_examples=40)
@given(
    st.sampled_from(MODES),
    st.booleans(),
    st.integers(0, 255),
    st.sampled_from([(1, 1), (7, 300), (96, 128), SIZE]),
)
def test_a_grey_image_keeps_its_level(mode, crop, level, size):
    image = np.full((*size, 3), level, np.uint8)
    np.testing.assert_array_equal(
        one(make(mode, center_crop=crop), image), np.full((*SIZE, 3), level)
    )


@settings(max_examples=20)
@given(st.tuples(*[st.integers(0, 255)] * 3), st.sampled_from(MODES))
def test_a_coloured_image_stays_of_one_colour(color, mode):
    result = one(make(mode), np.full((96, 130, 3), color, np.uint8))
    assert (result == result[0, 0]).all()
    assert difference(result[0, 0], np.array(color)).max() <= (2 if mode == 'exact' else 0)


@pytest.mark.parametrize('mode', MODES)
def test_model_size_without_crop_passes_through(mode):
    image = noise(*SIZE)
    np.testing.assert_array_equal(one(make(mode, center_crop=False), image), image)


@pytest.mark.parametrize('mode', MODES)
@given(order=st.permutations(range(4)))
@settings(max_examples=10)
def test_images_do_not_influence_each_other(mode, order):
    """Side by side or alone, in any order."""
    images = [noise(40, 60), smooth(40, 60), noise(*SIZE), smooth(90, 30)]
    preprocessor = make(mode)
    result = preprocessor([images[index] for index in order]).numpy()
    for got, index in zip(result, order, strict=True):
        np.testing.assert_array_equal(got, one(preprocessor, images[index]))


def read_only(image: np.ndarray) -> np.ndarray:
    view = image.view()
    view.flags.writeable = False
    return view


def padded(image: np.ndarray) -> np.ndarray:
    return np.pad(image, ((0, 0), (0, 5), (0, 0)))[:, :-5]


VIEWS = {
    'turned': lambda image: image[::-1, ::-1].copy()[::-1, ::-1],
    'mirrored': lambda image: image[:, ::-1].copy()[:, ::-1],
    'read-only': read_only,
    'read-only, turned': lambda image: read_only(image[::-1, ::-1].copy())[::-1, ::-1],
    'padded rows': padded,
    'bgr': lambda image: image[..., ::-1].copy()[..., ::-1],
    'transposed': lambda image: image.transpose(1, 0, 2).copy().transpose(1, 0, 2),
    'every second': lambda image: image.repeat(2, axis=0).repeat(2, axis=1)[::2, ::2],
}


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('view', VIEWS)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('size', [(48, 64), SIZE])
@pytest.mark.parametrize('crop', [True, False])
def test_any_strides(view, mode, size, crop):
    image = noise(*size)
    seen = VIEWS[view](image)
    before = seen.copy()
    preprocessor = make(mode, center_crop=crop)
    np.testing.assert_array_equal(one(preprocessor, seen), one(preprocessor, image))
    np.testing.assert_array_equal(seen, before)


@pytest.mark.parametrize('mode', MODES)
def test_the_result_is_not_the_callers_memory(mode):
    """A camera driver may overwrite its buffer while the model still works on the image."""
    image = noise(*SIZE)
    result = make(mode, center_crop=False)([image])
    expected = image.copy()
    image[:] = 0
    np.testing.assert_array_equal(result[0].numpy(), expected)


@pytest.mark.parametrize('mode', MODES)
def test_crop_side(mode):
    assert make(mode).crop_side == pytest.approx(0.9**0.5)
    assert make(mode, center_crop=False).crop_side == 1.0


# What is missing or wrong ----------------------------------------------------------------------


def test_unknown_mode():
    with pytest.raises(ConfigError, match=r"model\.preprocessing = 'quick': .*exact, fast"):
        make('quick')


@pytest.mark.parametrize(
    ('package', 'command'),
    [('PIL', 'pip install pillow'), ('simplejpeg', 'pip install simplejpeg')],
)
def test_exact_without_its_packages(monkeypatch, package, command):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=f'{package} is not installed.*{command}'):
        make('exact')


def test_fast_needs_no_more_than_numpy_and_torch(monkeypatch):
    for package in ('PIL', 'simplejpeg', 'cv2'):
        monkeypatch.setitem(sys.modules, package, None)
    for module in (resample, preprocess):
        runpy.run_path(module.__file__)
    assert one(FastPreprocessor(center_crop=True, device=CPU), noise(30, 40)).shape == (*SIZE, 3)
