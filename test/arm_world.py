"""A fake arm and a fake vla_node around action_streamer; as a process of its own, the latter."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import dds_memory
import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from rcl_interfaces.srv import SetParameters
from rclpy.clock import Clock, ClockType
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_sensor_data
from ros_world import ANSWER_S, START_S, NodeProcess
from rosgraph_msgs.msg import Clock as ClockMsg
from sensor_msgs.msg import JointState
from std_msgs.msg import Bool, Float64MultiArray
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory

from specprune_ros.msg import ActionChunk, ExecutedAction, StreamerStatus, VlaStatus
from specprune_ros.ros import conversions, qos
from specprune_ros.ros.lifecycle import LifecycleClient
from specprune_ros.ros.process import shut_down_rclpy
from specprune_ros.types import ActionChunk as Chunk
from specprune_ros.types import ActionSpace

DT_S = 0.05
HORIZON = 16
MEASURE_S = 0.02
ASKED = 4  # times at most, for an answer of a service
JOINTS = ('j1', 'j2', 'j3')
CARTESIAN = ('x', 'y', 'z', 'roll', 'pitch', 'yaw')
NS = 1_000_000_000

COMMON = {
    'robot.horizon': HORIZON,
    'robot.step_dt_s': DT_S,
    'stream.dry_run': False,
    'stream.max_state_age_s': 0.5,
    'stream.peer_timeout_s': 0.8,
    'limits.policy': 'clamp',
}
JOINT_ARM = {
    **COMMON,
    'robot.action_space': 'joint_position',
    'robot.action_names': [*JOINTS, 'gripper'],
    'robot.action_units': ['rad', 'rad', 'rad', '1'],
    'robot.action_min': [-3.0],
    'robot.action_max': [3.0],
    'robot.translation_names': [''],
    'robot.rotation_names': [''],
    'stream.output': 'joint_trajectory',
    'limits.position_min': [-1.0],
    'limits.position_max': [1.0],
    'limits.velocity_max': [2.0],
    'limits.max_step': [0.1],
    'limits.max_initial_step': 0.2,
}
CARTESIAN_ARM = {
    **COMMON,
    'robot.action_space': 'eef_delta_pose',
    'robot.action_units': ['1'],
    'robot.action_names': [*CARTESIAN, 'gripper'],
    'stream.translation_unit_m': 0.05,
    'stream.rotation_unit_rad': 0.5,
    'limits.velocity_max': [0.5, 0.5, 0.5, 5.0, 5.0, 5.0, 100.0],
}
UNITS = {'joint_position': 'rad', 'joint_velocity': 'rad', 'joint_delta': 'rad'}
TOPICS = {
    'joint_trajectory': (JointTrajectory, 'joint_trajectory'),
    'twist': (TwistStamped, 'delta_twist_cmds'),
    'pose': (PoseStamped, 'pose_command'),
}


@dataclass(frozen=True)
class Sent:
    """A message that reached the robot: when (monotonic), and its numbers."""

    at_s: float
    values: np.ndarray  # joint positions in the order of JOINTS; twist [6]; or pose [7]
    msg: object


class FakeVla:
    """Publishes what vla_node does: a status at 5 Hz, and a chunk every so often while it runs.

    Args:
        node: carries the publishers and timers.
        parameters: of action_streamer, which tell what a chunk looks like.
        now_ns: ROS time.
    """

    def __init__(self, node: Node, parameters: dict, now_ns: Callable[[], int]):
        self._now_ns = now_ns
        self.names = tuple(parameters['robot.action_names'])
        units = tuple(parameters['robot.action_units'])
        self.units = units * len(self.names) if len(units) == 1 else units
        self.space = ActionSpace[parameters['robot.action_space'].upper()]
        self.state, self.epoch, self.chunk_id = VlaStatus.STATE_RUNNING, 1, 0
        self.period_s = 4 * DT_S
        self.latency_s = 0.05  # from observation to chunk
        self.speaks = True  # status
        self.streams = True  # chunks
        self.change: Callable[[ActionChunk], None] = lambda msg: None  # injects a fault
        self.row: Callable[[int], np.ndarray] = lambda step: np.zeros(len(self.names))
        self._status = node.create_publisher(VlaStatus, 'vla_node/status', qos.LATCHED)
        self._chunks = node.create_publisher(
            ActionChunk, 'vla_node/action_chunk', qos.chunk(HORIZON * DT_S)
        )
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        node.create_timer(0.2, self._beat, clock=steady)
        node.create_timer(0.01, self._maybe_chunk, clock=steady)
        self._next_s = 0.0
        self.start_ns = now_ns()

    def say(self, **changes) -> None:
        """Change the state, and say so at once, as vla_node does."""
        for name, value in changes.items():
            setattr(self, name, value)
        self._beat()

    def chunk(self, **changes) -> Chunk:
        """The chunk that is due now, on the grid of control steps counted from the start."""
        self.chunk_id += 1
        step_ns = round(DT_S * NS)
        first = (self._now_ns() - self.start_ns) // step_ns
        stamp_ns = self.start_ns + first * step_ns
        data = np.array([self.row(first + i) for i in range(HORIZON)], float)
        chunk = Chunk(
            stamp_ns=stamp_ns, observation_stamp_ns=stamp_ns - round(self.latency_s * NS),
            frame_id='base_link', step_dt_s=DT_S, valid_for_s=HORIZON * DT_S,
            chunk_id=self.chunk_id, epoch=self.epoch, space=int(self.space), names=self.names,
            units=self.units, data=data, normalized=data, clamped=0, dry_run=False,
            stand_in=False,
        )  # fmt: skip
        return dataclasses.replace(chunk, **changes)

    def send(self, chunk: Chunk | None = None) -> ActionChunk:
        """Publish a chunk, spoilt by `change`."""
        msg = conversions.chunk_to_msg(self.chunk() if chunk is None else chunk)
        self.change(msg)
        self._chunks.publish(msg)
        return msg

    def _beat(self) -> None:
        if not self.speaks:
            return
        msg = VlaStatus(state=self.state, epoch=self.epoch, task_id=1, instruction='go')
        msg.header.stamp = conversions.to_time(self._now_ns())
        self._status.publish(msg)

    def _maybe_chunk(self) -> None:
        running = self.streams and self.state == VlaStatus.STATE_RUNNING
        if running and time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + self.period_s
            self.send()


class ArmWorld(Node):
    """Follows what action_streamer sends, measures itself, and keeps what it saw."""

    def __init__(
        self,
        parameters: dict,
        *,
        name: str = 'arm_world',
        namespace: str = '',
        sim_time: bool = False,
        vla: bool = True,
        arm: bool = True,
    ):
        super().__init__(name, namespace=namespace)
        self.target = 'action_streamer'
        self._executor = SingleThreadedExecutor()
        self.parameters = parameters
        self.beside: list[Node] = []  # worlds that live on while this one waits
        self.lifecycle = LifecycleClient(self, self.target)
        self.joints = np.array([0.1, -0.2, 0.3])
        self.pose = np.array([0.4, 0.0, 0.3, 0.0, 0.0, 0.0, 1.0])
        self.measures = True
        self.lag_s = 0.0  # by how much its timers came late at most, since it last streamed
        self._measured_s = time.monotonic()
        self.distort: Callable[[JointState], None] = lambda msg: None  # injects a fault
        self.sent: list[Sent] = []
        self.grippers: list[np.ndarray] = []
        self.executed: list[ExecutedAction] = []  # rows of chunks
        self.rested: list[ExecutedAction] = []  # what was said of safety outputs
        self.statuses: list[StreamerStatus] = []
        self.diagnostics: dict[str, object] = {}
        self._sim_ns = 1000 * NS if sim_time else None
        self._sim_at_s = time.monotonic()
        self._joint_pub = self.create_publisher(
            JointState, 'joint_states', qos_profile_sensor_data
        )
        self._pose_pub = self.create_publisher(PoseStamped, 'eef_pose', qos_profile_sensor_data)
        self.e_stop = self.create_publisher(Bool, 'e_stop', qos.LATCHED)
        self.create_subscription(
            StreamerStatus, f'{self.target}/status', self.statuses.append, qos.LATCHED
        )
        self.create_subscription(
            ExecutedAction, 'executed_action', self._on_executed, qos.EVERY_STEP
        )
        self.create_subscription(
            DiagnosticArray, '/diagnostics', self._on_diagnostics, qos.DIAGNOSTICS
        )
        kinds = {
            'enable': SetBool, 'pause': SetBool, 'reset': Trigger, 'set_parameters': SetParameters,
        }  # fmt: skip
        self._callers = {
            name: self.create_client(kind, f'{self.target}/{name}') for name, kind in kinds.items()
        }
        self.controllers: list = []
        if arm:
            self.start_controllers()
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        if sim_time:
            self._clock_pub = self.create_publisher(ClockMsg, '/clock', 10)
            self._clock_timer = self.create_timer(0.005, self._publish_clock, clock=steady)
        self.create_timer(MEASURE_S, self._measure, clock=steady)
        self.vla = FakeVla(self, parameters, self.now_ns) if vla else None

    # Time -------------------------------------------------------------------------------------

    def now_ns(self) -> int:
        if self._sim_ns is None:
            return self.get_clock().now().nanoseconds
        return self._sim_ns + round((time.monotonic() - self._sim_at_s) * NS)

    def jump(self, seconds: float) -> None:
        """Let simulated time jump, and everybody know it."""
        self._sim_ns += round(seconds * NS)
        self._publish_clock()

    def freeze(self, on: bool = True) -> None:
        """Stop simulated time, as a paused simulator does, or let it go on."""
        self._clock_timer.cancel() if on else self._clock_timer.reset()

    def _publish_clock(self) -> None:
        self._clock_pub.publish(ClockMsg(clock=conversions.to_time(self.now_ns())))

    # The arm ------------------------------------------------------------------------------------

    def start_controllers(self) -> None:
        """Subscribe to all that could move the arm, whatever the configured output."""
        follow = {
            'joint_trajectory': self._on_trajectory,
            'twist': self._on_twist,
            'pose': self._on_pose,
        }
        for output, (kind, topic) in TOPICS.items():
            self.controllers.append(
                self.create_subscription(kind, topic, follow[output], qos.EVERY_STEP)
            )
        self.controllers.append(
            self.create_subscription(
                Float64MultiArray, 'gripper_command', self._on_gripper, qos.EVERY_STEP
            )
        )

    def stop_controllers(self) -> None:
        """The robot's controllers die."""
        for subscription in self.controllers:
            self.destroy_subscription(subscription)
        self.controllers.clear()

    def _on_trajectory(self, msg: JointTrajectory) -> None:
        values = np.zeros(0)
        if msg.points:
            by_name = dict(zip(msg.joint_names, msg.points[0].positions, strict=True))
            values = np.array([by_name[name] for name in JOINTS])
            self.joints = values
        self.sent.append(Sent(time.monotonic(), values, msg))

    def _on_twist(self, msg: TwistStamped) -> None:
        linear, angular = msg.twist.linear, msg.twist.angular
        values = np.array([linear.x, linear.y, linear.z, angular.x, angular.y, angular.z])
        self.pose[:3] += DT_S * values[:3]
        self.sent.append(Sent(time.monotonic(), values, msg))

    def _on_pose(self, msg: PoseStamped) -> None:
        position, turn = conversions.pose_from_msg(msg)
        self.pose = np.array([*position, *turn])
        self.sent.append(Sent(time.monotonic(), self.pose.copy(), msg))

    def _on_gripper(self, msg: Float64MultiArray) -> None:
        self.grippers.append(np.array(msg.data))

    def _on_executed(self, msg: ExecutedAction) -> None:
        (self.executed if msg.chunk_id else self.rested).append(msg)

    def _measure(self) -> None:
        """The measured state; joints in another order than the actions', with a stranger."""
        now_s = time.monotonic()
        self.lag_s = max(self.lag_s, now_s - self._measured_s - MEASURE_S)
        self._measured_s = now_s
        if not self.measures:
            return
        now_ns = self.now_ns()
        positions = np.array([self.joints[2], 0.7, self.joints[0], self.joints[1]])
        names = ('j3', 'stranger', 'j1', 'j2')
        msg = conversions.joints_to_msg(names, positions, now_ns)
        self.distort(msg)
        self._joint_pub.publish(msg)
        self._pose_pub.publish(
            conversions.pose_to_msg(self.pose[:3], self.pose[3:], now_ns, 'base_link')
        )

    # What it does -------------------------------------------------------------------------------

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Let the world go on for some time, or until something holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if until():
                return True
            # rclpy.spin_once() begins anew with what is ready every time: on a busy machine that
            # is always a timer, and answers never come. What else spins a node takes it away.
            for world in (self, *self.beside):
                self._executor.add_node(world)
            self._executor.spin_once(timeout_sec=0.02)
        return until()

    def destroy_node(self) -> None:
        self._executor.shutdown(timeout_sec=0.0)
        super().destroy_node()

    def start(self, *, enabled: bool = True) -> None:
        """Configure and activate action_streamer, and enable it."""
        self.appears()
        assert self.lifecycle.change('configure')
        assert self.lifecycle.change('activate')
        if enabled:
            self.enable()

    def appears(self) -> None:
        """Wait until action_streamer is there."""
        assert self.run(START_S, lambda: bool(self.statuses)), 'no status'
        self.lifecycle.wait(START_S)

    def enable(self) -> None:
        """`~/enable true`, again until the streamer has found the controllers."""
        assert self.run(ANSWER_S, lambda: self.call('enable', True)[0]), self.call('enable', True)

    def streams(self, commands: int = 5, seconds: float = ANSWER_S) -> bool:
        """Whether that many further commands arrive at the robot."""
        goal, self.lag_s, self._measured_s = len(self.sent) + commands, 0.0, time.monotonic()
        return self.run(seconds, lambda: len(self.sent) >= goal)

    def reaches(self, state: int, seconds: float = ANSWER_S) -> bool:
        """Whether action_streamer says that it is in a state (StreamerStatus.STATE_*)."""
        return self.run(seconds, lambda: self.state == state)

    def call(self, service: str, on: bool | None = None) -> tuple[bool, str]:
        """A service of action_streamer: whether it took effect, and what it said."""
        request = Trigger.Request() if on is None else SetBool.Request(data=on)
        answer = self._call(service, request)
        return answer.success, answer.message

    def set_parameter(self, name: str, value: object) -> tuple[bool, str]:
        """Whether action_streamer took it, and why not."""
        parameter = Parameter(name, value=value).to_parameter_msg()
        request = SetParameters.Request(parameters=[parameter])
        result = self._call('set_parameters', request).results[0]
        return result.successful, result.reason

    def press(self, on: bool) -> float:
        """Press or release the emergency stop; when."""
        self.e_stop.publish(Bool(data=on))
        return time.monotonic()

    # What it saw --------------------------------------------------------------------------------

    @property
    def status(self) -> StreamerStatus:
        return self.statuses[-1] if self.statuses else StreamerStatus()

    @property
    def state(self) -> int:
        return self.status.state

    def faults(self) -> dict[str, int]:
        """Faults by code, from /diagnostics."""
        name = f'{self.get_namespace()}/{self.target}: faults'.lstrip('/')
        values = getattr(self.diagnostics.get(name), 'values', [])
        return {e.key: int(e.value) for e in values if '(last)' not in e.key}

    def silent_for(self, seconds: float) -> bool:
        """Whether nothing reaches the robot for some time, once what was on the wire is in."""
        self.run(0.1)
        count = len(self.sent)
        self.run(seconds)
        return len(self.sent) == count

    def after(self, at_s: float) -> list[Sent]:
        """What reached the robot after a moment."""
        return [sent for sent in self.sent if sent.at_s > at_s]

    def forget(self) -> None:
        """Forget what was seen, not what is."""
        for seen in (self.sent, self.grippers, self.executed, self.rested):
            seen.clear()

    def _call(self, service: str, request):
        """The answer; asked again where it was lost, as happens on a busy machine."""
        client = self._callers[service]
        assert self.run(START_S, client.service_is_ready), service
        for _ in range(ASKED):
            future = client.call_async(request)
            if self.run(ANSWER_S / ASKED, future.done):
                return future.result()
        raise AssertionError(f'{service} was not answered')

    def _on_diagnostics(self, msg: DiagnosticArray) -> None:
        self.diagnostics.update({status.name: status for status in msg.status})


@contextmanager
def arm_world(parameters: dict, *extra: str, **kwargs) -> Iterator[tuple[ArmWorld, NodeProcess]]:
    """A world, and action_streamer as a process in it."""
    world = ArmWorld(parameters, **kwargs)
    given = {**parameters, 'use_sim_time': True} if kwargs.get('sim_time') else parameters
    if world.get_namespace() != '/':
        extra = (*extra, '-r', f'__ns:={world.get_namespace()}')
    try:
        with NodeProcess('streamer_node', given, *extra) as process:
            try:
                yield world, process
            finally:
                dds_memory.kill(process.process)
    finally:
        world.destroy_node()


def vla_process() -> None:
    """A fake vla_node that another process may kill."""
    rclpy.init()
    node = Node('vla_node')
    vla = FakeVla(node, JOINT_ARM, lambda: node.get_clock().now().nanoseconds)
    vla.row = lambda step: np.array([0.1, -0.2, 0.3, 0.0])
    try:
        rclpy.spin(node)
    finally:
        shut_down_rclpy()


if __name__ == '__main__':
    sys.exit(vla_process())
