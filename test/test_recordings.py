"""Bags, videos and npz observations as recordings, whole and broken."""

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import DATA, make_policy
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from specprune_ros.config import PolicyConfig, RobotConfig
from specprune_ros.errors import ObservationError, RecordingError
from specprune_ros.images import as_rgb
from specprune_ros.offline import fit_robot, run_recording
from specprune_ros.recordings import open_recording
from specprune_ros.recordings.bag import BagRecording, camera_name
from specprune_ros.recordings.base import CameraEvent, InstructionEvent, JointEvent, PoseEvent
from specprune_ros.types import ActionSpace, ExecutedAction

OWN_BAG = DATA / 'pick_place'
MSG = Path(__file__).parent.parent / 'msg'
NS, START = 1_000_000_000, 1_767_261_600_000_000_000
PERIOD = NS // 20
IMAGE, COMPRESSED = 'sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage'
JOINTS, TEXT = 'sensor_msgs/msg/JointState', 'std_msgs/msg/String'
EXECUTED = 'specprune_ros/msg/ExecutedAction'
STATUS = 'specprune_ros/msg/VlaStatus'
POSE = 'geometry_msgs/msg/PoseStamped'
ACTION_NAMES = ('x', 'y', 'z', 'roll', 'pitch', 'yaw', 'gripper')


# Making recordings -----------------------------------------------------------------------------


class BagWriter:
    """Writes messages of one bag through `rosbags`."""

    def __init__(self, path: Path, storage: StoragePlugin = StoragePlugin.MCAP):
        self.store = get_typestore(Stores.ROS2_HUMBLE)
        for kind in (EXECUTED, STATUS):
            text = (MSG / f'{kind.rpartition("/")[2]}.msg').read_text()
            self.store.register(get_types_from_msg(text, kind))
        self._writer = Writer(path, version=8, storage_plugin=storage)
        self._topics: dict = {}

    def __enter__(self):
        self._writer.open()
        return self

    def __exit__(self, *exc):
        self._writer.close()

    def make(self, kind: str, **fields: object):
        if 'header' in self.store.types[kind].__dataclass_fields__:
            stamp = self.store.types['builtin_interfaces/msg/Time'](0, 0)
            fields['header'] = self.store.types['std_msgs/msg/Header'](stamp, 'base')
        return self.store.types[kind](**fields)

    def put(self, topic: str, since_ns: int, message, cut: int | None = None) -> None:
        """Write a message, or only its first bytes."""
        kind = message.__msgtype__
        if topic not in self._topics:
            self._topics[topic] = self._writer.add_connection(topic, kind, typestore=self.store)
        data = bytes(self.store.serialize_cdr(message, kind))[:cut]
        self._writer.write(self._topics[topic], START + since_ns, data)

    def put_image(self, topic: str, since_ns: int, rgb: np.ndarray, padding: int = 0, **changes):
        rows, cols, _ = rgb.shape
        junk = np.full((rows, padding), 0xA5, np.uint8)
        fields = {
            'height': rows,
            'width': cols,
            'encoding': 'rgb8',
            'is_bigendian': 0,
            'step': 3 * cols + padding,
            'data': np.hstack((rgb.reshape(rows, -1), junk)).reshape(-1),
        }
        self.put(topic, since_ns, self.make(IMAGE, **{**fields, **changes}))

    def put_jpeg(self, topic: str, since_ns: int, data: bytes, kind: str = 'jpeg') -> None:
        values = np.frombuffer(data, np.uint8)
        self.put(topic, since_ns, self.make(COMPRESSED, format=kind, data=values))

    def joints(self, names: tuple[str, ...], positions: tuple[float, ...]):
        values, none = np.array(positions, float), np.zeros(0)
        return self.make(JOINTS, name=list(names), position=values, velocity=none, effort=none)

    def action(self, *values: float, **changes):
        fields = {
            'chunk_id': 3,
            'epoch': 2,
            'step': 1,
            'step_dt': self.store.types['builtin_interfaces/msg/Duration'](0, PERIOD),
            'space': 2,
            'names': list(ACTION_NAMES),
            'units': ['1'] * 7,
            'data': np.resize(np.array(values, float), 7),
            'dry_run': False,
        }
        return self.make(EXECUTED, **{**fields, **changes})

    def pose(self, position: tuple[float, ...], quaternion_xyzw: tuple[float, ...]):
        types = self.store.types
        point = types['geometry_msgs/msg/Point'](*position)
        quaternion = types['geometry_msgs/msg/Quaternion'](*quaternion_xyzw)
        return self.make(POSE, pose=types['geometry_msgs/msg/Pose'](point, quaternion))

    def status(self, instruction: str):
        fields = {
            **{'state': 3, 'epoch': 1, 'task_id': 1, 'waiting_for': '', 'fault_code': 0},
            **{'fault_message': '', 'dense': False, 'dry_run': True},
        }
        return self.make(STATUS, instruction=instruction, **fields)

    def text(self, text: str):
        return self.make(TEXT, data=text)


