"""An active vla_node under bad input and parameter changes: counted, explained, and it goes on."""

import array
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from rosbags.rosbag2 import Writer
from rosbags.typesys import Stores, get_typestore

rclpy = pytest.importorskip('rclpy', reason='no ROS here: source one, or run scripts/test.sh')
pytest.importorskip('specprune_ros.msg', reason='messages are not built: run scripts/setup.sh')

from geometry_msgs.msg import PoseStamped  # noqa: E402
from rclpy.qos import ReliabilityPolicy, qos_profile_sensor_data  # noqa: E402
from ros_world import CAMERAS, FAST_NODE, JOINTS, NodeProcess, World, ros_domain  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402
from std_msgs.msg import String  # noqa: E402

from specprune_ros.config_files import parameter_names  # noqa: E402
from specprune_ros.health import Health  # noqa: E402
from specprune_ros.inbox import POSE_NAMES, QueryTrigger  # noqa: E402
from specprune_ros.msg import ModelInfo  # noqa: E402
from specprune_ros.ros import conversions, qos, vla_diagnostics  # noqa: E402
from specprune_ros.tasks import TaskMachine  # noqa: E402
from specprune_ros.types import Mode  # noqa: E402

pytestmark = [pytest.mark.ros, pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(autouse=True, scope='module')
def context():
    """One ROS domain for this file's tests and their processes."""
    with ros_domain(0):
        yield


@pytest.fixture(scope='module')
def active():
    """A vla_node that all tests of bad input share: none of them may bring it down."""
    with NodeProcess('vla_node', FAST_NODE) as process:
        node = World('active_world')
        node.start()
        assert node.more_chunks(3), process.output()
        yield node
        assert process.process.poll() is None
        node.destroy_node()


# Chunks ----------------------------------------------------------------------------------------


def test_chunks_and_reports_flow(active):
    active.streams.add('executed')
    active.chunks.clear(), active.reports.clear()
    assert active.more_chunks(3)
    assert active.run(5, lambda: len(active.reports) >= 3)
    active.streams.discard('executed')
    chunk, report = active.chunks[-1], active.reports[-1]
    assert chunk.horizon * len(chunk.names) == len(chunk.data) == 56
    assert np.isfinite(chunk.data).all()
    assert chunk.dry_run
    assert chunk.stand_in
    assert chunk.step_dt.nanosec == 50_000_000
    age = time.time_ns() - (chunk.observation_stamp.sec * 10**9 + chunk.observation_stamp.nanosec)
    assert 0 < age < 5e9
    assert report.cameras == list(CAMERAS)
    assert len(report.reason) == len(report.pruned_after_layer) == 512
    assert list(report.tokens_total) == [256, 256]
    assert report.mode == Mode.COARSE


def test_diagnostics_say_how_it_is(active):
    active.run(3)
    assert active.statuses['vla_node: inputs'].message == 'complete'
    values = {v.key: v.value for v in active.statuses['vla_node: inference'].values}
    assert int(values['queries']) > 0
    assert float(values['latency p95 ms']) > 0
    assert active.statuses['vla_node: inference'].hardware_id.startswith('tiny (stand-in')


def test_diagnostics_never_ask_the_gpu_themselves(monkeypatch):
    """The driver may make the caller wait for a running kernel: the executor must not ask it."""
    asked = []

    def allocated() -> int:
        asked.append(threading.current_thread())
        return 3 << 20

    cuda = SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        current_device=lambda: 0,
        get_device_properties=lambda index: SimpleNamespace(total_memory=8 << 20),
        memory_allocated=allocated,
        memory_reserved=allocated,
        max_memory_allocated=allocated,
    )
    monkeypatch.setitem(sys.modules, 'torch', SimpleNamespace(cuda=cuda))
    health = Health()
    infers = threading.Thread(target=health.look_at_memory)
    infers.start(), infers.join()
    shot = vla_diagnostics.Snapshot(
        name='vla_node', now_ns=0, state='active', machine=TaskMachine(lambda end: None),
        health=health, inbox=None, dense=False, has_reader=None, peer='absent',
    )  # fmt: skip
    values = {v.key: v.value for line in vla_diagnostics.lines(shot) for v in line.values}
    assert values['gpu memory allocated MiB'] == '3'
    assert values['gpu memory total MiB'] == '8'
    assert set(asked) == {infers}


