"""Both nodes as processes in simulated time, a fake arm that checks all it is told, and faults.

As a process of its own, `python soak_world.py --ros-args`, a vla_node whose policy misbehaves as
faulty_policy.py's does, moves the arm, and says on ~/counts what it did.
"""

from __future__ import annotations

import array
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import rclpy
from faulty_policy import FaultyPolicy
from rclpy.clock import Clock, ClockType
from ros_world import ANSWER_S, CAMERAS, JOINTS, ROOT, START_S, NodeProcess
from rosgraph_msgs.msg import Clock as ClockMsg
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger
from task_world import TaskWorld
from trajectory_msgs.msg import JointTrajectory

from specprune_ros.msg import StreamerStatus, VlaStatus
from specprune_ros.ros import conversions, qos
from specprune_ros.ros.arguments import ros_arguments
from specprune_ros.ros.lifecycle import LifecycleClient
from specprune_ros.ros.process import spin_process
from specprune_ros.ros.vla_node import VlaNode
from specprune_ros.streaming.states import StreamState
from specprune_ros.tasks import NodeState
from specprune_ros.types import ActionSpace

VLA, STREAMER = 'vla_node', 'action_streamer'
DT_S, HORIZON, NS = 0.05, 16, 1_000_000_000
POSITION, REACH, INITIAL = 1.0, 0.08, 0.2  # rad: limits; REACH is that of velocity_max
MEASURED_S = 0.5
SPEED = 2.0  # simulated seconds per second
TICK_S = 0.01
DRAIN_S = 0.15  # what was on the wire has arrived by then
DEADLINE_S = 0.4
HERE = Path(__file__).resolve().parent
ROBOT = {
    'use_sim_time': True,
    'robot.camera_names': list(CAMERAS),
    'robot.joint_names': list(JOINTS),
    'robot.horizon': HORIZON,
    'robot.step_dt_s': DT_S,
    'robot.action_space': 'joint_position',
    'robot.action_names': list(JOINTS),
    'robot.action_units': ['rad'],
    'robot.action_min': [-3.0],
    'robot.action_max': [3.0],
    'robot.translation_names': [''],
    'robot.rotation_names': [''],
}
VLA_PARAMETERS = {
    **ROBOT,
    'model.threads': 1,
    'runtime.query_rate_hz': 100.0,
    'runtime.max_failures': 3,
    'runtime.inference_deadline_s': DEADLINE_S,
    'runtime.input_timeout_s': 2.0,
    'runtime.dry_run': False,
}
STREAMER_PARAMETERS = {
    **ROBOT,
    'stream.output': 'joint_trajectory',
    'stream.dry_run': False,
    'stream.on_stall': 'stop',  # without points: told apart from a command
    'stream.max_state_age_s': MEASURED_S,
    'stream.peer_timeout_s': 0.8,
    'limits.policy': 'clamp',
    'limits.position_min': [-POSITION],
    'limits.position_max': [POSITION],
    'limits.velocity_max': [REACH / DT_S],
    'limits.max_step': [0.1],
    'limits.max_initial_step': INITIAL,
}
# Exceptions that the policy raises on purpose; a node logs each with its traceback.
ON_PURPOSE = re.compile(r'^\S*(ZeroDivisionError|OutOfMemoryError): ', re.MULTILINE)


# The policy --------------------------------------------------------------------------------------


class SoakPolicy(FaultyPolicy):
    """Swings all action elements slowly; mode `wild` asks for anything between -3 and 3.

    Args:
        config, mode: as FaultyPolicy.
        counts: mode -> inferences in that mode; `inferences` counts all.
    """

    def __init__(self, config, mode: list[str], counts: Counter[str]):
        super().__init__(config, mode)
        self.model.info.stand_in = False
        self._counts, self._random = counts, np.random.default_rng(0)

    def _misbehave(self, kind: str, value: str) -> None:
        self._counts['inferences'] += 1
        self._counts[kind] += 1
        super()._misbehave(kind, value)

    def _chunk(self, observation, value: float):
        chunk = super()._chunk(observation, value)
        rows_count, width = chunk.data.shape
        steps = observation.stamp_ns / NS + DT_S * np.arange(1, rows_count + 1)[:, None]
        rows = 0.3 * np.sin(0.5 * steps + np.arange(width)) + value
        if self._mode[0] == 'wild':
            rows = self._random.uniform(-3.0, 3.0, rows.shape)
        space = ActionSpace[self.config.robot.action_space.upper()]
        return dataclasses.replace(
            chunk, data=rows, normalized=rows, stand_in=False, space=int(space)
        )