def picture(seed: int = 0, rows: int = 6, cols: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, cols, 3), np.uint8)


def jpeg(rgb: np.ndarray) -> bytes:
    return cv2.imencode('.jpg', cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))[1].tobytes()


def write_small_bag(path: Path, storage: StoragePlugin = StoragePlugin.MCAP) -> Path:
    """Two cameras, joints, actions and an instruction, three steps."""
    with BagWriter(path, storage) as bag:
        bag.put('/instruction', 0, bag.text('open the drawer'))
        for step in range(3):
            at = step * PERIOD
            bag.put_image('/cameras/wrist/image_raw', at, picture(step), padding=4)
            bag.put_image('/front_cam/color/image_raw', at, picture(10 + step))
            bag.put('/arm/joint_states', at, bag.joints(('b', 'a'), (step, -step)))
            bag.put('/executed_action', at + 1, bag.action(0.5, step))
            bag.put('/chatter', at, bag.text('not an instruction'))
    return path


def storage_file(bag: Path) -> Path:
    return next(path for path in bag.iterdir() if path.suffix in ('.mcap', '.db3'))


def of_kind(events: list, kind: type) -> list:
    return [event for event in events if isinstance(event, kind)]


def read_all(path: Path, **options) -> list:
    """Every event, images decoded: what a run would touch."""
    events = list(open_recording(path, **options).events())
    for event in of_kind(events, CameraEvent):
        as_rgb(event.image)
    return events


# The recording that ships ----------------------------------------------------------------------


@pytest.fixture(scope='module')
def own() -> tuple:
    recording = open_recording(OWN_BAG)
    return recording, list(recording.events())


def test_own_bag_holds_what_its_readme_says(own):
    recording, events = own
    assert set(recording.cameras) == {'wrist', 'side', 'overhead'}
    assert recording.joint_names == (
        *(f'panda_joint{index}' for index in range(1, 8)),
        'panda_finger_joint1',
        'panda_finger_joint2',
    )
    assert recording.has_actions
    assert recording.duration_s == pytest.approx(7.8, abs=0.05)
    assert [event.text for event in of_kind(events, InstructionEvent)] == [
        'put the black bowl on the plate'
    ]
    for camera in recording.cameras:
        assert sum(event.camera == camera for event in of_kind(events, CameraEvent)) == 155
    assert len(of_kind(events, JointEvent)) == len(of_kind(events, ExecutedAction)) == 155


def test_own_bag_is_sorted_and_starts_at_zero(own):
    _, events = own
    stamps = [event.stamp_ns for event in events]
    assert stamps == sorted(stamps)
    assert stamps[0] == 0
    assert stamps[-1] == pytest.approx(7.8 * NS, abs=0.05 * NS)


def test_own_images_decode(own):
    _, events = own
    for event in of_kind(events, CameraEvent)[::20]:
        image = as_rgb(event.image)
        assert (image.shape, image.dtype) == ((224, 224, 3), np.uint8)
        assert image.std() > 5


def test_own_actions_and_joints_are_plausible(own):
    _, events = own
    actions = of_kind(events, ExecutedAction)
    assert {action.names for action in actions} == {ACTION_NAMES}
    assert {action.units for action in actions} == {('1',) * 7}
    assert {action.space for action in actions} == {ActionSpace.EEF_DELTA_POSE}
    data = np.stack([action.data for action in actions])
    assert np.abs(data).max() <= 1
    assert (data.std(axis=0)[:3] > 0.05).all()
    positions = np.stack([event.positions for event in of_kind(events, JointEvent)])
    assert positions.shape == (155, 9)
    assert np.abs(positions).max() < 2 * np.pi


def test_own_bag_is_small_and_read_alike_as_folder_or_file(own):
    assert sum(path.stat().st_size for path in OWN_BAG.iterdir()) < 4e6
    recording = open_recording(OWN_BAG / 'pick_place.mcap')
    assert (recording.cameras, recording.joint_names) == (own[0].cameras, own[0].joint_names)
    assert sum(1 for _ in recording.events()) == len(own[1])


def test_a_recording_can_be_read_again_and_again(own):
    recording, events = own
    again = recording.events()
    for first, second in zip(events[:20], again, strict=False):
        assert first.stamp_ns == second.stamp_ns
        assert type(first) is type(second)