def test_model_info_says_what_runs_not_what_was_asked_for(active):
    got = []
    subscription = active.create_subscription(
        ModelInfo, 'vla_node/model_info', got.append, qos.LATCHED
    )
    assert active.run(5, lambda: bool(got))
    active.destroy_subscription(subscription)
    assert (got[0].head, got[0].dtype, got[0].device) == ('l1', 'float32', 'cpu')


def test_overlay_has_the_image_header_and_a_legend(active):
    got, topic = [], 'vla_node/overlay/side'
    subscription = active.create_subscription(Image, topic, got.append, qos_profile_sensor_data)
    (publisher,) = active.get_publishers_info_by_topic(topic)
    assert publisher.qos_profile.reliability == ReliabilityPolicy.BEST_EFFORT, 'as images are'
    assert active.run(10, lambda: len(got) >= 2)
    active.destroy_subscription(subscription)
    assert got[-1].header.frame_id == 'camera_optical_frame'
    assert got[-1].encoding == 'rgb8'
    assert got[-1].width >= 448
    assert len(got[-1].data) == got[-1].height * got[-1].step


def test_a_query_that_falls_due_amid_the_images_of_a_set_takes_that_set():
    """Bug: it waited for the next images, a frame longer, and then took most of them old."""
    trigger, period_ns = QueryTrigger(CAMERAS, 200_000_000), 200_000_000
    trigger.start(0)
    trigger.queried(0)
    assert not trigger.image('wrist', period_ns - 1)
    assert trigger.image('side', period_ns + 1)
    trigger.queried(period_ns + 1)
    for stamp_ns in (period_ns + 2, period_ns + 3):
        assert not trigger.image('wrist', stamp_ns)
    assert not trigger.image('side', period_ns + 4), 'it is not due'
    assert not trigger.image('wrist', 3 * period_ns), 'the other image is of an older set'
    assert trigger.image('side', 3 * period_ns)


def test_a_query_waits_for_the_arm_s_state_of_its_images(active):
    """Bug: it took the state of the frame before. The world sends the state after the images."""
    active.reports.clear()
    assert active.run(20, lambda: len(active.reports) >= 7)
    lags_ns = [max(r.image_stamps_ns) - min(r.proprio_stamps_ns) for r in active.reports]
    assert np.median(lags_ns) < 25_000_000, 'half a control step'


def test_a_state_that_is_always_late_is_not_waited_for_long(active, monkeypatch):
    late_ns = 200_000_000

    def joint_state():
        return conversions.joints_to_msg(JOINTS, np.zeros(3), active.now_ns() - late_ns)

    monkeypatch.setattr(active, 'joint_state', joint_state)
    active.reports.clear()
    assert active.run(20, lambda: len(active.reports) >= 5)
    newest = active.reports[-1]
    assert max(newest.image_stamps_ns) - min(newest.proprio_stamps_ns) >= late_ns - 50_000_000


# Bad input: one clear message, counted, and the node goes on ------------------------------------


def bad_image(active, **changes):
    return lambda: active.cameras['wrist'].publish(active.image(**changes))


BAD_IMAGES = {
    'image_encoding': ({'encoding': '32FC1'}, ("cameras/wrist.encoding = '32FC1'", 'rgb8')),
    'image_truncated': (
        {'data': array.array('B', bytes(100))},
        ("cameras/wrist.data = '100 bytes'", 'needs 9216'),
    ),
    'image_empty': ({'height': 0, 'width': 0}, ("= '0x0'", 'no pixels')),
    'image_step': ({'step': 5}, ('cameras/wrist.step = 5', '192 bytes')),
}


@pytest.mark.parametrize('code', BAD_IMAGES)
def test_bad_image(active, code):
    changes, words = BAD_IMAGES[code]
    message = active.fault_counted(code, bad_image(active, **changes))
    assert all(word in message for word in words), message
    assert active.more_chunks(2)