def make_node(stop: threading.Event) -> VlaNode:
    """A vla_node with such a policy; it says on ~/counts what the policy did."""
    mode, counts = ['ok'], Counter()
    node = VlaNode(stop, load=lambda config: SoakPolicy(config, mode, counts))

    def on_mode(msg: String) -> None:
        mode[0] = msg.data

    node.create_subscription(String, '~/mode', on_mode, qos.LATCHED)
    publisher = node.create_publisher(String, '~/counts', qos.LATCHED)
    steady = Clock(clock_type=ClockType.STEADY_TIME)

    def tell() -> None:
        publisher.publish(String(data=json.dumps(counts.copy())))

    node.create_timer(0.1, tell, clock=steady)
    return node


class SoakProcess(NodeProcess):
    """vla_node with that policy."""

    def __init__(self, parameters: dict[str, object]):
        command = [sys.executable, str(HERE / 'soak_world.py'), *ros_arguments(parameters)]
        self._log = tempfile.TemporaryFile(mode='w+')  # noqa: SIM115 - lives as long as the process
        # A script's own folder comes first in Python's path, not the checkout.
        path = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])
        self.process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'PYTHONPATH': path},
        )


# What a process uses -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Usage:
    """What one process holds, from /proc."""

    rss_mb: float
    threads: int
    files: int

    @classmethod
    def of(cls, pid: int) -> Usage:
        status = Path(f'/proc/{pid}/status').read_text()
        values = dict(line.split(':', 1) for line in status.splitlines())
        return cls(
            rss_mb=int(values['VmRSS'].split()[0]) / 1024,
            threads=int(values['Threads']),
            files=len(os.listdir(f'/proc/{pid}/fd')),
        )


# The wire ----------------------------------------------------------------------------------------


class Wire:
    """Checks everything that reaches the arm; `wrong` holds what should not have come.

    Attributes:
        joints: where the arm is: where it was told to go.
        measured: simulated time and joints of every measurement lately.
        idle_safeties: safety outputs before any command: a chunk was taken, and void at once.
        quiet_since: monotonic time from which on nothing may come; None: something may.
    """

    def __init__(self):
        self.joints = np.array([0.1, -0.2, 0.3])
        self.measured: deque[tuple[int, np.ndarray]] = deque(maxlen=400)
        self.commands = self.safeties = self.idle_safeties = 0
        self.quiet_since: float | None = None
        self.last: np.ndarray | None = None  # command before, None: streaming begins
        self.last_s = 0.0  # when the newest message came
        self.wrong: list[str] = []

    def take(self, msg: JointTrajectory, now_ns: int) -> None:
        """A message came."""
        self.last_s = time.monotonic()
        self._expect(self.quiet_since is None, 'a message although all must be silent')
        self._expect(tuple(msg.joint_names) == JOINTS, f'joints {msg.joint_names}')
        if msg.points:
            self._command(msg.points, now_ns)
            self.commands += 1
        else:
            self.safeties += 1
            self.idle_safeties += self.last is None
            self.last = None

    def _command(self, points: list, now_ns: int) -> None:
        numbers = [n for p in points for n in (*p.positions, *p.velocities, *p.accelerations)]
        position = np.array(points[0].positions)
        self._expect(len(points) == 1, f'{len(points)} points')
        self._expect(position.shape == (3,), f'{len(position)} positions')
        self._expect(bool(np.isfinite(numbers).all()), f'not finite: {numbers}')
        self._expect(bool((np.abs(position) <= POSITION + 1e-9).all()), f'position {position}')
        duration = points[0].time_from_start
        self._expect(duration.sec * NS + duration.nanosec == round(DT_S * NS), f'{duration}')
        self._check_step(position, now_ns)
        self.joints = self.last = position

    def _check_step(self, position: np.ndarray, now_ns: int) -> None:
        if self.last is not None:
            step = np.abs(position - self.last).max()
            self._expect(step <= REACH + 1e-9, f'a step of {step:.4f} rad')
            return
        oldest = now_ns - round((MEASURED_S + DT_S) * NS)
        recent = [joints for stamp, joints in self.measured if stamp >= oldest]
        step = min((np.abs(position - joints).max() for joints in recent), default=np.inf)
        self._expect(step <= min(REACH, INITIAL) + 1e-9, f'a first step of {step:.4f} rad')

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(f'message {self.commands + self.safeties + 1}: {otherwise}')


# The world ---------------------------------------------------------------------------------------


