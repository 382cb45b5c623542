"""Faults of a real vla_node, each injected: counted, numbered, told, and the node goes on."""

import os
import signal
import time
from contextlib import contextmanager

import numpy as np
import pytest

rclpy = pytest.importorskip('rclpy', reason='no ROS here: source one, or run scripts/test.sh')
pytest.importorskip('specprune_ros.msg', reason='messages are not built: run scripts/setup.sh')

from action_msgs.msg import GoalStatus  # noqa: E402
from rclpy.qos import QoSProfile, ReliabilityPolicy, qos_profile_sensor_data  # noqa: E402
from ros_world import CAMERAS, STOP_S, ros_domain  # noqa: E402
from rosgraph_msgs.msg import Clock  # noqa: E402
from sensor_msgs.msg import Image  # noqa: E402
from std_msgs.msg import Bool, String  # noqa: E402
from task_world import FaultyProcess, TaskWorld  # noqa: E402

from specprune_ros.msg import ActionChunk, ExecutedAction, StreamerStatus  # noqa: E402
from specprune_ros.ros import conversions, qos  # noqa: E402
from specprune_ros.srv import InferOnce  # noqa: E402
from specprune_ros.tasks import EndReason, NodeState  # noqa: E402

# Robots' speed: all of it is slow.
pytestmark = [pytest.mark.ros, pytest.mark.slow, pytest.mark.timeout(120)]
WARN, ERROR = b'\x01', b'\x02'


@pytest.fixture(autouse=True, scope='module')
def context():
    """One ROS domain for this file's tests and their processes."""
    with ros_domain(21):
        yield


@pytest.fixture(scope='module')
def shared():
    """An active node that all tests of this file but a few share: none may bring it down."""
    with FaultyProcess({'runtime.max_result_age_s': 0.3}) as process:
        node = TaskWorld()
        node.activate()
        yield node
        assert process.process.poll() is None, process.output()
        node.destroy_node()


@pytest.fixture
def world(shared):
    """The node, idle and well."""
    shared.streams = {*CAMERAS, 'joints'}
    shared.behave('ok')
    assert shared.run(5.0, lambda: shared.trigger('reset').success)
    assert shared.reaches(NodeState.IDLE)
    shared.chunks.clear(), shared.history.clear()
    return shared


@contextmanager
def own_process(kind: type[TaskWorld], namespace: str, parameters: dict[str, object]):
    """A world and an active node of a test's own."""
    with FaultyProcess(parameters, '-r', f'__ns:=/{namespace}') as process:
        node = kind(f'{namespace}_world', namespace=namespace)
        node.activate()
        yield node, process
        node.destroy_node()


# Inference -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('mode', 'number', 'words'),
    [
        ('raise', 301, 'the policy broke'),
        ('nan', 305, 'not finite'),
        ('oom', 304, '20 GiB'),
        ('bad_input', 207, 'does not decode'),
    ],
)
def test_inference_that_fails_in_a_row_ends_the_task(world, mode, number, words):
    handle = world.send()
    assert world.more_chunks(2)
    world.behave(mode)
    count = len(world.chunks)
    status, result = world.outcome(handle)
    assert status == GoalStatus.STATUS_ABORTED
    assert result.termination_reason == EndReason.POLICY_ERROR
    assert result.error_code == number
    assert words in result.message
    assert '3 inferences in a row' in result.message
    assert all(np.isfinite(chunk.data).all() for chunk in world.chunks)
    assert len(world.chunks) <= count + 1
    assert world.status.fault_code == number
    world.behave('ok')
    assert world.begin().accepted, 'the node stays up'
    assert world.more_chunks(2)


def test_a_single_failure_costs_one_query(world):
    assert world.begin().accepted
    assert world.more_chunks(1)
    world.mode.publish(String(data='raise'))
    assert world.told(301)
    world.behave('ok')
    assert world.more_chunks(2)
    assert world.trigger('reset').success
    assert world.run(5, lambda: world.status.fault_code == 0), 'a reset forgives'


def test_late_result_is_discarded(world):
    world.behave('slow 0.4')
    assert world.begin().accepted
    assert world.told(302)
    world.run(0.5)
    assert not world.chunks
    world.behave('ok')
    assert world.more_chunks(2)


