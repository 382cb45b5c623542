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

import dds_memory
import numpy as np
from faulty_policy import FaultyPolicy
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.srv import SetParametersAtomically
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from ros_world import ANSWER_S, CAMERAS, JOINTS, ROOT, START_S, NodeProcess
from rosgraph_msgs.msg import Clock as ClockMsg
from soak_arms import DT_S, INITIAL, NS, POSITION, REACH, SETUPS, Setup
from std_msgs.msg import String
from std_srvs.srv import SetBool, Trigger
from task_world import TaskWorld

from specprune_ros.msg import ExecutedAction, StreamerStatus, VlaStatus
from specprune_ros.ros import conversions, qos
from specprune_ros.ros.arguments import ros_arguments
from specprune_ros.ros.lifecycle import LifecycleClient
from specprune_ros.ros.process import spin_process
from specprune_ros.ros.vla_node import VlaNode
from specprune_ros.streaming.states import StreamState
from specprune_ros.tasks import NodeState
from specprune_ros.types import ActionSpace

VLA, STREAMER = 'vla_node', 'action_streamer'
HORIZON = 16
MEASURED_S = 0.5
SPEED = 2.0  # simulated seconds per second
TICK_S = 0.01
LAGS = 300  # ticks that tell how busy the machine is
DRAIN_S = 0.15  # what was on the wire has arrived by then
DEADLINE_S = 0.4
ASKED = 4  # times at most, for an answer of action_streamer
HERE = Path(__file__).resolve().parent
ROBOT = {
    'use_sim_time': True,
    'robot.camera_names': list(CAMERAS),
    'robot.joint_names': list(JOINTS),
    'robot.horizon': HORIZON,
    'robot.step_dt_s': DT_S,
    'robot.action_min': [-3.0],
    'robot.action_max': [3.0],
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
    'stream.dry_run': False,
    'stream.max_state_age_s': MEASURED_S,
    'stream.peer_timeout_s': 0.8,
    'stream.translation_unit_m': 0.05,
    'stream.rotation_unit_rad': 0.05,
    'limits.policy': 'clamp',
    'limits.position_min': [-POSITION],
    'limits.position_max': [POSITION],
    'limits.velocity_max': [REACH / DT_S],
    'limits.max_initial_step': INITIAL,
}
# Exceptions that the policy raises on purpose; a node logs each with its traceback.
ON_PURPOSE = re.compile(r'^\S*(ZeroDivisionError|OutOfMemoryError): ', re.MULTILINE)


# The policy --------------------------------------------------------------------------------------


class SoakPolicy(FaultyPolicy):
    """Swings all that the actions move slowly; mode `wild` asks for anything between -3 and 3.

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
        phase, space = 0.5 * steps + np.arange(width), self.config.robot.action_space
        if space == 'joint_position':
            rows = 0.3 * np.sin(phase)
        else:
            rows = 0.15 * np.cos(phase) * (DT_S if space == 'joint_delta' else 1.0)
        if self._mode[0] == 'wild':
            rows = self._random.uniform(-3.0, 3.0, rows.shape)
        rows = rows + value
        return dataclasses.replace(
            chunk,
            data=rows,
            normalized=rows,
            stand_in=False,
            space=int(ActionSpace[space.upper()]),
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
        arm: the robot's arm.
        measured: simulated time and position of every measurement lately.
        messages: messages to the arm.
        stops: those that are seen to be no command.
        idle_stops: stops before any command: a chunk was taken, and void at once.
        rows, rests: executed actions: rows of chunks, and safety outputs.
        quiet_since: monotonic time from which on nothing may come; None: something may.
    """

    def __init__(self, setup: Setup):
        self.messages = self.stops = self.idle_stops = 0
        self.quiet_since: float | None = None
        self.last_s = 0.0  # when the newest message came
        self.wrong: list[str] = []
        self.mount(setup)

    def mount(self, setup: Setup) -> None:
        """Another arm, of which nothing is known yet."""
        self.setup, self.arm = setup, setup.arm(setup)
        self.measured: deque[tuple[int, np.ndarray]] = deque(maxlen=400)
        self.forget()

    def forget(self) -> None:
        """Streaming begins, by a streamer that reported nothing yet."""
        self.last: np.ndarray | None = None  # command before
        self.unreported = self.rows = self.rests = 0
        self.quiet_since = None

    def take(self, topic: str, msg: object, now_ns: int) -> None:
        """A message came."""
        self.last_s = time.monotonic()
        self.messages += 1
        self.unreported += 1
        self._expect(self.quiet_since is None, 'a message although all must be silent')
        self._expect(topic == self.arm.TOPIC, f'{topic} instead of {self.arm.TOPIC}')
        told = self.arm.read(msg, self._expect) if topic == self.arm.TOPIC else None
        if told is None:
            self.stops += 1
            self.idle_stops += self.last is None
            self.last = None
            return
        oldest = now_ns - round((MEASURED_S + DT_S) * NS)
        recent = [at for stamp, at in self.measured if stamp >= oldest]
        recent = recent or [self.arm.at]  # the clock has just jumped
        self.arm.check(told, self.last, recent, self._expect)
        self.arm.at = self.last = told.at

    def report(self, msg: ExecutedAction) -> None:
        """action_streamer said what it sent."""
        self._expect(bool(np.isfinite(msg.data).all()), f'executed {msg.data}')
        if not self.rows + self.rests:  # what was said before this listener was discovered is lost
            self.unreported = min(self.unreported, 1)
        if msg.chunk_id:
            self.rows += 1
        else:
            self.rests += 1
            still = self.setup.space == 'joint_position' or not np.any(msg.data)
            self._expect(still, f'a safety output that moves: {msg.data}')
        self.unreported -= 1

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.wrong.append(f'message {self.messages}, {type(self.arm).__name__}: {otherwise}')


