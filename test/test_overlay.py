"""Overlays show which patches stayed, and why, over the picture they speak of."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specprune_ros.images import turned
from specprune_ros.overlay import draw_overlay, legend_text
from specprune_ros.types import Mode, PruneReport, Reason

GRID = (4, 4)
GREY = 120
STATIC, LAYER = 2, 6  # decoder layers after which patches went
RED, GREEN, BLUE = 0, 1, 2


def make_report(reason=(), gone=(), cameras=('wrist',), grid=GRID, **changes) -> PruneReport:
    """One patch after another as given, for the first camera; all others were kept as GLOBAL."""
    patches, count = grid[0] * grid[1], len(cameras)
    reasons = np.full((count, patches), Reason.GLOBAL, np.uint8)
    layers = np.zeros((count, patches), np.uint8)
    reasons[0, : len(reason)], layers[0, : len(gone)] = reason, gone
    fields = {
        'stamp_ns': 0,
        'chunk_id': 1,
        'epoch': 1,
        'method': 'specprune',
        'budget': 'union',
        'alpha': 0.8,
        'mode': Mode.COARSE,
        'mode_reason': '',
        'cameras': cameras,
        'grid_rows': np.full(count, grid[0], np.uint32),
        'grid_cols': np.full(count, grid[1], np.uint32),
        'tokens_total': np.full(count, patches, np.uint32),
        'tokens_static': (layers != STATIC).sum(axis=1).astype(np.uint32),
        'tokens_kept': (layers == 0).sum(axis=1).astype(np.uint32),
        'reason': reasons.reshape(-1),
        'pruned_after_layer': layers.reshape(-1),
        'latency_total_s': 0.0427,
    }
    return PruneReport(**{'static_layer': STATIC, **fields, **changes})


def grey(rows: int = 512, cols: int = 512) -> np.ndarray:
    return np.full((rows, cols, 3), GREY, np.uint8)


def canvas_rows(overlay: np.ndarray, image: np.ndarray) -> int:
    """Rows of the picture in an overlay, which may enlarge it but keeps its shape."""
    return round(overlay.shape[1] * image.shape[0] / image.shape[1])


def centers(overlay: np.ndarray, image: np.ndarray, grid=GRID) -> np.ndarray:
    """[rows, cols, 3] colours in the middle of every patch, away from outlines."""
    rows, cols = canvas_rows(overlay, image), overlay.shape[1]
    ys = ((np.arange(grid[0]) + 0.5) * rows / grid[0]).astype(int)
    xs = ((np.arange(grid[1]) + 0.5) * cols / grid[1]).astype(int)
    return overlay[ys[:, None], xs[None]].astype(int)


def first_patch(reason: int, gone: int = 0, **changes) -> np.ndarray:
    """The colour that a grey patch gets."""
    report = make_report([reason], [gone], **changes)
    return centers(draw_overlay(grey(), report, 'wrist'), grey())[0, 0]


# Patches ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('reason', [0, Reason.GLOBAL, Reason.DYNAMIC | Reason.LOCAL])
def test_statically_pruned_patch_is_darker_and_not_tinted(reason):
    color = first_patch(reason, STATIC)
    assert color.max() < 0.6 * GREY
    assert color.max() - color.min() <= 1


@pytest.mark.parametrize(
    ('reason', 'most', 'least'),
    [
        (Reason.GLOBAL, BLUE, RED),
        (Reason.DYNAMIC, RED, BLUE),
        (Reason.LOCAL, GREEN, RED),
        (Reason.FILL, RED, GREEN),
    ],
)
def test_kept_patch_is_tinted_by_its_reason(reason, most, least):
    color = first_patch(reason)
    assert color.argmax() == most
    assert color.argmin() == least
    assert color.max() - color.min() > 20


@pytest.mark.parametrize(
    'reason',
    [
        Reason.GLOBAL | Reason.DYNAMIC,
        Reason.GLOBAL | Reason.LOCAL,
        Reason.DYNAMIC | Reason.LOCAL,
        Reason.GLOBAL | Reason.DYNAMIC | Reason.LOCAL,
    ],
)
def test_several_reasons_are_yellow(reason):
    color = first_patch(reason)
    assert color.argmin() == BLUE
    assert min(color[RED], color[GREEN]) - color[BLUE] > 30


@pytest.mark.parametrize('reason', [Reason.GLOBAL, Reason.DYNAMIC, Reason.LOCAL, Reason.FILL])
def test_layer_pruned_patch_is_in_between(reason):
    kept, layer, static = (first_patch(reason, gone) for gone in (0, LAYER, STATIC))
    assert kept.sum() > layer.sum() > static.sum()
    strength = [color.max() - color.min() for color in (kept, layer, static)]
    assert strength[0] > strength[1] > strength[2]
    assert kept.argmax() == layer.argmax()


def test_every_patch_shows_its_own_fate():
    reason = [Reason.GLOBAL, Reason.DYNAMIC, Reason.LOCAL, 0] * 4
    gone = [0, 0, 0, STATIC] * 4
    colors = centers(draw_overlay(grey(), make_report(reason, gone), 'wrist'), grey())
    assert (colors[:, :3].argmax(axis=2) == [BLUE, RED, GREEN]).all()
    assert (colors[:, 3].max(axis=1) < 0.6 * GREY).all()


def test_detail_of_the_picture_stays_visible():
    image = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
    for gone in (0, LAYER, STATIC):
        overlay = draw_overlay(image, make_report(gone=[gone]), 'wrist')
        patch = (slice(20, 100), slice(20, 100), GREEN)
        assert np.corrcoef(image[patch].ravel(), overlay[patch].ravel())[0, 1] > 0.95


def test_each_camera_shows_its_own_masks():
    report = make_report(gone=[STATIC] * 16, cameras=('wrist', 'side'))
    wrist, side = (centers(draw_overlay(grey(), report, name), grey()) for name in report.cameras)
    assert wrist.max() < 0.6 * GREY
    assert (side.argmax(axis=2) == BLUE).all()


def test_opacity():
    report = make_report()
    clear, faint, full = (
        centers(draw_overlay(grey(), report, 'wrist', opacity), grey())[1, 1]
        for opacity in (0.0, 0.3, 1.0)
    )
    assert clear.tolist() == [GREY] * 3
    assert abs(faint - GREY).max() < abs(full - GREY).max()


@pytest.mark.parametrize('mode', [Mode.DENSE, Mode.FALLBACK])
def test_nothing_is_painted_where_nothing_was_pruned(mode):
    image = np.random.default_rng(0).integers(0, 255, (480, 640, 3), np.uint8)
    report = make_report([0] * 16, mode=mode)
    overlay = draw_overlay(image, report, 'wrist')
    np.testing.assert_array_equal(overlay[:480], image)


# What the model sees ---------------------------------------------------------------------------

CROP_SIDE = 0.9**0.5  # of models trained with random crops


def noise(rows: int = 480, cols: int = 640) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (rows, cols, 3), np.uint8)


@pytest.mark.parametrize('size', [(480, 640), (224, 224), (301, 455)])
def test_turned_image_is_drawn_as_the_model_sees_it(size):
    image = noise(*size)
    gone = [0, 0, STATIC, LAYER] * 4
    report = make_report(gone=gone, rotation_deg=np.array([180], np.uint32))
    expected = draw_overlay(turned(image, 180).copy(), make_report(gone=gone), 'wrist')
    np.testing.assert_array_equal(draw_overlay(image, report, 'wrist'), expected)


def test_each_camera_is_turned_by_its_own_angle():
    image, gone = noise(), [STATIC] * 16
    angles = np.array([0, 180], np.uint32)
    report = make_report(gone=gone, cameras=('wrist', 'side'), rotation_deg=angles)
    plain = make_report(gone=gone, cameras=('wrist', 'side'))
    for camera, angle in zip(report.cameras, angles, strict=True):
        expected = draw_overlay(turned(image, angle).copy(), plain, camera)
        np.testing.assert_array_equal(draw_overlay(image, report, camera), expected)


def crop_box(rows: int, cols: int, side: float) -> tuple[slice, slice]:
    """The central share of a picture, to the pixel."""
    edges = [round(length * (1 - side) / 2) for length in (rows, cols)]
    return slice(edges[0], rows - edges[0]), slice(edges[1], cols - edges[1])


@pytest.mark.parametrize('mode', [Mode.COARSE, Mode.FINE])
@pytest.mark.parametrize('side', [CROP_SIDE, 0.5])
def test_grid_covers_the_crop_only(mode, side):
    image, gone = noise(960, 1280), [0, LAYER, STATIC, 0] * 4
    overlay = draw_overlay(image, make_report(gone=gone, crop_side=side, mode=mode), 'wrist')
    box = crop_box(960, 1280, side)
    alone = draw_overlay(image[box], make_report(gone=gone, mode=mode), 'wrist')
    seen = overlay[:960][box]
    np.testing.assert_array_equal(seen, alone[: len(seen)])


@pytest.mark.parametrize('mode', list(Mode))
def test_frame_around_the_crop_is_dimmed_a_little_and_never_tinted(mode):
    image = noise()
    report = make_report(gone=[0, LAYER] * 8, crop_side=CROP_SIDE, mode=mode)
    overlay = draw_overlay(image, report, 'wrist')[:480].astype(float)
    frame = np.ones((480, 640), bool)
    frame[crop_box(480, 640, CROP_SIDE)] = False
    shares = overlay[frame].sum(axis=0) / image[frame].sum(axis=0)  # per colour
    assert shares.min() > 0.5
    assert shares.max() < 0.9
    np.testing.assert_allclose(shares, shares[0], atol=0.01)
    if mode in (Mode.DENSE, Mode.FALLBACK):
        np.testing.assert_array_equal(overlay[~frame], image[~frame])


@given(
    rows=st.integers(1, 60),
    cols=st.integers(1, 60),
    side=st.floats(0.0, 1.0),
    angle=st.sampled_from([0, 180]),
)
@settings(deadline=None, max_examples=40)
def test_any_size_and_crop(rows, cols, side, angle):
    report = make_report(crop_side=side, rotation_deg=np.array([angle], np.uint32))
    overlay = draw_overlay(grey(rows, cols), report, 'wrist')
    assert overlay.shape[1] % cols == 0
    picture = overlay[: canvas_rows(overlay, grey(rows, cols))]
    assert picture[picture.shape[0] // 2, picture.shape[1] // 2].argmax() in (BLUE, RED)


# Sizes -----------------------------------------------------------------------------------------


def test_legend_stands_below():
    overlay = draw_overlay(grey(480, 640), make_report(), 'wrist')
    assert overlay.shape[0] > 480
    assert overlay.shape[1] == 640
    legend = overlay[480:]
    assert legend.std() > 10
    assert len(np.unique(legend.reshape(-1, 3), axis=0)) > 5


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(40, 300),
    cols=st.integers(40, 700),
    grid=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    data=st.data(),
)
def test_any_size_of_picture_and_grid(rows, cols, grid, data):
    count = grid[0] * grid[1]
    gone = data.draw(st.lists(st.sampled_from([0, STATIC]), min_size=count, max_size=count))
    image, report = grey(rows, cols), make_report(gone=gone, grid=grid)
    overlay = draw_overlay(image, report, 'wrist')
    assert (overlay.dtype, overlay.shape[2]) == (np.uint8, 3)
    assert overlay.shape[1] % cols == 0
    assert overlay.shape[0] > canvas_rows(overlay, image) >= rows
    colors = centers(overlay, image, grid).reshape(-1, 3)
    dark = colors.max(axis=1) < 0.6 * GREY
    assert dark.tolist() == [layer == STATIC for layer in gone]


@pytest.mark.parametrize(('rows', 'cols'), [(1, 1), (1, 448), (3, 5), (2, 1000)])
def test_pictures_smaller_than_their_grid(rows, cols):
    overlay = draw_overlay(grey(rows, cols), make_report(grid=(16, 16)), 'wrist')
    assert overlay.shape[1] % cols == 0
    assert overlay.dtype == np.uint8


@pytest.mark.parametrize('mode', list(Mode))
@pytest.mark.parametrize('size', [(224, 224), (480, 640)])
def test_the_picture_is_not_changed(mode, size):
    image = grey(*size)
    overlay = draw_overlay(image, make_report(gone=[STATIC, LAYER], mode=mode), 'wrist')
    assert (image == GREY).all()
    assert not np.shares_memory(overlay, image)


@pytest.mark.parametrize('size', [(224, 224), (480, 640)])
def test_views_and_read_only_pictures(size):
    rows, cols = size
    buffer = np.random.default_rng(0).integers(0, 255, (rows, cols + 5, 3), np.uint8)
    view = buffer[:, :cols]
    view.flags.writeable = False
    for angle in (0, 180):
        turn = {'rotation_deg': np.array([angle], np.uint32), 'crop_side': CROP_SIDE}
        report = make_report(gone=[STATIC, LAYER], **turn)
        expected = draw_overlay(view.copy(), report, 'wrist')
        np.testing.assert_array_equal(draw_overlay(view, report, 'wrist'), expected)


# Text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['side', '', 'WRIST'])
def test_unknown_camera(name):
    with pytest.raises(KeyError):
        draw_overlay(grey(), make_report(), name)


@pytest.mark.parametrize('mode', list(Mode))
def test_legend_says_camera_mode_counts_and_latency(mode):
    gone = [STATIC] * 5 + [LAYER] * 3
    report = make_report(gone=gone, cameras=('wrist', 'side'), mode=mode)
    text = legend_text(report, 'wrist')
    for word in ('wrist', mode.name.lower(), '16', '11', '8', '43 ms'):
        assert word in text
    other = legend_text(report, 'side')
    assert 'side' in other
    assert '11' not in other


def test_legend_warns_of_a_stand_in():
    report = make_report()
    told, silent = (
        draw_overlay(grey(), dataclasses.replace(report, stand_in=flag), 'wrist')
        for flag in (True, False)
    )
    assert np.array_equal(told[:512], silent[:512])
    assert not np.array_equal(told, silent)
