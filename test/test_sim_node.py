"""`sim_node` on the wire, around a simulator that is a point with a gripper."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

pytest.importorskip('rclpy', reason='no ROS here')
pytest.importorskip('specprune_ros.msg', reason='messages are not built')

import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from point_arm import GOAL_X, Point
from rclpy.executors import SingleThreadedExecutor
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import Trigger

from specprune_ros.errors import ConfigError
from specprune_ros.ros import conversions, qos
from specprune_ros.ros.sim_node import SimNode
from specprune_ros.sim.state import JOINTS, STEP_NS

pytestmark = [pytest.mark.ros, pytest.mark.slow, pytest.mark.timeout(60)]
WAIT_S = 10.0


class Peer:
    """What the rest of the robot sees of it."""

    def __init__(self):
        self.node = rclpy.create_node('peer')
        self.seen: dict[str, list] = {}
        for name, kind, topic, profile in (
            ('clock', Clock, '/clock', 10),
            ('joints', JointState, 'joint_states', 10),
            ('pose', PoseStamped, 'eef_pose', 10),
            ('image', Image, 'cameras/wrist/image_raw', 10),
            ('episode', String, 'sim_node/episode', qos.LATCHED),
            ('instruction', String, 'vla_node/instruction', qos.LATCHED),
            ('diagnostics', DiagnosticArray, '/diagnostics', 10),
        ):
            self.seen[name] = []
            self.node.create_subscription(kind, topic, self.seen[name].append, profile)
        self.twist = self.node.create_publisher(TwistStamped, 'delta_twist_cmds', 10)
        self.gripper = self.node.create_publisher(Float64MultiArray, 'gripper_command', 10)
        self.reset = self.node.create_client(Trigger, 'sim_node/reset')

    def until(self, holds, seconds=WAIT_S) -> bool:
        end = time.monotonic() + seconds
        while not holds() and time.monotonic() < end:
            rclpy.spin_once(self.node, timeout_sec=0.02)
        return bool(holds())

    def now_ns(self) -> int:
        return conversions.to_ns(self.seen['clock'][-1].clock)

    def drive(self, x: float, seconds=WAIT_S, until=lambda: False) -> bool:
        """Send velocities at the control rate."""
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            msg = TwistStamped()
            msg.header.stamp = conversions.to_time(self.now_ns())
            msg.twist.linear.x = x
            self.twist.publish(msg)
            self.until(until, STEP_NS / 1e9)
        return bool(until())

    def begin(self) -> tuple[bool, str]:
        assert self.until(self.reset.service_is_ready)
        future = self.reset.call_async(Trigger.Request())
        assert self.until(future.done)
        return future.result().success, future.result().message

    @property
    def episode(self) -> dict:
        return json.loads(self.seen['episode'][-1].data)

    @property
    def faults(self) -> set[str]:
        statuses = [s for msg in self.seen['diagnostics'] for s in msg.status]
        return {v.key for s in statuses if s.name.endswith('faults') for v in s.values}

    @property
    def x(self) -> float:
        return self.seen['pose'][-1].pose.position.x


@pytest.fixture
def run(request):
    """Starts `sim_node` around a point, in this process."""
    started = []

    def start(make=Point, **parameters):
        arguments = ['--ros-args']
        for name, value in {'cameras': '[wrist]', 'size': 16, **parameters}.items():
            arguments += ['-p', f'{name}:={value}']
        rclpy.init(args=arguments)
        node = SimNode(make=lambda task, cameras, size: make(cameras, size))
        executor, halt = SingleThreadedExecutor(), threading.Event()
        executor.add_node(node)

        def spin():
            while not halt.is_set():
                executor.spin_once(timeout_sec=0.05)

        thread = threading.Thread(target=spin)
        thread.start()
        peer = Peer()
        started.append((node, halt, thread, peer))
        return node, peer

    yield start
    for node, halt, thread, peer in started:
        assert node.shut_down()
        halt.set()
        thread.join(5)
        peer.node.destroy_node()
        node.destroy_node()
        rclpy.shutdown()


def test_the_world_comes_with_stamps_of_its_own_time(run):
    _, peer = run(upside_down='[wrist]')
    assert peer.until(lambda: len(peer.seen['image']) >= 10 and len(peer.seen['joints']) >= 10)
    assert peer.until(lambda: peer.seen['instruction'] and peer.seen['episode'])
    clock = [conversions.to_ns(msg.clock) for msg in peer.seen['clock']]
    assert clock == sorted(clock)
    assert len(set(clock)) > 20, 'time passes between control steps, too'
    stamps = [conversions.to_ns(msg.header.stamp) for msg in peer.seen['joints']]
    assert set(np.diff(stamps)) == {STEP_NS}
    assert list(peer.seen['joints'][0].name) == list(JOINTS)
    assert peer.seen['joints'][0].position[3] == pytest.approx(0.3)
    image = peer.seen['image'][0]
    pixels = np.frombuffer(image.data, np.uint8).reshape(image.height, image.width, 3)
    assert (image.height, image.width, image.encoding) == (16, 16, 'rgb8')
    assert pixels[-1].min() == 200, 'upside down'
    assert peer.seen['instruction'][0].data == 'move away'
    assert peer.episode == {
        'task': 'point/0', 'seed': 0, 'split': 'eval', 'state': 'running', 'step': 0,
    }  # fmt: skip


def test_velocities_move_it_and_stop_moving_it(run):
    _, peer = run(translation_unit_m=0.01)
    assert peer.until(lambda: peer.seen['pose'] and peer.seen['clock'])
    peer.drive(0.1, 0.6)  # half a full command
    assert peer.x > 0.002
    peer.until(lambda: False, 0.4)
    before = peer.x
    peer.until(lambda: False, 0.4)
    assert peer.x == before, 'commands that are not renewed'
    peer.gripper.publish(Float64MultiArray(data=[0.0]))
    peer.gripper.publish(Float64MultiArray(data=[0.0, 0.0]))
    msg = TwistStamped()
    msg.twist.linear.x = float('nan')
    msg.header.stamp = conversions.to_time(peer.now_ns())
    peer.twist.publish(msg)
    faults = {'command_width', 'command_not_finite'}
    assert peer.until(lambda: faults <= peer.faults), peer.faults
    assert np.isfinite(peer.x)


def test_success_ends_the_episode_and_reset_begins_the_next(run):
    node, peer = run(translation_unit_m=0.001, rate=5.0)
    assert peer.until(lambda: peer.seen['clock'] and peer.seen['pose'] and peer.seen['episode'])
    assert peer.drive(0.1, until=lambda: peer.episode['state'] == 'success')
    assert peer.episode['step'] > 10
    peer.drive(0.1, 0.3)
    assert GOAL_X < peer.x < GOAL_X + 0.004, 'it stands still then'
    before_ns = peer.now_ns()
    node.set_parameters([rclpy.parameter.Parameter('seed', value=7)])
    told, words = peer.begin()
    assert told, words
    assert 'seed 7' in words
    assert peer.until(lambda: peer.episode['seed'] == 7 and peer.episode['state'] == 'running')
    assert peer.until(lambda: peer.seen['pose'][-1].pose.position.y == pytest.approx(7))
    assert peer.x == 0.0
    assert peer.now_ns() >= before_ns, 'time goes on'


def test_a_seed_that_the_task_has_not_is_refused_and_the_episode_goes_on(run):
    node, peer = run()
    assert peer.until(lambda: peer.seen['pose'] and peer.seen['clock'])
    node.set_parameters([rclpy.parameter.Parameter('seed', value=13)])
    told, words = peer.begin()
    assert not told
    assert 'brings bad luck' in words
    count = len(peer.seen['pose'])
    assert peer.until(lambda: len(peer.seen['pose']) > count + 3)


def test_the_step_limit_ends_an_episode(run):
    _, peer = run(lambda cameras, size: Point(cameras, size, max_steps=5), rate=5.0)
    assert peer.until(lambda: peer.seen['episode'] and peer.episode['state'] == 'failed')
    assert peer.episode['step'] == 5


@pytest.mark.parametrize(
    ('error', 'fault'),
    [
        (ConfigError('task', 'nowhere/1', 'no such task'), 'config'),
        (FileNotFoundError('no such .bddl'), 'error'),
    ],
)
def test_without_the_simulator_it_says_so_and_stays(run, error, fault):
    """Bug: an error of the simulator's own left it `loading` for ever."""

    def make(cameras, size):
        raise error

    _, peer = run(make)
    assert peer.until(lambda: peer.seen['episode'])
    assert peer.until(lambda: peer.episode == {'state': 'failed to start'})
    assert peer.until(lambda: fault in peer.faults)
    told, words = peer.begin()
    assert not told
    assert 'failed to start' in words