# Bags of others --------------------------------------------------------------------------------


@pytest.fixture(scope='module', params=[StoragePlugin.MCAP, StoragePlugin.SQLITE3], ids=str)
def small_bag(request, tmp_path_factory) -> Path:
    return write_small_bag(tmp_path_factory.mktemp('bags') / 'small_bag', request.param)


def test_bag_of_both_storages(small_bag):
    recording = open_recording(small_bag)
    assert set(recording.cameras) == {'wrist', 'front_cam'}
    assert recording.joint_names == ('b', 'a')
    assert recording.has_actions
    assert recording.duration_s == pytest.approx(0.1, abs=0.001)
    events = list(recording.events())
    assert [event.text for event in of_kind(events, InstructionEvent)] == ['open the drawer']
    images = of_kind(events, CameraEvent)
    assert [event.stamp_ns for event in images if event.camera == 'wrist'] == [
        0,
        PERIOD,
        2 * PERIOD,
    ]
    for step in range(3):
        for camera, seed in (('wrist', step), ('front_cam', 10 + step)):
            mine = [event for event in images if event.camera == camera]
            np.testing.assert_array_equal(as_rgb(mine[step].image), picture(seed))
    joints = of_kind(events, JointEvent)
    assert [(event.names, event.positions.tolist()) for event in joints] == [
        (('b', 'a'), [step, -step]) for step in range(3)
    ]


def test_executed_actions_of_a_bag(small_bag):
    action = of_kind(read_all(small_bag), ExecutedAction)[2]
    assert action.stamp_ns == 2 * PERIOD + 1
    assert action.names == ACTION_NAMES
    assert action.units == ('1',) * 7
    assert action.data.tolist() == [0.5, 2, 0.5, 2, 0.5, 2, 0.5]
    assert (action.frame_id, action.chunk_id, action.epoch, action.step) == ('base', 3, 2, 1)
    assert (action.space, action.step_dt_s, action.dry_run) == (2, 0.05, False)


def test_bag_as_a_bare_file(small_bag):
    recording = open_recording(storage_file(small_bag))
    assert set(recording.cameras) == {'wrist', 'front_cam'}
    assert len(of_kind(list(recording.events()), CameraEvent)) == 6


def test_cameras_by_topic(small_bag):
    topics = {'left': '/front_cam/color/image_raw'}
    recording = open_recording(small_bag, cameras=topics)
    assert recording.cameras == ('left',)
    images = of_kind(list(recording.events()), CameraEvent)
    assert [event.camera for event in images] == ['left'] * 3
    np.testing.assert_array_equal(as_rgb(images[0].image), picture(10))


def test_instruction_given_outranks_the_recorded(small_bag):
    events = list(open_recording(small_bag, instruction='close it').events())
    assert [event.text for event in of_kind(events, InstructionEvent)] == ['close it']


def test_bag_without_instruction_is_named_after_its_folder(tmp_path):
    with BagWriter(tmp_path / 'stack_the-cups') as bag:
        bag.put_image('/image_raw', 0, picture())
    recording = open_recording(tmp_path / 'stack_the-cups')
    assert recording.cameras == ('camera',)
    assert (recording.joint_names, recording.has_actions) == ((), False)
    assert of_kind(list(recording.events()), InstructionEvent)[0].text == 'stack the cups'


@pytest.mark.parametrize(
    ('topic', 'camera'),
    [
        ('/cameras/wrist/image_raw', 'wrist'),
        ('/cameras/wrist/image_raw/compressed', 'wrist'),
        ('/front-cam/color/image_raw', 'front_cam'),
        ('/robot/head/rgb/image_rect', 'head'),
        ('/image', 'camera'),
    ],
)
def test_camera_names_come_from_topics(topic, camera):
    assert camera_name(topic) == camera


# Videos and npz --------------------------------------------------------------------------------

COLORS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]


def test_depth_is_no_camera_and_every_camera_has_a_name_of_its_own(tmp_path):
    """Bug: depth and infrared fell together under one name, and depth won."""
    with BagWriter(tmp_path / 'bag') as bag:
        for device in ('left', 'right'):
            for stream in ('color/image_raw', 'infra1/image_rect_raw'):
                bag.put_image(f'/{device}/{stream}', 0, picture())
            bag.put_image(f'/{device}/depth/image_rect_raw', 0, picture(), encoding='16UC1')
        bag.put_jpeg('/left/color/image_raw/compressed', 1, jpeg(picture()))
    cameras = open_recording(tmp_path / 'bag').cameras
    assert cameras == ('left', 'left_infra1', 'right', 'right_infra1')


