"""`sim_node`: a LIBERO task as a robot: clock, cameras, joint states, pose; velocities move it.

Everything is stamped in simulated time, which the node publishes as `/clock`; it waits for the
simulator where that is slower than `rate`. An episode ends with LIBERO's own success check or at
the task's step limit; then the arm stands still until `~/reset`.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from typing import Protocol

import numpy as np
from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
from rclpy.node import Node
from rosgraph_msgs.msg import Clock
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Float64MultiArray, String
from std_srvs.srv import Trigger

from specprune_ros.errors import ConfigError, SpecPruneError, named
from specprune_ros.health import Health
from specprune_ros.inbox import JOINTS, POSE
from specprune_ros.ros import conversions, diagnostics, qos
from specprune_ros.ros.process import spin_process
from specprune_ros.sim.collect import Environment
from specprune_ros.sim.realtime import SimClock, Units, VelocityCommands
from specprune_ros.sim.state import JOINTS as JOINT_NAMES
from specprune_ros.sim.state import STEP_NS, SimState

TICK_S = 0.005  # of steady time between two clock messages
RESET_S, POLL_S = 20.0, 0.1
STOP_S = 3.0
RUNNING, SUCCESS, FAILED = 'running', 'success', 'failed'
NO_START, BROKEN = 'failed to start', 'broken'  # nothing is simulated any more
MAX_SEED = 2**31 - 1


class SimulatedArm(Environment, Protocol):
    """What the node drives; `sim.libero.LiberoEnv` has it. One thread makes it and uses it."""

    def close(self) -> None:
        """Free it."""


def make_libero(task: str, cameras: tuple[str, ...], size: int) -> SimulatedArm:
    """A LIBERO task.

    Raises:
        ConfigError, MissingDependencyError: see LiberoEnv.
    """
    from specprune_ros.sim.libero import LiberoEnv

    return LiberoEnv(task, cameras=cameras, size=size)


class SimNode(Node):
    """One simulated robot.

    A simulator that cannot start is one ERROR in `/diagnostics` and the log; the node stays up to
    say so.

    Args:
        stop: set when the process is to end.
        make: task, cameras and image size -> what is simulated.
    """

    def __init__(
        self,
        stop: threading.Event | None = None,
        make: Callable[[str, tuple[str, ...], int], SimulatedArm] = make_libero,
    ):
        super().__init__('sim_node')
        self._make, self._stop = make, stop or threading.Event()
        self._halt = threading.Event()
        self._health = Health()
        self._declare()
        self._clock_source = SimClock(self._value('rate'))
        self._commands = VelocityCommands(self._units())
        self._lock = threading.Lock()  # commands come in the executor's thread
        self._wanted: Future | None = None
        self._episode = {'state': 'loading'}
        self._upside_down = frozenset(self._value('upside_down'))
        self._make_topics()
        self._threads = [
            threading.Thread(target=run, name=name, daemon=True)
            for name, run in (('simulator', self._run), ('clock', self._tick))
        ]
        for thread in self._threads:
            thread.start()

    def shut_down(self) -> bool:
        """Stop the simulator; False when it would not."""
        self._halt.set()
        for thread in self._threads:
            thread.join(STOP_S)
        return not any(thread.is_alive() for thread in self._threads)

    # Parameters and topics ---------------------------------------------------------------------

    def _declare(self) -> None:
        def declare(name: str, default: object, doc: str, low=None, high=None) -> None:
            descriptor = ParameterDescriptor(description=doc, read_only=name != 'seed')
            if isinstance(low, float):
                span = FloatingPointRange(from_value=low, to_value=high)
                descriptor.floating_point_range = [span]
            elif low is not None:
                descriptor.integer_range = [IntegerRange(from_value=low, to_value=high, step=1)]
            self.declare_parameter(name, default, descriptor)

        declare('task', 'object_shuffled/0', 'what to do, <suite>/<index>')
        declare('seed', 0, 'which episode `~/reset` begins', 0, MAX_SEED)
        declare('split', 'eval', 'train or eval: they share no episode')
        declare('cameras', ['wrist', 'side', 'overhead'], 'that are rendered')
        declare('upside_down', [''], 'cameras that are mounted so')
        declare('size', 224, 'height and width of the images, px', 16, 640)
        declare('rate', 1.0, 'simulated seconds per second, at most', 0.01, 100.0)
        declare('frame_id', 'panda_link0', 'of the end-effector pose')
        declare(
            'instruction_topic', 'vla_node/instruction', 'where the instruction goes; or empty'
        )
        declare('translation_unit_m', 0.013, 'see stream.translation_unit_m', 1e-4, 1.0)
        declare('rotation_unit_rad', 0.13, 'see stream.rotation_unit_rad', 1e-4, 3.0)

    def _value(self, name: str):
        return self.get_parameter(name).value

    def _units(self) -> Units:
        return Units(self._value('translation_unit_m'), self._value('rotation_unit_rad'))

    def _make_topics(self) -> None:
        self._clocks = self.create_publisher(Clock, '/clock', 10)
        self._joints = self.create_publisher(JointState, JOINTS, qos.RELIABLE)
        self._poses = self.create_publisher(PoseStamped, POSE, qos.RELIABLE)
        self._episodes = self.create_publisher(String, '~/episode', qos.LATCHED)
        self._images = {
            name: self.create_publisher(Image, f'cameras/{name}/image_raw', qos.RELIABLE)
            for name in self._value('cameras')
        }
        topic = self._value('instruction_topic')
        self._instructions = self.create_publisher(String, topic, qos.LATCHED) if topic else None
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', qos.DIAGNOSTICS)
        self.create_timer(diagnostics.PERIOD_S, self._publish_diagnostics)
        self.create_subscription(TwistStamped, 'delta_twist_cmds', self._on_twist, qos.COMMANDS)
        self.create_subscription(
            Float64MultiArray, 'gripper_command', self._on_gripper, qos.COMMANDS
        )
        self.create_service(Trigger, '~/reset', self._on_reset)

    # What comes in -------------------------------------------------------------------------------

    def _on_twist(self, msg: TwistStamped) -> None:
        linear, angular = msg.twist.linear, msg.twist.angular
        values = np.array([linear.x, linear.y, linear.z, angular.x, angular.y, angular.z])
        self._take(lambda: self._commands.move(*np.split(values, 2), self._stamp(msg)))

    def _stamp(self, msg: TwistStamped) -> int:
        """When it was sent; no command can be from the future."""
        return min(conversions.to_ns(msg.header.stamp), self._clock_source.now_ns())

    def _on_gripper(self, msg: Float64MultiArray) -> None:
        if len(msg.data) != 1:
            self._fault('command_width', f'gripper_command = {list(msg.data)}: must be 1 value')
            return
        self._take(lambda: self._commands.grip(msg.data[0]))

    def _take(self, command: Callable[[], None]) -> None:
        try:
            with self._lock:
                command()
        except ValueError as error:
            self._fault('command_not_finite', str(error))

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response):
        if self._episode['state'] in (NO_START, BROKEN):
            response.message = f'the simulator {self._episode["state"]}, see /diagnostics'
            return response
        wanted: Future = Future()
        self._wanted = wanted
        end = time.monotonic() + RESET_S
        while not wanted.done() and not self._stop.is_set() and time.monotonic() < end:
            wait([wanted], POLL_S)
        if not wanted.done():
            response.message = f'the simulator did not answer within {RESET_S:g} s'
        elif wanted.exception() is not None:
            response.message = str(wanted.exception())
        else:
            response.success, response.message = True, wanted.result()
        return response

    # Simulator thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            cameras, size = tuple(self._value('cameras')), self._value('size')
            arm = self._make(self._value('task'), cameras, size)
        except Exception as error:  # of LIBERO's files and MuJoCo's models as well
            own = isinstance(error, SpecPruneError)
            self._fault(getattr(error, 'code', 'error'), str(error) if own else named(error))
            self._tell({'state': NO_START})
            return
        try:
            self._begin(arm)
            while not self._halt.is_set():
                if self._wanted is not None:
                    self._answer(arm)
                else:
                    self._step(arm)
        except Exception as error:  # the simulator has errors of its own
            self._fault(getattr(error, 'code', 'error'), named(error))
            self._tell({**self._episode, 'state': BROKEN})
        finally:
            arm.close()

    def _begin(self, arm: SimulatedArm) -> None:
        seed, split = self._value('seed'), self._value('split')
        state = arm.reset(seed, split)
        with self._lock:
            self._commands.forget()
        self._episode = {
            'task': arm.task.name, 'seed': seed, 'split': split, 'state': RUNNING, 'step': 0,
        }  # fmt: skip
        if self._instructions is not None:
            self._instructions.publish(String(data=arm.instruction))
        self._show(arm, state, self._clock_source.now_ns())

    def _answer(self, arm: SimulatedArm) -> None:
        wanted, self._wanted = self._wanted, None
        try:
            self._begin(arm)
        except Exception as error:
            wanted.set_exception(error)
            if not isinstance(error, ConfigError):
                raise
        else:
            wanted.set_result(f'{arm.task.name}, seed {self._episode["seed"]}: {arm.instruction}')

    def _step(self, arm: SimulatedArm) -> None:
        """One control step: computed ahead, shown when its time has come."""
        now_ns = self._clock_source.now_ns()
        with self._lock:
            action = self._commands.action(now_ns)
        if self._episode['state'] != RUNNING:
            action[:6] = 0.0
        state = arm.step(action)
        self._clock_source.allow(now_ns + STEP_NS)
        images = arm.images()
        if self._clock_source.wait_for(now_ns + STEP_NS, self._halt):
            self._show(arm, state, now_ns + STEP_NS, images)

    def _show(
        self,
        arm: SimulatedArm,
        state: SimState,
        now_ns: int,
        images: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self._joints.publish(conversions.joints_to_msg(JOINT_NAMES, state.joints, now_ns))
        frame_id = self._value('frame_id')
        pose = conversions.pose_to_msg(state.hand, state.hand_xyzw, now_ns, frame_id)
        self._poses.publish(pose)
        for name, image in (images or arm.images()).items():
            turned = image[::-1, ::-1] if name in self._upside_down else image
            msg = conversions.image_to_msg(turned, now_ns, f'{name}_optical_frame')
            self._images[name].publish(msg)
        self._judge(arm, state)

    def _judge(self, arm: SimulatedArm, state: SimState) -> None:
        before = self._episode['state']
        if before == RUNNING:
            late = state.step >= arm.task.max_steps
            now = SUCCESS if arm.success else FAILED if late else RUNNING
            # Another dict: the executor's thread may be reading this one.
            self._episode = {**self._episode, 'state': now, 'step': state.step}
        if state.step == 0 or self._episode['state'] != before:
            self._tell(self._episode)

    def _tell(self, episode: dict[str, object]) -> None:
        self._episode = episode
        self._episodes.publish(String(data=json.dumps(episode)))

    # Clock thread --------------------------------------------------------------------------------

    def _tick(self) -> None:
        while not self._halt.wait(TICK_S):
            now = conversions.to_time(self._clock_source.now_ns())
            self._clocks.publish(Clock(clock=now))

    # Diagnostics ---------------------------------------------------------------------------------

    def _fault(self, code: str, message: str) -> None:
        if self._health.fault(code, message):
            self.get_logger().error(message)

    def _publish_diagnostics(self) -> None:
        name = diagnostics.node_name(self)
        state = self._episode['state']
        level = diagnostics.OK if state in (RUNNING, SUCCESS) else diagnostics.WARN
        level = diagnostics.ERROR if state in (NO_START, BROKEN) else level
        values = {key: str(value) for key, value in self._episode.items()}
        statuses = [
            diagnostics.status(f'{name}: episode', level, state, values),
            diagnostics.fault_status(name, self._health),
        ]
        now_ns = self._clock_source.now_ns()
        self._diagnostics.publish(diagnostics.array(now_ns, self._value('task'), statuses))


def main(args: list[str] | None = None) -> int:
    """Process entry point."""
    return spin_process(SimNode, args)


if __name__ == '__main__':
    raise SystemExit(main())
