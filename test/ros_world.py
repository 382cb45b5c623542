"""A robot's worth of publishers and subscribers, and processes that never outlive a test."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import dds_memory
import numpy as np
import pytest
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rcl_interfaces.msg import Parameter as ParameterMsg
from rcl_interfaces.srv import DescribeParameters, GetParameters, SetParameters
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from specprune_ros.msg import ActionChunk, ExecutedAction, PruningDiagnostics
from specprune_ros.ros import conversions, qos
from specprune_ros.ros.arguments import ros_arguments
from specprune_ros.ros.lifecycle import TRANSITIONS, LifecycleClient
from specprune_ros.ros.process import shut_down_rclpy
from specprune_ros.types import Mode

ROOT = Path(__file__).resolve().parent.parent
CAMERAS = ('wrist', 'side')
JOINTS = ('j1', 'j2', 'j3')
FAST_NODE = {
    'robot.camera_names': list(CAMERAS),
    'robot.joint_names': list(JOINTS),
    'model.threads': 1,
    'runtime.query_rate_hz': 10.0,
    'runtime.warm_up_queries': 1,
}
START_S, STOP_S, ANSWER_S, AGAIN_S = 40.0, 3.0, 20.0, 5.0
# Humble's and Jazzy's rclpy do not: there, only a new configuration hears all buttons anew.
TELLS_SENDERS = 'publisher_gid' in getattr(
    getattr(rclpy.subscription, 'MessageInfo', None), '__annotations__', {}
)


class NodeProcess:
    """One of our nodes as a process of its own, killed at the latest when the block ends."""

    def __init__(self, module: str, parameters: dict[str, object] | None = None, *extra: str):
        command = [sys.executable, '-m', f'specprune_ros.ros.{module}']
        command += [*ros_arguments(parameters or {}), *extra]
        self._log = tempfile.TemporaryFile(mode='w+')  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)

    def __enter__(self) -> NodeProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        dds_memory.kill(self.process)
        self.process.wait()
        self._log.close()

    def stop(self, number: int = signal.SIGINT) -> tuple[int, float]:
        """Send a signal; exit status and seconds until the process ended."""
        start = time.monotonic()
        self.process.send_signal(number)
        return self.process.wait(10.0), time.monotonic() - start

    def output(self) -> str:
        """What it printed so far."""
        self._log.flush()
        self._log.seek(0)
        return self._log.read()


class World(Node):
    """Publishes what a robot does, keeps what `vla_node` says."""

    def __init__(self, name: str = 'world', *, target: str = 'vla_node', namespace: str = ''):
        super().__init__(name, namespace=namespace)
        self.target = target
        self.lifecycle = LifecycleClient(self, target)
        self.chunks: list[ActionChunk] = []
        self.reports: list[PruningDiagnostics] = []
        self.faults: dict[str, int] = {}
        self.messages: dict[str, str] = {}
        self.statuses: dict[str, object] = {}
        self.streams = set(CAMERAS) | {'joints'}  # what publish() sends
        self.cameras = {
            camera: self.create_publisher(
                Image, f'cameras/{camera}/image_raw', qos_profile_sensor_data
            )
            for camera in CAMERAS
        }
        self.joints = self.create_publisher(JointState, 'joint_states', qos_profile_sensor_data)
        self.executed = self.create_publisher(ExecutedAction, 'executed_action', qos.EVERY_STEP)
        self.instruction = self.create_publisher(String, f'{target}/instruction', qos.LATCHED)
        self.create_subscription(ActionChunk, f'{target}/action_chunk', self.chunks.append, 100)
        self.create_subscription(PruningDiagnostics, f'{target}/pruning', self.reports.append, 100)
        self.create_subscription(
            DiagnosticArray, '/diagnostics', self._on_diagnostics, qos.DIAGNOSTICS
        )
        self._step = 0

    def image(self, **changes) -> Image:
        """A good image with a moving square, stamped now; changes set fields afterwards."""
        pixels = np.full((48, 64, 3), 60, np.uint8)
        left = self._step % 40
        pixels[10:20, left : left + 10] = 250
        msg = conversions.image_to_msg(pixels, self.now_ns(), 'camera_optical_frame')
        for name, value in changes.items():
            setattr(msg, name, value)
        return msg

    def joint_state(self, names=JOINTS, positions=(0.1, 0.2, 0.3)) -> JointState:
        return conversions.joints_to_msg(tuple(names), np.array(positions, float), self.now_ns())

    def action(self, x: float = 0.9, z: float = 0.0) -> ExecutedAction:
        names = ['x', 'y', 'z', 'roll', 'pitch', 'yaw', 'gripper']
        msg = ExecutedAction(names=names, units=['1'] * 7, data=[x, 0.0, z, 0.0, 0.0, 0.0, 0.0])
        msg.header.stamp = conversions.to_time(self.now_ns())
        return msg

    def ask_for(self, transition: str) -> None:
        """Ask for a transition without waiting for the answer."""
        client = self.create_client(ChangeState, f'{self.target}/change_state')
        assert client.wait_for_service(ANSWER_S)
        client.call_async(ChangeState.Request(transition=Transition(id=TRANSITIONS[transition])))

    def now_ns(self) -> int:
        return self.get_clock().now().nanoseconds

    def publish(self) -> None:
        """One round of every stream that is on."""
        self._step += 1
        for camera in CAMERAS:
            if camera in self.streams:
                self.cameras[camera].publish(self.image())
        if 'joints' in self.streams:
            self.joints.publish(self.joint_state())
        if 'executed' in self.streams:
            self.executed.publish(self.action())

    def level(self, line: str) -> bytes | None:
        """How bad a line of /diagnostics is; None while it has not come."""
        status = self.statuses.get(line)
        return None if status is None else status.level

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Publish at about 30 Hz and listen, for some time or until something holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if until():
                return True
            self.publish()
            next_round = time.monotonic() + 0.033
            while time.monotonic() < next_round:
                rclpy.spin_once(self, timeout_sec=0.005)
        return until()

    def more_chunks(self, count: int, seconds: float = ANSWER_S) -> bool:
        """Whether that many further chunks come."""
        goal = len(self.chunks) + count
        return self.run(seconds, lambda: len(self.chunks) >= goal)

    def fault_counted(self, code: str, send: Callable[[], None], seconds: float = ANSWER_S) -> str:
        """Send something bad until its count in /diagnostics has risen; the message there.

        Again and again, because the node's slots hold the newest value only: the next good one
        may overwrite a bad one before it is seen.
        """
        before = self.faults.get(code, 0)
        end = time.monotonic() + seconds
        while self.faults.get(code, 0) == before:
            assert time.monotonic() < end, (code, self.faults)
            send()
            time.sleep(0.05)
            self.run(0.5, lambda: self.faults.get(code, 0) > before)
        return self.messages[code]

    def start(self, instruction: str = 'pick up the soup') -> None:
        """Configure, activate, and give the task."""
        self.lifecycle.wait(START_S)
        assert self.lifecycle.change('configure')
        assert self.lifecycle.change('activate')
        self.instruction.publish(String(data=instruction))

    def set_parameter(self, name: str, value: object) -> tuple[bool, str]:
        """Whether vla_node took it, and why not."""
        parameter = Parameter(name, value=value).to_parameter_msg()
        request = SetParameters.Request(parameters=[parameter])
        result = self._call(SetParameters, 'set_parameters', request).results[0]
        return result.successful, result.reason

    def get_parameter_value(self, name: str):
        """The value that vla_node holds."""
        values = self._call(GetParameters, 'get_parameters', GetParameters.Request(names=[name]))
        msg = ParameterMsg(name=name, value=values.values[0])
        return Parameter.from_parameter_msg(msg).value

    def describe(self, names: list[str]) -> list:
        """Descriptors of vla_node's parameters."""
        request = DescribeParameters.Request(names=names)
        return self._call(DescribeParameters, 'describe_parameters', request).descriptors

    def _call(self, kind: type, service: str, request):
        client = self.create_client(kind, f'{self.target}/{service}')
        assert client.wait_for_service(START_S)
        end = time.monotonic() + ANSWER_S
        # What was found may be the service of a killed process: ask its successor then.
        answered = False
        while not answered and time.monotonic() < end:
            future = client.call_async(request)
            rclpy.spin_until_future_complete(self, future, timeout_sec=AGAIN_S)
            answered = future.done()
        self.destroy_client(client)
        assert answered, service
        return future.result()

    def _on_diagnostics(self, msg: DiagnosticArray) -> None:
        for status in msg.status:
            self.statuses[status.name] = status
            own = f'{self.get_namespace()}/{self.target}'.lstrip('/')
            if status.name == f'{own}: faults':
                values = {entry.key: entry.value for entry in status.values}
                self.faults = {k: int(v) for k, v in values.items() if '(last)' not in k}
                self.messages = {
                    k.removesuffix(' (last)'): v for k, v in values.items() if '(last)' in k
                }