def test_joints_of_one_topic_are_the_robots(tmp_path):
    """Bug: the first joint state of any topic named the joints; a gripper's hid the arm's."""
    with BagWriter(tmp_path / 'bag') as bag:
        bag.put_image('/cameras/side/image_raw', 0, picture())
        bag.put('/gripper/joint_states', 1, bag.joints(('g',), (0.0,)))
        bag.put('/joint_states', 2, bag.joints(('j1', 'j2'), (0.0, 1.0)))
    recording = open_recording(tmp_path / 'bag')
    assert recording.joint_names == ('j1', 'j2')
    assert [event.names for event in of_kind(list(recording.events()), JointEvent)] == [
        ('j1', 'j2')
    ]


def poses_of(path: Path) -> list[PoseEvent]:
    recording = open_recording(path)
    poses = of_kind(list(recording.events()), PoseEvent)
    assert recording.has_poses == bool(poses)
    return poses


@pytest.mark.parametrize('topic', ['/eef_pose', '/arm/left/eef_pose'])
def test_end_effector_pose_in_any_namespace(tmp_path, topic):
    with BagWriter(tmp_path / 'bag') as bag:
        for step in range(3):
            bag.put_image('/cameras/side/image_raw', step * PERIOD, picture())
            bag.put(topic, step * PERIOD, bag.pose((0.1, -0.2, step), (0.6, 0.0, 0.0, 0.8)))
    poses = poses_of(tmp_path / 'bag')
    assert [event.stamp_ns for event in poses] == [0, PERIOD, 2 * PERIOD]
    assert poses[2].position.tolist() == [0.1, -0.2, 2.0]
    assert poses[2].quaternion_xyzw.tolist() == [0.6, 0.0, 0.0, 0.8]
    assert poses[2].frame_id == 'base'


def test_other_poses_are_not_the_end_effectors(tmp_path, small_bag):
    with BagWriter(tmp_path / 'bag') as bag:
        bag.put_image('/cameras/side/image_raw', 0, picture())
        for topic in ('/goal_pose', '/eef_pose/raw', '/my_eef_pose'):
            bag.put(topic, 0, bag.pose((0, 0, 0), (0, 0, 0, 1)))
        bag.put('/twin/eef_pose', 0, bag.text('a text'))
    assert poses_of(tmp_path / 'bag') == poses_of(small_bag) == []


def test_one_arms_poses_are_taken(tmp_path):
    with BagWriter(tmp_path / 'bag') as bag:
        bag.put_image('/cameras/side/image_raw', 0, picture())
        for x, topic in enumerate(('/b/eef_pose', '/a/eef_pose', '/a/filtered/eef_pose')):
            bag.put(topic, x, bag.pose((x, 0, 0), (0, 0, 0, 1)))
    assert [event.position[0] for event in poses_of(tmp_path / 'bag')] == [1.0]


def test_the_robots_topics_say_which_camera_is_which(tmp_path):
    """Bug: the cameras of such a bag were named by their topics, in the order of these."""
    with BagWriter(tmp_path / 'bag') as bag:
        for value, topic in enumerate(('/lab/a/image', '/b/color/image_raw', '/c/image_raw')):
            bag.put_image(topic, 0, np.full((8, 8, 3), value, np.uint8))
    names, topics = ('wrist', 'side'), ('/b/color/image_raw', 'a/image')
    robot = RobotConfig(camera_names=names, camera_topics=topics)
    recording = open_recording(tmp_path / 'bag', robot=robot)
    values = {
        e.camera: e.image.rgb()[0, 0, 0] for e in of_kind([*recording.events()], CameraEvent)
    }
    assert values == {'wrist': 1, 'side': 0, 'c': 2}
    config = dataclasses.replace(PolicyConfig(), robot=robot)
    assert fit_robot(config, recording).robot.camera_names == names
    assert recording.cameras == ('c', 'side', 'wrist')
    for transport in ('raw', 'compressed'):
        changes = {'camera_topics': ('/b/color/image_raw', '/d/image')}
        partly = dataclasses.replace(robot, **changes, camera_transports=(transport,))
        cameras = open_recording(tmp_path / 'bag', robot=partly).cameras
        assert cameras == ('a', 'c', 'wrist'), 'as many as can be told'
    assert open_recording(tmp_path / 'bag').cameras == ('a', 'b', 'c')


