"""Kept patches as points in space: geometry by hand, and the node as a process."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprune_ros.cloud import (
    KEPT,
    PRUNED,
    Camera,
    depth_from,
    patch_centres,
    patch_colors,
    patches_at,
    token_points,
)
from specprune_ros.errors import ObservationError
from specprune_ros.overlay import COLORS, draw_overlay
from specprune_ros.types import Mode, PruneReport, Reason

# 6x6 pixels, two of which to each metre at 1.5 m; the optical axis meets the corner of four.
CAMERA = Camera(fx=3.0, fy=3.0, cx=2.5, cy=2.5, width=6, height=6)
DEPTH = np.full((6, 6), 2.0, np.float32)
GLOBAL, DYNAMIC, LOCAL, FILL = (int(reason) for reason in Reason)


def make_report(reason=(1, 2, 4, 8), gone=(0, 0, 0, 0), grid=(2, 2), **changes) -> PruneReport:
    """One camera `front`; patches row by row."""
    values = {
        'stamp_ns': 0, 'chunk_id': 1, 'epoch': 1, 'method': 'specprune', 'budget': 'union',
        'alpha': 0.8, 'mode': Mode.COARSE, 'mode_reason': '', 'cameras': ('front',),
        'grid_rows': np.array([grid[0]], np.uint32), 'grid_cols': np.array([grid[1]], np.uint32),
        'rotation_deg': np.zeros(1, np.uint32), 'tokens_total': np.array([len(reason)], np.uint32),
        'tokens_static': np.array([len(reason)], np.uint32),
        'tokens_kept': np.array([sum(layer == 0 for layer in gone)], np.uint32),
        'reason': np.array(reason, np.uint8), 'pruned_after_layer': np.array(gone, np.uint8),
        **changes,
    }  # fmt: skip
    return PruneReport(**values)


def xyz(points: np.ndarray) -> list[tuple[float, float, float]]:
    return [tuple(round(float(value), 5) for value in point) for point in points[['x', 'y', 'z']]]


def rgb(points: np.ndarray) -> list[tuple[int, int, int]]:
    return [(int(c) >> 16, int(c) >> 8 & 255, int(c) & 255) for c in points['rgb']]


# Geometry ----------------------------------------------------------------------------------------


def test_a_point_per_patch_centre():
    points = token_points(make_report(), 'front', DEPTH, CAMERA)
    # Centres at pixels 1 and 4: (1 - 2.5) / 3 * 2 = -1. y points down: the first row is at -1.
    assert xyz(points) == [(-1, -1, 2), (1, -1, 2), (-1, 1, 2), (1, 1, 2)]
    assert rgb(points) == [COLORS[name] for name in ('global', 'dynamic', 'local', 'fill')]


def test_an_image_that_was_turned_is_turned_back():
    report = make_report(rotation_deg=np.array([180], np.uint32))
    points = token_points(report, 'front', DEPTH, CAMERA)
    assert xyz(points) == [(1, 1, 2), (-1, 1, 2), (1, -1, 2), (-1, -1, 2)]


def test_a_crop_brings_the_patches_to_the_middle():
    points = token_points(make_report(crop_side=1 / 3), 'front', DEPTH, CAMERA)
    # Centres at 0.5 +- 1/12 of the side: pixels 2 and 3, (2 - 2.5) / 3 * 2 = -1/3.
    third = round(1 / 3, 5)
    assert xyz(points) == [
        (-third, -third, 2),
        (third, -third, 2),
        (-third, third, 2),
        (third, third, 2),
    ]


def test_depth_differs_from_patch_to_patch():
    depth = DEPTH.copy()
    depth[1, 4] = 4.0
    points = token_points(make_report(), 'front', depth, CAMERA)
    assert xyz(points)[:2] == [(-1, -1, 2), (2, -2, 4)]


@pytest.mark.parametrize('unknown', [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize('per_pixel', [False, True])
def test_unknown_depth_gives_no_point(unknown, per_pixel):
    depth = DEPTH.copy()
    depth[:3, :3] = unknown
    points = token_points(make_report(), 'front', depth, CAMERA, per_pixel=per_pixel)
    assert len(points) == (27 if per_pixel else 3)
    assert not ((points['x'] < 0) & (points['y'] < 0)).any()


def test_pruned_patches_are_left_out_or_dark():
    report = make_report(gone=(0, 3, 0, 9))
    assert xyz(token_points(report, 'front', DEPTH, CAMERA)) == [(-1, -1, 2), (-1, 1, 2)]
    points = token_points(report, 'front', DEPTH, CAMERA, show_pruned=True)
    assert rgb(points) == [COLORS['global'], PRUNED, COLORS['local'], PRUNED]


def test_a_point_per_pixel_takes_its_patch_and_only_the_crop():
    report = make_report(crop_side=1 / 3, rotation_deg=np.array([180], np.uint32))
    points = token_points(report, 'front', DEPTH, CAMERA, per_pixel=True)
    third = round(1 / 3, 5)
    # The middle 2x2 pixels, in image order; turned, the first is the last patch's.
    assert xyz(points)[0] == (-third, -third, 2)
    assert rgb(points) == [COLORS[name] for name in ('fill', 'local', 'dynamic', 'global')]


def test_depth_may_have_another_size_than_its_camera_info():
    points = token_points(make_report(), 'front', np.full((18, 18), 2.0, np.float32), CAMERA)
    assert xyz(points) == [(-1, -1, 2), (1, -1, 2), (-1, 1, 2), (1, 1, 2)]


def test_a_camera_that_is_not_calibrated():
    with pytest.raises(ObservationError, match='not calibrated'):
        token_points(make_report(), 'front', DEPTH, dataclasses.replace(CAMERA, fx=0.0))
    with pytest.raises(KeyError, match='back'):
        token_points(make_report(), 'back', DEPTH, CAMERA)


grids = st.tuples(st.integers(1, 16), st.integers(1, 16))


@given(grids, st.sampled_from([0, 180]), st.floats(0.05, 1.0))
def test_every_centre_lies_in_its_patch(grid, turned, crop):
    centres = patch_centres(*grid, turned, crop).reshape(-1, 2)
    assert (centres > 0).all()
    assert (centres < 1).all()
    patches = patches_at(centres[:, 0], centres[:, 1], grid, turned, crop)
    np.testing.assert_array_equal(patches, np.arange(grid[0] * grid[1]))


@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from([0, 180]))
def test_points_project_to_the_pixels_that_they_come_from(seed, per_pixel, turned):
    rng = np.random.default_rng(seed)
    rows, cols = rng.integers(2, 40, 2)
    camera = Camera(
        fx=float(rng.uniform(5, 50)), fy=float(rng.uniform(5, 50)), cx=float(cols / 2),
        cy=float(rows / 3), width=int(cols), height=int(rows),
    )  # fmt: skip
    depth = rng.uniform(0.2, 3.0, (rows, cols)).astype(np.float32)
    report = make_report(rotation_deg=np.array([turned], np.uint32), crop_side=0.9)
    points = token_points(report, 'front', depth, camera, per_pixel=per_pixel)
    u = points['x'] / points['z'] * camera.fx + camera.cx
    v = points['y'] / points['z'] * camera.fy + camera.cy
    np.testing.assert_allclose(u, u.round(), atol=1e-3)
    np.testing.assert_array_equal(depth[v.round().astype(int), u.round().astype(int)], points['z'])


# Colours -----------------------------------------------------------------------------------------


def test_colours_are_the_overlays():
    """Sixteen patches, one for each set of reasons."""
    reason = np.arange(1, 17, dtype=np.uint8) % 16
    report = make_report(reason=reason, gone=16 * (0,), grid=(4, 4))
    drawn = draw_overlay(np.zeros((448, 448, 3), np.uint8), report, 'front', opacity=1.0)
    centres = drawn[56:448:112, 56:448:112]
    mine = patch_colors(reason.reshape(4, 4), np.zeros((4, 4), bool))
    np.testing.assert_array_equal(
        mine[reason.reshape(4, 4) > 0], centres[:4][reason.reshape(4, 4) > 0]
    )
    assert tuple(mine[3, 3]) == KEPT  # kept without a reason: nothing was pruned


# Depth images ------------------------------------------------------------------------------------


@pytest.mark.parametrize(('encoding', 'kind', 'unit'), [('16UC1', 'u2', 1000), ('32FC1', 'f4', 1)])
@pytest.mark.parametrize('padding', [0, 6])
@pytest.mark.parametrize('order', '<>')
def test_depth_of_both_encodings(encoding, kind, unit, padding, order):
    metres = np.array([[0.5, 1.25, 0.0], [2.0, 3.5, 60.0]])
    raw = (metres * unit).astype(order + kind)
    rows = np.hstack((raw.view(np.uint8), np.full((2, padding), 0xA5, np.uint8)))
    step = rows.shape[1]
    for data in (rows.tobytes(), rows.tobytes()[: len(rows.tobytes()) - padding]):
        got = depth_from(encoding, 2, 3, step, data, big_endian=order == '>')
        np.testing.assert_allclose(got, metres, rtol=1e-6)
        assert got.dtype == np.float32


@pytest.mark.parametrize(
    ('changes', 'code'),
    [
        ({'encoding': 'rgb8'}, 'image_encoding'),
        ({'step': 5}, 'image_shape'),
        ({'data': bytes(11)}, 'image_shape'),
        ({'height': 0}, 'image_shape'),
    ],
)
def test_depth_that_does_not_fit(changes, code):
    fields = {'encoding': '16UC1', 'height': 2, 'width': 3, 'step': 6, 'data': bytes(12)}
    with pytest.raises(ObservationError) as caught:
        depth_from(**{**fields, **changes})
    assert caught.value.code == code


# The node ----------------------------------------------------------------------------------------


def cloud_of(parameters: dict, words=()) -> tuple:
    """The message that the process sends for the report and depth above; and what it printed."""
    import rclpy
    import ros_world
    from rclpy.qos import qos_profile_sensor_data
    from sensor_msgs.msg import CameraInfo, Image, PointCloud2

    from specprune_ros.msg import PruningDiagnostics
    from specprune_ros.ros import conversions

    world = rclpy.create_node('depth_camera')
    clouds: list[PointCloud2] = []
    depths = world.create_publisher(
        Image, 'cameras/front/depth/image_raw', qos_profile_sensor_data
    )
    infos = world.create_publisher(
        CameraInfo, 'cameras/front/depth/camera_info', qos_profile_sensor_data
    )
    reports = world.create_publisher(PruningDiagnostics, 'vla_node/pruning', 5)
    world.create_subscription(PointCloud2, 'token_cloud/points/front', clouds.append, 5)
    with ros_world.NodeProcess('cloud_node', parameters) as process:
        for _ in range(200):
            now = world.get_clock().now()
            image = Image(height=6, width=6, encoding='16UC1', step=12)
            image.data = (DEPTH * 1000).astype('<u2').tobytes()
            image.header.stamp, image.header.frame_id = now.to_msg(), 'front_optical_frame'
            depths.publish(image)
            info = CameraInfo(width=6, height=6)
            info.k = [3.0, 0.0, 2.5, 0.0, 3.0, 2.5, 0.0, 0.0, 1.0]
            infos.publish(info)
            stamp_ns = now.nanoseconds
            reports.publish(
                conversions.report_to_msg(make_report((1, 2, 4, 8), stamp_ns=stamp_ns))
            )
            rclpy.spin_once(world, timeout_sec=0.1)
            ended = process.process.poll() is not None
            if clouds or ended or any(word in process.output() for word in words):
                break
        status, _ = process.stop()
        world.destroy_node()
        assert status == 0, process.output()
        return clouds, process.output()


@pytest.fixture(scope='module')
def ros():
    pytest.importorskip('rclpy', reason='no ROS here')
    pytest.importorskip('specprune_ros.msg', reason='messages are not built')
    import ros_world

    with ros_world.ros_domain(23):
        yield


@pytest.mark.slow
@pytest.mark.ros
def test_the_node_sends_coloured_points(ros):
    clouds, printed = cloud_of({'camera_names': ['front']})
    assert clouds, printed
    msg = clouds[0]
    assert msg.header.frame_id == 'front_optical_frame'
    names = [(field.name, field.offset) for field in msg.fields]
    assert names == [('x', 0), ('y', 4), ('z', 8), ('rgb', 12)]
    assert (msg.width, msg.height, msg.row_step) == (4, 1, 4 * msg.point_step)
    points = np.frombuffer(msg.data, [('x', 'f4'), ('y', 'f4'), ('z', 'f4'), ('rgb', 'u4')])
    assert xyz(points) == [(-1, -1, 2), (1, -1, 2), (-1, 1, 2), (1, 1, 2)]
    assert rgb(points)[0] == COLORS['global']


@pytest.mark.ros
@pytest.mark.slow
def test_the_node_says_what_is_missing(ros):
    clouds, printed = cloud_of(
        {'camera_names': ['front'], 'depth_topics': ['elsewhere']}, ['depth']
    )
    assert not clouds
    assert 'front.depth = None: nothing came yet' in printed


@pytest.mark.ros
@pytest.mark.slow
def test_bad_parameters_end_the_process(ros):
    import ros_world

    for parameters, words in (
        ({}, 'names no camera'),
        ({'camera_names': ['a', 'b'], 'depth_topics': ['c']}, 'as many as camera_names'),
    ):
        with ros_world.NodeProcess('cloud_node', parameters) as process:
            assert process.process.wait(30) == 2
            assert words in process.output()