@pytest.mark.parametrize('when', ['step', 'reset'])
def test_a_simulator_that_breaks_says_so(run, when):
    """Bug: its thread died unseen, and the episode was said to run."""

    class Brittle(Point):
        def step(self, action):
            if self.steps > 5 and when == 'step':
                raise RuntimeError('unstable')
            return super().step(action)

        def reset(self, seed, split):
            if when == 'reset':
                raise ConfigError('seed', seed, 'brings bad luck')
            return super().reset(seed, split)

    _, peer = run(Brittle)
    assert peer.until(lambda: peer.seen['episode'] and peer.episode['state'] == 'broken')
    assert peer.until(lambda: peer.faults & {'error', 'config'}), peer.faults
    told, words = peer.begin()
    assert not told
    assert 'broken' in words


def test_a_reset_that_breaks_the_simulator_is_answered_at_once(run):
    """Bug: who asked for it waited until time was up."""

    class Brittle(Point):
        def reset(self, seed, split):
            if self.steps:
                raise RuntimeError('unstable')
            return super().reset(seed, split)

    _, peer = run(Brittle)
    assert peer.until(lambda: peer.seen['episode'] and peer.episode['state'] == 'running')
    assert peer.until(lambda: len(peer.seen['pose']) > 3)
    told, words = peer.begin()
    assert not told
    assert 'unstable' in words
    assert peer.until(lambda: peer.episode['state'] == 'broken')