class SoakWorld(TaskWorld):
    """The robot, the operator, and simulated time around both nodes."""

    def __init__(self):
        self.sim_ns, self._tick_at_s, self._ticks = 1000 * NS, time.monotonic(), 0
        super().__init__('soak_world')
        self.wire, self.streamer = Wire(), StreamerStatus()
        self.spoil_image: Callable[[object], None] = lambda msg: None
        self.spoil_joints: Callable[[object], None] = lambda msg: None
        self.sent: Counter[str] = Counter()  # spoilt messages by fault
        self.counts: dict[str, int] = {}  # what the policy did since its process started
        self.past_inferences = 0  # of processes that were killed
        self._random = np.random.default_rng(0)
        self._stack = ExitStack()
        self.processes: dict[str, NodeProcess] = {}
        self.streamer_life = LifecycleClient(self, STREAMER)
        self._clock_pub = self.create_publisher(ClockMsg, '/clock', 10)
        self._subscribe()
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(TICK_S, self._tick, clock=steady)

    def _subscribe(self) -> None:
        def on_streamer(msg: StreamerStatus) -> None:
            self.streamer = msg

        def on_counts(msg: String) -> None:
            self.counts = json.loads(msg.data)

        def on_trajectory(msg: JointTrajectory) -> None:
            self.wire.take(msg, self.sim_ns)

        self.create_subscription(StreamerStatus, f'{STREAMER}/status', on_streamer, qos.LATCHED)
        self.create_subscription(String, f'{VLA}/counts', on_counts, qos.LATCHED)
        self.create_subscription(
            JointTrajectory, 'joint_trajectory', on_trajectory, qos.EVERY_STEP
        )
        self._stream_clients = {
            name: self.create_client(kind, f'{STREAMER}/{name}')
            for name, kind in {'enable': SetBool, 'pause': SetBool, 'reset': Trigger}.items()
        }

    # Processes --------------------------------------------------------------------------------

    def __enter__(self) -> SoakWorld:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        self.destroy_node()

    def start(self, name: str, changes: dict[str, object] | None = None) -> None:
        """Start a node's process; it is unconfigured. `changes` are to its parameters."""
        if name == VLA:
            self.counts = {}
            process = SoakProcess({**VLA_PARAMETERS, **(changes or {})})
        else:
            process = NodeProcess('streamer_node', {**STREAMER_PARAMETERS, **(changes or {})})
        self.processes[name] = self._stack.enter_context(process)
        # The dead are discovered for a while yet: only what it says itself shows that it is up.
        if name == VLA:
            self.status = VlaStatus()
        else:
            self.streamer = StreamerStatus()
        assert self.run(START_S, lambda: self._said(name).header.stamp.sec > 0), process.output()
        assert self._said(name).state == 0, f'{name} is configured by itself'
        self.life(name).wait(START_S)
        self.run(0.5)

    def kill(self, name: str) -> None:
        """kill -9."""
        if name == VLA:
            self.past_inferences += self.counts.get('inferences', 0)
        process = self.processes.pop(name).process
        process.kill()
        process.wait()
        self.statuses.pop(f'{name}: faults', None)

    def _said(self, name: str) -> VlaStatus | StreamerStatus:
        return self.status if name == VLA else self.streamer

    def life(self, name: str) -> LifecycleClient:
        return self.lifecycle if name == VLA else self.streamer_life

    def bring_up(self, name: str) -> None:
        for transition in ('configure', 'activate'):
            assert self.life(name).change(transition), (name, transition)
        if name == VLA:
            assert self.goals.wait_for_server(START_S)

    # Time and streams -------------------------------------------------------------------------

    @property
    def inferences(self) -> int:
        return self.past_inferences + self.counts.get('inferences', 0)

    def now_ns(self) -> int:
        return self.sim_ns

    def jump(self, seconds: float) -> None:
        """Let simulated time jump, and everybody know it."""
        self.sim_ns += round(seconds * NS)
        self.wire.measured.clear()
        self._clock_pub.publish(ClockMsg(clock=conversions.to_time(self.sim_ns)))

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if until():
                return True
            rclpy.spin_once(self, timeout_sec=0.02)
        return until()

    def _tick(self) -> None:
        """Time goes on; images and joints every other time."""
        now_s = time.monotonic()
        # A test process that did not run for long must not make everything stale.
        self.sim_ns += round(min(now_s - self._tick_at_s, 0.05) * SPEED * NS)
        self._tick_at_s, self._ticks = now_s, self._ticks + 1
        self._clock_pub.publish(ClockMsg(clock=conversions.to_time(self.sim_ns)))
        if self._ticks % 2:
            self._step += 1
            self._publish_images()
            self._publish_joints()

    def _publish_images(self) -> None:
        for camera in self.streams & set(CAMERAS):
            msg = self.image()
            if camera == CAMERAS[0]:
                self.spoil_image(msg)
            self.cameras[camera].publish(msg)

    def _publish_joints(self) -> None:
        """The measured joints in another order every time, with a stranger."""
        if 'joints' not in self.streams:
            return
        values = {**dict(zip(JOINTS, self.wire.joints, strict=True)), 'stranger': 0.7}
        names = tuple(self._random.permutation(list(values)).tolist())
        msg = self.joint_state(names, [values[name] for name in names])
        self.spoil_joints(msg)
        self.wire.measured.append((self.sim_ns, self.wire.joints.copy()))
        self.joints.publish(msg)

    # The operator -----------------------------------------------------------------------------

    def stream_call(self, service: str, on: bool | None = None) -> tuple[bool, str]:
        """A service of action_streamer: whether it took effect, and why not."""
        client = self._stream_clients[service]
        assert self.run(START_S, client.service_is_ready), service
        request = Trigger.Request() if on is None else SetBool.Request(data=on)
        future = client.call_async(request)
        assert self.run(ANSWER_S, future.done), f'{service} was not answered'
        return future.result().success, future.result().message

    def stream_state(self) -> StreamState:
        return StreamState(self.streamer.state)

    def is_moving(self) -> bool:
        running = self.state is NodeState.RUNNING
        return running and self.stream_state() is StreamState.STREAMING

    def recover(self) -> float:
        """What an operator does until the arm moves again; how long that took, in s."""
        start = time.monotonic()
        self.wire.quiet_since = None
        self.spoil_image = self.spoil_joints = lambda msg: None
        self.streams = {*CAMERAS, 'joints'}
        self.mode.publish(String(data='ok'))
        goal = self.wire.commands + 3
        while not (self.is_moving() and self.wire.commands >= goal):
            assert time.monotonic() - start < START_S, self.explain()
            self._help()
            self.run(0.2, lambda: self.is_moving() and self.wire.commands >= goal)
        return time.monotonic() - start

    def _help(self) -> None:
        """One thing that brings the system nearer to moving."""
        if self.state in (NodeState.STOPPED, NodeState.FAULT):
            self.trigger('reset')
        elif self.state is NodeState.IDLE:
            self.begin('go')
        elif self.state is NodeState.PAUSED:
            self.switch('pause', False)
        if self.stream_state() is StreamState.STOPPED:
            self.stream_call('reset')
        elif self.stream_state() is StreamState.PAUSED:
            self.stream_call('pause', False)
        elif self.stream_state() is StreamState.DISABLED:
            self.stream_call('enable', True)

    def hush(self, seconds: float) -> None:
        """Nothing may reach the arm for some time, once what was on the wire is in."""
        self.run(DRAIN_S)
        self.wire.quiet_since = time.monotonic()
        self.run(seconds)

    # What was seen ----------------------------------------------------------------------------

    def fault_counts(self, node: str) -> dict[str, int]:
        """Faults by code, as the newest /diagnostics say."""
        values = getattr(self.statuses.get(f'{node}: faults'), 'values', [])
        return {entry.key: int(entry.value) for entry in values if '(last)' not in entry.key}

    def until_counted(self, code: str, *nodes: str, seconds: float = ANSWER_S) -> None:
        """Go on until the nodes have counted a fault once more than now."""
        before = {node: self.fault_counts(node).get(code, 0) for node in nodes}

        def rose() -> bool:
            return all(self.fault_counts(node).get(code, 0) > n for node, n in before.items())

        assert self.run(seconds, rose), (code, before, self.explain())

    def check(self) -> None:
        """Nothing forbidden was on the wire, and nobody died."""
        assert not self.wire.wrong, (self.wire.wrong, self.explain())
        for name, process in self.processes.items():
            assert process.process.poll() is None, (name, process.output())
            text = process.output()
            tracebacks = text.count('Traceback (most recent call last)')
            assert tracebacks == len(ON_PURPOSE.findall(text)), (name, text)
        for seen in (self.chunks, self.reports, self.history, self.feedback):
            seen.clear()

    def usage(self) -> dict[str, Usage]:
        return {name: Usage.of(each.process.pid) for name, each in self.processes.items()}

    def explain(self) -> str:
        """All there is to know when something went wrong."""
        states = f'{self.state.name}, {self.stream_state().name}, {self.inferences} inferences'
        logs = [f'{name}:\n{each.output()[-3000:]}' for name, each in self.processes.items()]
        return '\n'.join([states, str(self.status), str(self.streamer), *logs])


def truncated(msg) -> None:
    """An image that ends early."""
    msg.data = array.array('B', bytes(100))


if __name__ == '__main__':
    raise SystemExit(spin_process(make_node))