@pytest.mark.parametrize(
    ('code', 'names', 'positions', 'words'),
    [
        ('joint_not_finite', ('j1', 'j2', 'j3'), (0.0, np.nan, 0.0), ('position', "'j2': nan")),
        ('joint_missing', ('j1', 'j2'), (0.0, 0.0), ('joint_states.name', "lacks ['j3']")),
    ],
)
def test_bad_joint_state(active, code, names, positions, words):
    message = active.fault_counted(
        code, lambda: active.joints.publish(active.joint_state(names, positions))
    )
    assert all(word in message for word in words), message
    assert active.more_chunks(2)


def test_joints_in_another_order_are_taken(active):
    before = dict(active.faults)
    active.joints.publish(active.joint_state(('j3', 'extra', 'j1', 'j2'), (3, 9, 1, 2)))
    assert active.more_chunks(2)
    assert active.faults == before


def test_empty_instruction(active):
    message = active.fault_counted(
        'instruction_empty', lambda: active.instruction.publish(String(data=' '))
    )
    assert "instruction = ' '" in message
    assert active.more_chunks(2)


def test_missing_camera(active):
    active.streams.discard('wrist')
    try:
        message = active.fault_counted('camera_stale', lambda: None)
        assert 'cameras/wrist' in message
        count = len(active.chunks)
        active.run(1.0)
        assert len(active.chunks) == count, 'a chunk from a stale camera'
        assert active.run(3, lambda: active.statuses['vla_node: inputs'].level == b'\x03')
    finally:
        active.streams.add('wrist')
    start = time.monotonic()
    assert active.more_chunks(1)
    print(f'chunks again {time.monotonic() - start:.2f} s after the camera is back')


def test_camera_of_another_size(active):
    pixels = np.zeros((30, 40, 3), np.uint8)

    def small(camera='wrist'):
        return conversions.image_to_msg(pixels, active.now_ns(), '')

    active.streams.discard('wrist')
    try:
        before = active.faults.get('camera_resized', 0)
        grown = lambda: active.faults.get('camera_resized', 0) > before  # noqa: E731
        for _ in range(40):
            active.cameras['wrist'].publish(small())
            if active.run(0.1, grown):
                break
        assert grown()
        assert '(30, 40)' in active.messages['camera_resized']
        assert '(48, 64)' in active.messages['camera_resized']
        count = len(active.chunks)
        for _ in range(40):
            active.cameras['wrist'].publish(small())
            if active.run(0.1, lambda: len(active.chunks) > count):
                break
        assert len(active.chunks) > count, 'the new size is taken from the next query on'
    finally:
        active.streams.add('wrist')
    assert active.more_chunks(2)


def test_stampless_image_is_taken_and_reported(active):
    msg = active.image()
    msg.header.stamp.sec = msg.header.stamp.nanosec = 0
    message = active.fault_counted('stamp_missing', lambda: active.cameras['wrist'].publish(msg))
    assert 'cameras/wrist.header.stamp' in message


def test_executed_action_with_nan(active):
    message = active.fault_counted(
        'action_not_finite', lambda: active.executed.publish(active.action(x=float('nan')))
    )
    assert 'executed_action.data' in message
    assert active.more_chunks(2)


def test_new_instruction_starts_an_epoch(active):
    epoch = active.chunks[-1].epoch
    active.instruction.publish(String(data='open the drawer'))
    assert active.run(10, lambda: active.chunks[-1].epoch > epoch)


# End-effector pose -----------------------------------------------------------------------------


def test_only_a_robot_whose_state_needs_poses_waits_for_them(active):
    assert active.count_subscribers('joint_states') == 1
    assert active.count_subscribers('eef_pose') == 0


@pytest.mark.slow
def test_pose_as_proprioception():
    world = World('posed_world', namespace='posed')
    poses = world.create_publisher(PoseStamped, 'eef_pose', 1)

    def send(*quaternion: float) -> None:
        position = np.array([0.1, 0.2, 0.3])
        poses.publish(conversions.pose_to_msg(position, quaternion, world.now_ns(), 'base'))

    robot = {'robot.joint_names': list(POSE_NAMES)}
    with NodeProcess('vla_node', {**FAST_NODE, **robot}, '-r', '__ns:=/posed') as process:
        world.start()
        message = world.fault_counted('pose_missing', lambda: None)
        assert 'eef_pose' in message
        assert world.count_subscribers('joint_states') == 0
        world.create_timer(0.03, lambda: send(1.0, 0.0, 0.0, 0.0))
        assert world.more_chunks(2), process.output()
        message = world.fault_counted('pose_quaternion', lambda: send(0.0, 0.0, 0.0, 0.0))
        assert 'eef_pose.orientation' in message
        assert world.more_chunks(2)
    world.destroy_node()