def check_replay(world: World) -> None:
    """What a replay of test/data/pick_place must have given: a pruned policy, end to end."""
    cameras = ['wrist', 'side', 'overhead']
    first, *rest = world.reports
    assert all(list(report.cameras) == cameras for report in world.reports)
    assert first.mode in (Mode.DENSE, Mode.COARSE, Mode.FINE)
    for report in rest:
        assert report.mode in (Mode.COARSE, Mode.FINE)
        assert np.isfinite(report.translation_speed), 'executed actions did not arrive'
        shares = np.array(report.tokens_static) / np.array(report.tokens_total)
        assert (shares >= 0.15).all()
        assert (shares <= 0.47).all()
        assert sum(report.tokens_kept) <= 0.66 * sum(report.tokens_static)
    assert all(np.isfinite(chunk.data).all() for chunk in world.chunks)


def refuse_to_configure(world: World) -> None:
    """Check that configuring fails, and leaves the node as it was."""
    world.lifecycle.wait(START_S)
    assert not world.lifecycle.change('configure')
    assert world.lifecycle.state() == 'unconfigured'


@pytest.fixture
def world_fixture() -> Iterator[World]:
    """A world for one test; a test file names it `world`."""
    node = World()
    yield node
    node.destroy_node()


def domain_fixture(offset: int):
    """A fixture: one ROS domain for a test file's tests and their processes.

    Args:
        offset: no two files have the same one.
    """

    @pytest.fixture(autouse=True, scope='module')
    def context() -> Iterator[None]:
        with ros_domain(offset):
            yield

    return context


@contextmanager
def ros_domain(offset: int) -> Iterator[None]:
    """rclpy in a ROS domain of one test file's own, which its processes inherit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('ROS_DOMAIN_ID', str((os.getpid() * 7 + offset) % 90 + 10))
        patch.setenv('ROS_AUTOMATIC_DISCOVERY_RANGE', 'LOCALHOST')
        rclpy.init()
        yield
        shut_down_rclpy()