def test_one_arms_control_steps_and_tasks_are_taken(tmp_path):
    with BagWriter(tmp_path / 'bag') as bag:
        bag.put_image('/cameras/side/image_raw', 0, picture())
        for at, arm in enumerate(('right', 'left')):
            bag.put(f'/{arm}/executed_action', at, bag.action(float(at)))
            bag.put(f'/{arm}/vla_node/instruction', at, bag.text(f'the {arm} one'))
            bag.put(f'/{arm}/joint_states', at, bag.joints((arm,), (0.0,)))
    for near, arm in (([], 'left'), (['/right/vla_node'], 'right')):
        recording = BagRecording(tmp_path / 'bag', near=near)
        events = list(recording.events())
        assert recording.control_steps == 1
        assert [e.data[0] for e in of_kind(events, ExecutedAction)] == [float(arm == 'left')]
        assert [e.text for e in of_kind(events, InstructionEvent)] == [f'the {arm} one']
        assert recording.joint_names == (arm,)


@pytest.mark.parametrize('named', [False, True])
def test_the_arm_is_that_of_the_cameras(tmp_path, named):
    """Bug: one arm's joints were read beside the other one's actions."""
    with BagWriter(tmp_path / 'bag') as bag:
        bag.put_image('/right/cameras/side/image_raw', 0, picture())
        if named:  # which of both, only the robot says
            bag.put_image('/left/cameras/side/image_raw', 0, picture())
        for at, arm in enumerate(('left', 'right')):
            bag.put(f'/{arm}/executed_action', at, bag.action(float(at)))
            bag.put(f'/{arm}/vla_node/instruction', at, bag.text(f'the {arm} one'))
            joints = (arm, 'more') if arm == 'left' else (arm,)
            bag.put(f'/{arm}/joint_states', at, bag.joints(joints, (0.0,) * len(joints)))
    robot = RobotConfig(camera_names=('hand',), camera_topics=('/right/cameras/side/image_raw',))
    recording = open_recording(tmp_path / 'bag', robot=robot if named else None)
    events = list(recording.events())
    assert recording.joint_names == ('right',)
    assert [e.data[0] for e in of_kind(events, ExecutedAction)] == [1.0]
    assert [e.text for e in of_kind(events, InstructionEvent)] == ['the right one']


def test_joint_states_outside_of_the_namespace_are_the_arms(tmp_path):
    with BagWriter(tmp_path / 'bag') as bag:
        bag.put_image('/arm/cameras/side/image_raw', 0, picture())
        bag.put('/arm/executed_action', 0, bag.action(0.0))
        bag.put('/arm/gripper/state', 1, bag.joints(('g',), (0.0,)))
        bag.put('/joint_states', 2, bag.joints(('j1', 'j2'), (0.0, 1.0)))
    recording = BagRecording(tmp_path / 'bag', near=['/arm/vla_node'])
    assert recording.joint_names == ('j1', 'j2')


def test_empty_action_topic_is_no_action(tmp_path):
    with BagWriter(tmp_path / 'bag') as bag:
        bag.put_image('/cameras/side/image_raw', 0, picture())
        bag._topics['/executed_action'] = bag._writer.add_connection(
            '/executed_action', EXECUTED, typestore=bag.store
        )
    assert not open_recording(tmp_path / 'bag').has_actions


def write_video(path: Path, fps: float = 10.0) -> Path:
    code = cv2.VideoWriter_fourcc(*('MJPG' if path.suffix == '.avi' else 'mp4v'))
    writer = cv2.VideoWriter(str(path), code, fps, (64, 48))
    assert writer.isOpened()
    for color in COLORS:
        writer.write(np.full((48, 64, 3), color[::-1], np.uint8))
    writer.release()
    return path