def write_pose_bag(path) -> None:
    """One grey image and one pose, a tenth of a second later."""
    store = get_typestore(Stores.ROS2_HUMBLE)
    types = {name.rpartition('/')[2]: kind for name, kind in store.types.items()}
    header = types['Header'](types['Time'](0, 0), 'base')
    pose = types['Pose'](types['Point'](0.1, 0.2, 0.3), types['Quaternion'](0.6, 0.0, 0.0, 0.8))
    image = types['Image'](header, 2, 2, 'rgb8', 0, 6, np.full(12, 90, np.uint8))
    messages = {
        '/cameras/side/image_raw': image,
        '/arm/eef_pose': types['PoseStamped'](header, pose),
    }
    with Writer(path, version=8) as writer:
        for index, (topic, message) in enumerate(messages.items()):
            kind = message.__msgtype__
            connection = writer.add_connection(topic, kind, typestore=store)
            data = store.serialize_cdr(message, kind)
            writer.write(connection, 1_000_000_000 + index * 100_000_000, data)


def test_replay_publishes_recorded_poses(tmp_path):
    write_pose_bag(tmp_path / 'bag')
    replay = {'recording': str(tmp_path / 'bag'), 'loop': True, 'wait_for_subscriber_s': 0.0}
    world, got = World('replay_world', namespace='replayed'), []
    world.streams.clear()
    world.create_subscription(PoseStamped, 'eef_pose', got.append, 1)
    with NodeProcess('replay_node', replay, '-r', '__ns:=/replayed') as process:
        assert world.run(30, lambda: len(got) >= 2), process.output()
    world.destroy_node()
    assert abs(time.time_ns() - conversions.to_ns(got[-1].header.stamp)) < 10e9
    assert got[-1].header.frame_id == 'base'
    assert conversions.pose_from_msg(got[-1]) == ((0.1, 0.2, 0.3), (0.6, 0.0, 0.0, 0.8))


# Parameters ------------------------------------------------------------------------------------


def test_every_parameter_is_described(active):
    for name, descriptor in zip(
        parameter_names(), active.describe(parameter_names()), strict=True
    ):
        assert descriptor.name == name
        assert len(descriptor.description) > 10, name
    alpha = active.describe(['pruning.alpha'])[0]
    assert alpha.floating_point_range[0].to_value == 2.0


@pytest.mark.parametrize(
    ('name', 'value', 'words'),
    [
        ('pruning.alpha', 50.0, ('pruning.alpha', '50')),
        ('pruning.alpha', 'many', ('pruning.alpha', 'many', 'float')),
        ('pruning.method', 'fastest', ('pruning.method', 'fastest', 'specprune')),
        ('robot.horizon', 9, ('robot.horizon = 9', 'fixed')),
        ('pruning.alhpa', 0.5, ('pruning.alhpa = 0.5', "did you mean 'pruning.alpha'")),
        ('prunning.method', 'none', ('prunning.method', 'unknown parameter')),
    ],
)
def test_bad_parameter_keeps_the_old_value(active, name, value, words):
    successful, reason = active.set_parameter(name, value)
    assert not successful
    assert reason
    assert all(word in reason for word in words), reason
    assert active.get_parameter_value('pruning.alpha') == 0.8
    assert active.more_chunks(1)


def test_unknown_parameter_is_counted(active):
    message = active.fault_counted('config', lambda: active.set_parameter('pruning.alhpa', 0.5))
    assert 'pruning.alhpa = 0.5' in message


def test_live_parameters(active):
    active.run(1)
    assert active.set_parameter('pruning.alpha', 0.4) == (True, '')
    try:
        assert active.run(10, lambda: active.reports[-1].alpha == pytest.approx(0.4))
        assert active.set_parameter('pruning.method', 'none')[0]
        assert active.run(10, lambda: active.reports[-1].method == 'none')
        assert active.reports[-1].mode == Mode.DENSE
    finally:
        assert active.set_parameter('pruning.method', 'specprune')[0]
        assert active.set_parameter('pruning.alpha', 0.8)[0]