def test_hung_inference_that_returns(world):
    handle = world.send()
    assert world.more_chunks(1)
    world.behave('slow 1.5')
    start = time.monotonic()
    status, result = world.outcome(handle)
    print(f'a hang was told {time.monotonic() - start:.2f} s after it began (deadline 0.5 s)')
    assert (status, result.termination_reason) == (
        GoalStatus.STATUS_ABORTED, EndReason.POLICY_ERROR,
    )  # fmt: skip
    assert result.error_code == 303
    assert world.state is NodeState.FAULT
    world.behave('ok')
    world.chunks.clear()
    assert not world.begin().accepted
    answer = world.trigger('reset')
    assert not answer.success
    assert 'clean up and configure' in answer.message
    assert (
        'hung' in world.call(InferOnce, 'infer_once', InferOnce.Request(instruction='x')).message
    )
    assert world.run(5, lambda: world.trigger('reset').success)
    assert not world.chunks, 'the result of a hung inference was published'
    assert world.begin().accepted
    assert world.more_chunks(2)


def test_inference_that_never_returns():
    """Reconfiguring is the way back; and the process still ends at once."""
    with own_process(TaskWorld, 'forever', {}) as (world, process):
        world.behave('forever')
        assert world.begin().accepted
        assert world.reaches(NodeState.FAULT)
        assert not world.trigger('reset').success
        world.behave('ok')
        for transition in ('deactivate', 'cleanup', 'configure', 'activate'):
            assert world.lifecycle.change(transition)
        assert world.reaches(NodeState.IDLE)
        assert world.begin().accepted
        assert world.more_chunks(2)
        status, seconds = process.stop()
        assert status == 0, process.output()
        assert seconds < STOP_S


def test_joint_states_keep_their_rate_while_an_inference_runs(world):
    """Bug of peers: inference in a callback stops all others."""
    world.behave('slow 0.45')
    assert world.begin().accepted
    world.run(2.5)
    values = {v.key: v.value for v in world.statuses['vla_node: inputs'].values}
    rate = float(values['joint_states rate Hz'])
    print(f'joint states arrive at {rate:.1f} Hz of about 28 sent, inference takes 0.45 s')
    assert rate > 18


# Stops -----------------------------------------------------------------------------------------


def test_emergency_stop_while_an_inference_runs(world):
    world.behave('slow 0.4')
    assert world.begin().accepted
    world.run(0.2)
    start = time.monotonic()
    world.stop()
    while world.status.state != NodeState.STOPPED:
        rclpy.spin_once(world, timeout_sec=0.001)
        assert time.monotonic() - start < 5
    print(f'e_stop to STOPPED: {1e3 * (time.monotonic() - start):.0f} ms')
    assert time.monotonic() - start < 0.1
    assert world.run(3, lambda: world.statuses['vla_node: task'].level == ERROR)
    assert not world.chunks
    world.stop(False)
    world.run(0.1)


def test_emergency_stop_before_activation(world):
    assert world.lifecycle.change('deactivate')
    world.stop()
    world.run(0.2)
    assert world.lifecycle.change('activate')
    assert world.reaches(NodeState.STOPPED)
    assert not world.begin().accepted
    world.stop(False)
    world.run(0.2)


def test_sigint_tells_the_client():
    with own_process(TaskWorld, 'sigint', {}) as (world, process):
        handle = world.send()
        result = handle.get_result_async()
        assert world.more_chunks(1)
        process.process.send_signal(signal.SIGINT)
        assert world.run(5, result.done), 'the client waits for ever'
        assert result.result().result.termination_reason == EndReason.DEACTIVATED
        assert process.process.wait(5) == 0, process.output()


# The system around -----------------------------------------------------------------------------


def test_lost_subscriber(world):
    """Counted once for every loss, and only while a task runs."""
    (own,) = (s for s in world.subscriptions if s.topic_name.endswith('action_chunk'))
    world.destroy_subscription(own)
    world.run(1.5)
    before = world.faults.get('subscriber_gone', 0)
    assert world.begin().accepted
    assert world.run(5, lambda: world.faults.get('subscriber_gone', 0) == before + 1)
    assert world.run(3, lambda: world.statuses['vla_node: peers'].level == WARN)
    world.run(1.5)
    assert world.faults['subscriber_gone'] == before + 1
    assert world.state is NodeState.RUNNING
    world.create_subscription(ActionChunk, 'vla_node/action_chunk', world.chunks.append, 100)
    assert world.more_chunks(1)
    assert world.run(3, lambda: world.statuses['vla_node: peers'].level == b'\x00')