# The world ---------------------------------------------------------------------------------------


class SoakWorld(TaskWorld):
    """The robot, the operator, and simulated time around both nodes."""

    def __init__(self, setup: Setup = SETUPS[0]):
        self.sim_ns, self._tick_at_s, self._ticks = 1000 * NS, time.monotonic(), 0
        super().__init__('soak_world')
        self.setup, self._executor = setup, SingleThreadedExecutor()
        self.wire, self.streamer = Wire(setup), StreamerStatus()
        self.spoil_image: Callable[[object], None] = lambda msg: None
        self.spoil_joints: Callable[[object], None] = lambda msg: None
        self.spoil_pose: Callable[[object], None] = lambda msg: None
        self.sent: Counter[str] = Counter()  # spoilt messages by fault
        self.counts: dict[str, int] = {}  # what the policy did since its process started
        self.past_inferences = 0  # of processes that were killed
        self._random = np.random.default_rng(0)
        self._lags: deque[float] = deque(maxlen=LAGS)
        self._stack = ExitStack()
        self.processes: dict[str, NodeProcess] = {}
        self.streamer_life = LifecycleClient(self, STREAMER)
        self._clock_pub = self.create_publisher(ClockMsg, '/clock', 10)
        self._poses = self.create_publisher(PoseStamped, 'eef_pose', qos_profile_sensor_data)
        self._subscribe()
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        self.create_timer(TICK_S, self._tick, clock=steady)

    def _subscribe(self) -> None:
        def on_streamer(msg: StreamerStatus) -> None:
            self.streamer = msg

        def on_counts(msg: String) -> None:
            self.counts = json.loads(msg.data)

        self.create_subscription(StreamerStatus, f'{STREAMER}/status', on_streamer, qos.LATCHED)
        self.create_subscription(String, f'{VLA}/counts', on_counts, qos.LATCHED)
        self.create_subscription(
            ExecutedAction, 'executed_action', self.wire.report, qos.EVERY_STEP
        )
        for arm in {each.arm for each in SETUPS}:
            self.create_subscription(
                arm.KIND,
                arm.TOPIC,
                lambda msg, topic=arm.TOPIC: self.wire.take(topic, msg, self.sim_ns),
                qos.EVERY_STEP,
            )
        self._stream_clients = {
            name: self.create_client(kind, f'{STREAMER}/{name}')
            for name, kind in {'enable': SetBool, 'pause': SetBool, 'reset': Trigger}.items()
        }
        self._setters = {
            node: self.create_client(SetParametersAtomically, f'{node}/set_parameters_atomically')
            for node in (VLA, STREAMER)
        }

    # Processes --------------------------------------------------------------------------------

    def __enter__(self) -> SoakWorld:
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes.values():
            dds_memory.kill(process.process)
        self._stack.close()
        self._executor.shutdown(timeout_sec=0.0)
        self.destroy_node()

    def start(self, name: str, changes: dict[str, object] | None = None) -> None:
        """Start a node's process; it is unconfigured. `changes` are to its parameters."""
        robot, changes = self.setup.robot(), changes or {}
        if name == VLA:
            self.counts = {}
            process = SoakProcess({**VLA_PARAMETERS, **robot, **changes})
        else:
            given = {**STREAMER_PARAMETERS, **robot, **self.setup.stream(), **changes}
            process = NodeProcess('streamer_node', given)
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
        dds_memory.kill(self.processes.pop(name).process)
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

    def refit(self, setup: Setup) -> None:
        """Another robot, while nothing moves: clean up, set the parameters, and come up again."""
        for name in (STREAMER, VLA):
            for transition in ('deactivate', 'cleanup'):
                assert self.life(name).change(transition), (name, transition)
        self.setup = setup
        self.set_all(VLA, setup.robot())
        self.set_all(STREAMER, {**setup.robot(), **setup.stream()})
        self.drain()
        self.wire.mount(setup)
        for name in (VLA, STREAMER):
            self.bring_up(name)

    def set_all(self, node: str, values: dict[str, object]) -> None:
        """Parameters that only fit each other together."""
        parameters = [Parameter(name, value=value) for name, value in values.items()]
        messages = [parameter.to_parameter_msg() for parameter in parameters]
        client = self._setters[node]
        assert self.run(START_S, client.service_is_ready), node
        future = client.call_async(SetParametersAtomically.Request(parameters=messages))
        assert self.run(ANSWER_S, future.done), node
        assert future.result().result.successful, (node, future.result().result.reason)

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
            # As in arm_world: rclpy.spin_once() would prefer timers for ever.
            self._executor.add_node(self)
            self._executor.spin_once(timeout_sec=0.02)
        return until()

    def _tick(self) -> None:
        """Time goes on; images and joints every other time."""
        now_s = time.monotonic()
        self._lags.append(now_s - self._tick_at_s - TICK_S)
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
        """Joints, in another order every time and with a stranger, and the end effector's pose."""
        if 'joints' not in self.streams:
            return
        arm = self.wire.arm
        joints = arm.at if arm.MEASURED == 'joint' else np.zeros(len(JOINTS))
        values = {**dict(zip(JOINTS, joints, strict=True)), 'stranger': 0.7}
        names = tuple(self._random.permutation(list(values)).tolist())
        msg = self.joint_state(names, [values[name] for name in names])
        self.spoil_joints(msg)
        self.wire.measured.append((self.sim_ns, arm.at.copy()))
        self.joints.publish(msg)
        if arm.MEASURED == 'pose':
            pose = conversions.pose_to_msg(arm.at, arm.turn, self.sim_ns, 'base_link')
            self.spoil_pose(pose)
            self._poses.publish(pose)

    # The operator -----------------------------------------------------------------------------

    def stream_call(self, service: str, on: bool | None = None) -> tuple[bool, str]:
        """A service of action_streamer: whether it took effect, and why not."""
        client = self._stream_clients[service]
        assert self.run(START_S, client.service_is_ready), service
        request = Trigger.Request() if on is None else SetBool.Request(data=on)
        for _ in range(ASKED):  # an answer can be lost on a busy machine
            future = client.call_async(request)
            if self.run(ANSWER_S / ASKED, future.done):
                return future.result().success, future.result().message
        raise AssertionError(f'{service} was not answered')

    def stream_state(self) -> StreamState:
        return StreamState(self.streamer.state)

    def is_moving(self) -> bool:
        running = self.state is NodeState.RUNNING
        return running and self.stream_state() is StreamState.STREAMING

    def recover(self) -> float:
        """What an operator does until the arm moves again; how long that took, in s."""
        start = time.monotonic()
        self.wire.quiet_since = None
        self.spoil_image = self.spoil_joints = self.spoil_pose = lambda msg: None
        self.streams = {*CAMERAS, 'joints'}
        self.mode.publish(String(data='ok'))
        goal = self.wire.rows + 3
        while not (self.is_moving() and self.wire.rows >= goal):
            assert time.monotonic() - start < START_S, self.explain()
            self._help()
            self.run(0.2, lambda: self.is_moving() and self.wire.rows >= goal)
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

    def rest(self) -> None:
        """End the task. All that went to the arm was reported, but stops that no action says."""
        self.trigger('cancel_task')
        moving = StreamState.STREAMING
        assert self.run(ANSWER_S, lambda: self.stream_state() is not moving), self.explain()
        self.drain()
        # After a jump of the clock nobody knows at which positions the joints stop.
        unsaid = self.setup.space == 'joint_position'
        # Of the very first it cannot be told which message it was about.
        assert unsaid or self.wire.unreported <= 1, (self.wire.unreported, self.explain())

    def drain(self) -> None:
        """Take in what is on the wire, on a machine that holds everybody up as it does this."""
        self.run(DRAIN_S + 5 * self.lag_s)

    @property
    def lag_s(self) -> float:
        """By how much this world's own timer comes late at its worst, but for single waits."""
        return float(np.quantile(self._lags, 0.97)) if self._lags else 0.0

    def hush(self, seconds: float) -> None:
        """Nothing may reach the arm for some time, once what was on the wire is in."""
        self.drain()
        self.wire.quiet_since = time.monotonic()
        self.run(seconds)

    # What was seen ----------------------------------------------------------------------------

    def fault_counts(self, node: str) -> dict[str, int]:
        """Faults by code, as the newest /diagnostics say."""
        values = getattr(self.statuses.get(f'{node}: faults'), 'values', [])
        return {entry.key: int(entry.value) for entry in values if '(last)' not in entry.key}

    def until_counted(self, codes: dict[str, str], seconds: float = ANSWER_S) -> None:
        """Go on until every node of `codes` has counted its fault once more than now."""
        before = {node: self.fault_counts(node).get(code, 0) for node, code in codes.items()}

        def rose() -> bool:
            return all(
                self.fault_counts(node).get(code, 0) > before[node] for node, code in codes.items()
            )

        assert self.run(seconds, rose), (codes, before, self.explain())

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