@pytest.mark.parametrize('suffix', ['.avi', '.mp4'])
def test_video(tmp_path, suffix):
    recording = open_recording(write_video(tmp_path / f'wipe_the-table{suffix}'), camera='front')
    assert recording.cameras == ('front',)
    assert recording.joint_names == ()
    assert (recording.has_poses, recording.has_actions) == (False, False)
    assert recording.duration_s == pytest.approx(0.4)
    text, *images = list(recording.events())
    assert text.text == 'wipe the table'
    assert [event.stamp_ns for event in images] == [0, NS // 10, NS // 5, 3 * NS // 10]
    assert {event.camera for event in images} == {'front'}
    for event, color in zip(images, COLORS, strict=True):
        assert event.image.shape == (48, 64, 3)
        np.testing.assert_allclose(event.image.mean(axis=(0, 1)), color, atol=25)


def test_video_with_an_instruction(tmp_path):
    recording = open_recording(write_video(tmp_path / 'a.avi'), instruction='go home')
    assert next(recording.events()).text == 'go home'
    assert recording.cameras == ('side',)


def write_npz(path: Path, **changes: object) -> Path:
    arrays = {
        'full_image': picture(0),
        'wrist_image': picture(1),
        'state': np.array([0.1, 0.2, 0.3], np.float32),
        'task_description': np.array('pick up the soup'),
        **changes,
    }
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_npz(tmp_path):
    recording = open_recording(write_npz(tmp_path / 'sample.npz'))
    assert recording.cameras == ('full', 'wrist')
    assert not recording.has_poses
    assert recording.joint_names == ('state_0', 'state_1', 'state_2')
    assert not recording.has_actions
    events = list(recording.events())
    stamps = [event.stamp_ns for event in events]
    assert stamps == sorted(stamps)
    assert stamps[-1] <= recording.duration_s * NS
    assert [event.text for event in of_kind(events, InstructionEvent)] == ['pick up the soup']
    for event in of_kind(events, CameraEvent):
        np.testing.assert_array_equal(event.image, picture(event.camera == 'wrist'))
    for event in of_kind(events, JointEvent):
        np.testing.assert_allclose(event.positions, [0.1, 0.2, 0.3], rtol=1e-6)


def test_npz_with_images_alone(tmp_path):
    path = write_npz(tmp_path / 'open_it.npz', state=None, task_description=None)
    recording = open_recording(path, instruction='go')
    assert recording.joint_names == ()
    events = list(recording.events())
    assert events[0].text == 'go'
    assert of_kind(events, JointEvent) == []


def test_npz_without_a_task_is_named_in_words(tmp_path):
    """Bug: bags and videos make words of their file's name, an npz kept 'open_it'."""
    path = write_npz(tmp_path / 'open_it.npz', task_description=None)
    assert next(open_recording(path).events()).text == 'open it'


# What cannot be read ---------------------------------------------------------------------------


def refusal(path: Path, **options) -> str:
    """The message with which a path is refused, at the latest when it is read."""
    with pytest.raises(RecordingError) as caught:
        read_all(path, **options)
    message = str(caught.value)
    assert str(path) in message
    assert len(message) > len(f"recording '{path}': ")
    return message


def test_missing_path(tmp_path):
    assert 'no such file' in refusal(tmp_path / 'none')
    assert 'no such file' in refusal(tmp_path / 'none.mcap')


def test_bag_without_images(tmp_path):
    with BagWriter(tmp_path / 'talk') as bag:
        bag.put('/chatter', 0, bag.text('hello'))
    message = refusal(tmp_path / 'talk')
    assert 'no image topic' in message
    assert '/chatter' in message


def test_camera_topic_that_is_not_in_the_bag(small_bag):
    for topic in ('/nope', '/chatter'):
        message = refusal(small_bag, cameras={'wrist': topic})
        assert topic in message
        assert 'wrist' in message
        assert '/cameras/wrist/image_raw' in message


def test_folder_that_is_no_bag(tmp_path):
    refusal(tmp_path)
    (tmp_path / 'metadata.yaml').write_text('')
    refusal(tmp_path)
    (tmp_path / 'metadata.yaml').write_text('[1, 2')
    refusal(tmp_path)


def test_bag_whose_storage_is_gone(tmp_path, small_bag):
    broken = shutil.copytree(small_bag, tmp_path / 'bag')
    storage_file(broken).unlink()
    refusal(broken)


@pytest.mark.parametrize('name', ['a.mp4', 'a.avi', 'a.mcap', 'a.db3', 'a.npz', 'a.txt', 'a'])
@pytest.mark.parametrize('data', [b'', b'just some text\n', bytes(range(256)) * 20])
def test_other_bytes_under_any_name(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    refusal(tmp_path / name)


@pytest.mark.parametrize(
    ('changes', 'told'),
    [
        ({'full_image': None, 'wrist_image': None}, 'task_description'),
        ({'full_image': picture().astype(np.float32)}, 'float32'),
        ({'full_image': picture()[..., 0]}, r'(6, 8)'),
        ({'full_image': np.zeros((6, 8, 4), np.uint8)}, '(6, 8, 4)'),
        ({'full_image': np.array([None, 1], object)}, ''),
        pytest.param({'full_image': np.zeros((0, 0, 3), np.uint8)}, 'full_image', id='0x0'),
        pytest.param({'state': np.array(['a', 'b'])}, 'state', id='text state'),
        pytest.param({'state': np.zeros((2, 3))}, 'state', id='2-d state'),
    ],
)
def test_npz_of_other_arrays(tmp_path, changes, told):
    """Bug: an empty image, a state of text or of two axes were taken, or a ValueError."""
    assert told in refusal(write_npz(tmp_path / 'bad.npz', **changes))


def test_array_file_under_the_name_of_an_npz(tmp_path):
    """Bug: a .npy renamed to .npz ended in a TypeError."""
    with (tmp_path / 'a.npz').open('wb') as file:
        np.save(file, picture())
    refusal(tmp_path / 'a.npz')


def test_npz_cut_anywhere(tmp_path):
    whole = write_npz(tmp_path / 'a.npz').read_bytes()
    for left in range(0, len(whole) - 1, len(whole) // 60):
        (tmp_path / 'a.npz').write_bytes(whole[:left])
        refusal(tmp_path / 'a.npz')


def test_npz_with_flipped_bytes(tmp_path):
    """Bug: a broken deflate stream ended in zlib.error."""
    np.savez_compressed(tmp_path / 'a.npz', full_image=picture(0, 40, 40))
    whole = (tmp_path / 'a.npz').read_bytes()
    for at in range(200, 1000, 40):
        data = bytearray(whole)
        data[at : at + 8] = b'\xff' * 8
        (tmp_path / 'a.npz').write_bytes(data)
        refusal(tmp_path / 'a.npz')


def test_mcap_cut_anywhere(tmp_path):
    whole = storage_file(write_small_bag(tmp_path / 'bag')).read_bytes()
    path = tmp_path / 'cut.mcap'
    for left in range(0, len(whole) - 1, len(whole) // 60):
        path.write_bytes(whole[:left])
        refusal(path)


@pytest.mark.parametrize('storage', [StoragePlugin.MCAP, StoragePlugin.SQLITE3], ids=str)
def test_storage_cut_inside_a_bag(tmp_path, storage):
    file = storage_file(write_small_bag(tmp_path / 'bag', storage))
    whole = file.read_bytes()
    for share in (0, 0.3, 0.9):
        file.write_bytes(whole[: int(share * len(whole))])
        refusal(tmp_path / 'bag')


@pytest.mark.slow
@pytest.mark.parametrize('storage', [StoragePlugin.MCAP, StoragePlugin.SQLITE3], ids=str)
def test_storage_with_random_damage(tmp_path, storage):
    """Bug: rosbags' own exceptions, struct.error, OverflowError and others came through.

    Damage may go unseen, or cost one image; anything else is a RecordingError.
    """
    file = storage_file(write_small_bag(tmp_path / 'bag', storage))
    whole = file.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(80):
        data, at = bytearray(whole), rng.randrange(len(whole))
        data[at : at + 8] = rng.randbytes(8)
        file.write_bytes(data[: len(whole)])
        try:
            read_all(tmp_path / 'bag')
        except RecordingError:
            refused += 1
        except ObservationError:
            pass
    assert refused


@pytest.mark.parametrize(
    'topic', ['/joint_states', '/eef_pose', '/executed_action', '/cam/image_raw']
)
@pytest.mark.parametrize('cut', [0, 4, 20])
def test_message_that_ends_early(tmp_path, topic, cut):
    """Bug: rosbags' AnyReaderError (or another) came through."""
    with BagWriter(tmp_path / 'bag') as bag:
        bag.put_image('/wrist/image_raw', 0, picture())
        image = bag.make(
            IMAGE, height=1, width=1, encoding='rgb8', is_bigendian=0, step=3,
            data=np.zeros(3, np.uint8),
        )  # fmt: skip
        messages = {
            '/joint_states': bag.joints(('a', 'b'), (1.0, 2.0)),
            '/eef_pose': bag.pose((0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0)),
            '/executed_action': bag.action(0.1),
            '/cam/image_raw': image,
        }
        bag.put(topic, 1, messages[topic], cut)
    refusal(tmp_path / 'bag')


# One bad image in a run ------------------------------------------------------------------------


@pytest.fixture(scope='module')
def policy():
    return make_policy(robot__camera_names=('side',), robot__horizon=4)


@pytest.mark.parametrize(
    'fault', ['garbage', 'cut', 'empty', 'depth', 'encoding', 'short', 'step']
)
def test_one_bad_image_costs_one_query_at_most(tmp_path, policy, fault):
    """Bug: what RawImage and CompressedImage refuse ended the run, from within events()."""
    bad_step, topic = 8, '/cameras/side/image_raw'
    raw = {
        'encoding': {'encoding': '32FC1'},
        'short': {'data': np.zeros(5, np.uint8)},
        'step': {'step': 1},
    }
    with BagWriter(tmp_path / 'bag') as bag:
        for step in range(20):
            at, rgb = step * PERIOD, picture(step // 6, 32, 32)
            bad = fault if step == bad_step else ''
            if fault in raw:
                bag.put_image(topic, at, rgb, **raw.get(bad, {}))
            else:
                data = {'garbage': b'\xff\xd8 no', 'cut': jpeg(rgb)[:200], 'empty': b''}
                kind = 'compressedDepth' if bad == 'depth' else 'jpeg'
                bag.put_jpeg(topic, at, data.get(bad, jpeg(rgb)), kind)
            bag.put('/executed_action', at + 1, bag.action(0.3))
    policy.reset()
    recording = open_recording(tmp_path / 'bag', instruction='go')
    outcomes = [outcome for outcome in run_recording(policy, recording) if outcome is not None]
    errors = [outcome for outcome in outcomes if isinstance(outcome, ObservationError)]
    results = [outcome for outcome in outcomes if isinstance(outcome, tuple)]
    assert [error.field.split('.')[0] for error in errors] == ['cameras/side']
    assert len(results) == 5  # 20 steps, one chunk per 4
    assert results[-1][0].stamp_ns > bad_step * PERIOD


@pytest.mark.parametrize('has_topic', [False, True])
def test_a_task_that_came_as_an_action_is_read_from_the_status(tmp_path, has_topic):
    with BagWriter(tmp_path / 'live') as bag:
        for step, task in enumerate(('', 'open the drawer', 'open the drawer', '', 'close it')):
            bag.put_image('/wrist/image_raw', step * PERIOD, picture(step))
            bag.put('/vla_node/status', step * PERIOD + 1, bag.status(task))
        if has_topic:
            bag.put('/vla_node/instruction', 7, bag.text('as it was said'))
    texts = [event.text for event in of_kind(read_all(tmp_path / 'live'), InstructionEvent)]
    # A latched instruction from before does not hide what came as actions.
    assert texts == [*(['as it was said'] if has_topic else []), 'open the drawer', 'close it']
    given = read_all(tmp_path / 'live', instruction='another')
    assert [event.text for event in of_kind(given, InstructionEvent)] == ['another']


@pytest.mark.ros
@pytest.mark.slow
def test_replayed_actions_are_of_no_chunk(tmp_path):
    """Bug: a node took the recorded chunk numbers for its own chunks."""
    rclpy = pytest.importorskip('rclpy', reason='no ROS here')
    pytest.importorskip('specprune_ros.msg', reason='messages are not built')
    import ros_world

    from specprune_ros.msg import ExecutedAction as ExecutedActionMsg

    parameters = {
        'recording': str(write_small_bag(tmp_path / 'small_bag')),
        'loop': True,
        'wait_for_subscriber_s': 0.0,
    }
    with ros_world.ros_domain(53), ros_world.NodeProcess('replay_node', parameters) as process:
        eye, heard = rclpy.create_node('eye'), []
        eye.create_subscription(ExecutedActionMsg, 'executed_action', heard.append, 10)
        for _ in range(200):
            rclpy.spin_once(eye, timeout_sec=0.1)
            if heard:
                break
        eye.destroy_node()
        assert heard, process.output()
    assert (heard[0].chunk_id, heard[0].epoch) == (0, 0)
    assert list(heard[0].names) == list(ACTION_NAMES)


@pytest.mark.ros
@pytest.mark.slow
@pytest.mark.parametrize('transport', ['raw', 'compressed'])
def test_the_demo_plays_a_robot_with_topics_of_its_own(tmp_path, transport):
    """Bug: the replay named cameras by the topics, vla_node by the robot file."""
    pytest.importorskip('rclpy', reason='no ROS here')
    pytest.importorskip('specprune_ros.msg', reason='messages are not built')
    robot = {
        'camera_names': ['hand', 'view'],
        'camera_topics': ['/cameras/wrist/image_raw', '/front_cam/color/image_raw'],
        'camera_transports': [transport],
        'joint_names': ['a', 'b'],
    }
    params = tmp_path / 'robot.yaml'
    params.write_text(yaml.safe_dump({'/**': {'ros__parameters': {'robot': robot}}}))
    bag, out = write_small_bag(tmp_path / 'small_bag'), tmp_path / 'out'
    words = ['--recording', bag, '--params', 'models/tiny', '--params', params, '--chunks', 2]
    command = [sys.executable, '-m', 'specprune_ros.ros.demo', *map(str, words), '--out', str(out)]
    domain = {'ROS_DOMAIN_ID': '54', 'ROS_AUTOMATIC_DISCOVERY_RANGE': 'LOCALHOST'}
    environment = {**os.environ, **domain}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    line = json.loads((out / 'reports.jsonl').read_text().splitlines()[-1])
    assert line['cameras'] == ['hand', 'view']