def test_dead_streamer(world):
    assert 'peer_gone' not in world.faults
    heartbeat = world.create_publisher(StreamerStatus, 'action_streamer/status', qos.LATCHED)
    beat = world.create_timer(0.1, lambda: heartbeat.publish(StreamerStatus()))
    world.run(1.5)
    assert 'peer_gone' not in world.faults
    world.destroy_timer(beat)
    start = time.monotonic()
    assert world.told(602)
    print(f'a dead streamer was told after {time.monotonic() - start:.2f} s')
    assert world.run(3, lambda: world.statuses['vla_node: peers'].level == WARN)
    world.run(1.2)
    assert world.faults['peer_gone'] == 1
    world.destroy_publisher(heartbeat)


def test_incompatible_quality_of_service(world):
    best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    deaf = world.create_publisher(ExecutedAction, 'executed_action', best_effort)
    assert world.told(604)
    assert 'executed_action' in world.status.fault_message
    assert 'RELIABILITY' in world.status.fault_message
    world.destroy_publisher(deaf)
    assert world.trigger('reset').success
    latched = world.create_subscription(
        ActionChunk, 'vla_node/action_chunk', lambda _: None, qos.LATCHED
    )
    assert world.told(604)
    assert 'action_chunk' in world.status.fault_message
    world.destroy_subscription(latched)
    assert world.trigger('reset').success
    button = world.create_publisher(Bool, 'e_stop', 1)
    assert world.told(604), 'an emergency stop that is not heard'
    assert 'e_stop.DURABILITY' in world.status.fault_message
    world.destroy_publisher(button)


class SimWorld(TaskWorld):
    """A world whose time is its own."""

    def __init__(self, *args, **kwargs):
        self.sim_ns = 100 * 10**9
        super().__init__(*args, **kwargs)
        self.clock = self.create_publisher(Clock, '/clock', 10)

    def now_ns(self) -> int:
        return self.sim_ns

    def publish(self) -> None:
        self.sim_ns += 33_000_000
        self.clock.publish(Clock(clock=conversions.to_time(self.sim_ns)))
        super().publish()


def test_simulated_clock_that_jumps_back():
    with own_process(SimWorld, 'sim', {'use_sim_time': True}) as (world, process):
        assert world.begin().accepted
        assert world.more_chunks(3), process.output()
        epoch, jumped_ns = world.status.epoch, world.sim_ns - 50 * 10**9
        world.sim_ns = jumped_ns
        assert world.run(5, lambda: any(each.fault_code == 601 for each in world.history))
        assert world.run(5, lambda: world.status.epoch > epoch)
        assert world.state is NodeState.RUNNING, 'the task goes on'
        world.chunks.clear()
        assert world.more_chunks(3)
        stamps = [conversions.to_ns(chunk.observation_stamp) for chunk in world.chunks]
        assert all(jumped_ns < stamp < jumped_ns + 20 * 10**9 for stamp in stamps)
        assert {chunk.epoch for chunk in world.chunks} == {world.status.epoch}


# Latency ---------------------------------------------------------------------------------------

BIG = ('wrist', 'side', 'overhead')


class BigWorld(TaskWorld):
    """Three cameras of 640x480 at 30 Hz, and when every chunk came."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.big = {
            name: self.create_publisher(
                Image, f'cameras/{name}/image_raw', qos_profile_sensor_data
            )
            for name in BIG
        }
        self.streams.clear()
        self.delays_ms: list[float] = []
        self.picture = conversions.image_to_msg(np.zeros((480, 640, 3), np.uint8), 0, '')
        self.create_subscription(ActionChunk, 'vla_node/action_chunk', self.on_chunk, 1)
        self.newest_ns = 0

    def publish(self) -> None:
        for publisher in self.big.values():
            self.newest_ns = time.time_ns()
            self.picture.header.stamp = conversions.to_time(self.newest_ns)
            publisher.publish(self.picture)

    def on_chunk(self, msg: ActionChunk) -> None:
        self.delays_ms.append((time.time_ns() - self.newest_ns) / 1e6)


def test_latency_from_the_newest_image_to_the_chunk():
    parameters = {
        'robot.camera_names': list(BIG),
        'robot.joint_names': [''],
        'runtime.query_rate_hz': 5.0,
    }
    with own_process(BigWorld, 'big', parameters) as (world, _):
        assert world.begin().accepted
        world.run(3.0)
        world.delays_ms.clear()
        world.run(20.0)
        p50, p95 = np.percentile(world.delays_ms, [50, 95])
        count, load = len(world.delays_ms), os.getloadavg()[0]
        print(f'newest image to chunk: p50 {p50:.1f} ms, p95 {p95:.1f} ms ({count}, load {load})')
        assert count > 50
        assert p50 < 25, 'a query waits for a timer'
