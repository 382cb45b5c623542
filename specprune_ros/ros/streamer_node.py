"""`action_streamer`: action chunks in; one checked command per control step out to the robot.

A lifecycle node around streaming.Streamer, which decides what may leave. Everything runs in the
executor's one thread and is short: the control timer (robot.step_dt_s, ROS time), the inputs, the
services. Configure makes publishers and listens to `e_stop`; activate subscribes to the rest;
`~/enable true` lets it move. A process that was restarted is unconfigured: nothing moves until
somebody configures, activates and enables it again.
"""

from __future__ import annotations

from collections.abc import Callable

from diagnostic_msgs.msg import DiagnosticArray
from geometry_msgs.msg import PoseStamped, TwistStamped
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType, JumpThreshold
from rclpy.duration import Duration
from rclpy.parameter import Parameter
from sensor_msgs.msg import JointState
from std_msgs.msg import Float64MultiArray
from std_srvs.srv import SetBool, Trigger
from trajectory_msgs.msg import JointTrajectory

from specprune_ros import faults
from specprune_ros.errors import ConfigError
from specprune_ros.health import Health
from specprune_ros.inbox import JOINTS, POSE
from specprune_ros.msg import ActionChunk, ExecutedAction, StreamerStatus, VlaStatus
from specprune_ros.ros import conversions, diagnostics, qos
from specprune_ros.ros.e_stop import EmergencyStopInput
from specprune_ros.ros.lifecycle import ManagedNode
from specprune_ros.ros.params import Parameters, fixed_changes
from specprune_ros.ros.process import control_clock, spin_process
from specprune_ros.ros.streamer_monitor import Arrivals, Monitor
from specprune_ros.streaming.config import StreamerConfig
from specprune_ros.streaming.streamer import Command, Output, Safety, Streamer, StreamState
from specprune_ros.types import ExecutedAction as Executed

CHUNKS, PEER = 'vla_node/action_chunk', 'vla_node/status'
# stream.output -> message, topic, and how a target becomes that message
ROBOT_TOPICS = {
    'joint_trajectory': (JointTrajectory, 'joint_trajectory', conversions.joint_target_to_msg),
    'twist': (TwistStamped, 'delta_twist_cmds', conversions.twist_target_to_msg),
    'pose': (PoseStamped, 'pose_command', conversions.pose_target_to_msg),
}
GRIPPER_TOPIC = 'gripper_command'
ACK_S = 0.2  # longest wait for the last message to arrive, where nothing comes after it


class StreamerNode(ManagedNode):
    """Streams action chunks to a robot's controller.

    Subscribes: e_stop (when configured); when active vla_node/status, vla_node/action_chunk, and
    joint_states or eef_pose, whichever the output needs. Publishes: executed_action, ~/status,
    /diagnostics, and, unless in dry run, one of joint_trajectory, delta_twist_cmds and
    pose_command, and gripper_command. Services: ~/enable, ~/pause, ~/reset.
    """

    def __init__(self, *, name: str = 'action_streamer', **kwargs):
        # Undeclared ones are let through to `_on_parameters`, which refuses them with a reason.
        super().__init__(name, allow_undeclared_parameters=True, **kwargs)
        self._health = Health()
        self._fault_shown = (0, '')  # number and message of the newest fault
        self._settings = Parameters(self, StreamerConfig())
        self._config: StreamerConfig | None = None
        self._streamer: Streamer | None = None
        self._was_stopped = False  # by an emergency stop, when the last configuration ended
        self._inputs: list = []  # subscriptions and the control timer, while active
        self._monitor: Monitor | None = None
        self._outputs: dict[str, object] = {}  # publishers, while configured
        self._e_stop: EmergencyStopInput | None = None
        self._jumps = None
        self._peer: VlaStatus | None = None
        self._shown: tuple = ()  # what the last change published
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', qos.DIAGNOSTICS)
        self._status = self.create_publisher(StreamerStatus, '~/status', qos.LATCHED)
        # Steady time: both must come even when simulated time stands still.
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        heartbeat_s = 1.0 / StreamerStatus.HEARTBEAT_HZ
        self.create_timer(heartbeat_s, self._publish_status, clock=steady)
        self.create_timer(diagnostics.PERIOD_S, self._publish_diagnostics, clock=steady)
        self.create_service(SetBool, '~/enable', self._on_enable)
        self.create_service(SetBool, '~/pause', self._on_pause)
        self.create_service(Trigger, '~/reset', self._on_reset)
        self.add_on_set_parameters_callback(self._on_parameters)
        for stranger, value in self._settings.strangers().items():
            error = ConfigError(stranger, value, 'unknown parameter, ignored')
            self._fault(error.code, str(error))
        self.get_logger().info('up and unconfigured: configure and activate it')

    # Lifecycle -------------------------------------------------------------------------------

    def shut_down(self) -> bool:
        """What the process does last (see ros/process.py)."""
        self._tear_down()
        return True

    def _set_up(self) -> None:
        config = self._settings.read()
        self._streamer = Streamer(config, self._fault, stopped=self._was_stopped)
        self._config, self._monitor = config, Monitor(config, self._streamer)
        stream = config.stream
        if stream.output in ROBOT_TOPICS:
            self._publish_on(ExecutedAction, 'executed_action', qos.EVERY_STEP)
        for topic, kind in self._robot_topics(config).items():
            self._publish_on(kind, topic, qos.COMMANDS)
        self._e_stop = EmergencyStopInput(
            self, self._on_e_stop, lambda policy: self._on_incompatible('e_stop', policy)
        )
        self._jumps = self.get_clock().create_jump_callback(
            JumpThreshold(min_forward=None, min_backward=Duration(nanoseconds=-1)),
            post_callback=self._on_jump,
        )
        sent = 'dry run, nothing leaves' if stream.dry_run else 'commands leave for the robot'
        self.get_logger().info(f'output {stream.output}: {sent}')
        self._publish_status()

    @staticmethod
    def _robot_topics(config: StreamerConfig) -> dict[str, type]:
        """Topics that move something; none in dry run, so that nothing can leave by mistake."""
        stream = config.stream
        if stream.dry_run or stream.output not in ROBOT_TOPICS:
            return {}
        kind, topic, _ = ROBOT_TOPICS[stream.output]
        gripper = {GRIPPER_TOPIC: Float64MultiArray} if stream.gripper == 'position' else {}
        return {topic: kind, **gripper}

    def _start(self) -> None:
        self._streamer.activate(self._now_ns())
        # Before the chunks: of a status and a chunk that wait both, the status has to come first,
        # because a chunk of an epoch that no status has announced is refused.
        self._subscribe(VlaStatus, PEER, self._on_peer, qos.LATCHED)
        self._subscribe(ActionChunk, CHUNKS, self._on_chunk, qos.RELIABLE)
        if self._config.stream.output == 'joint_trajectory':
            self._subscribe(JointState, JOINTS, self._on_joints, qos.SENSOR)
        elif self._config.stream.output in ROBOT_TOPICS:
            self._subscribe(PoseStamped, POSE, self._on_pose, qos.SENSOR)
        period_s = self._config.robot.step_dt_s
        self._inputs.append(self.create_timer(period_s, self._on_step, clock=control_clock(self)))
        self._publish_status()

    def _halt(self) -> None:
        """Stop at once: the safety output is the last message to the robot."""
        for handle in self._inputs:
            destroy = self.destroy_timer if hasattr(handle, 'reset') else self.destroy_subscription
            destroy(handle)
        self._inputs.clear()
        self._peer = None
        if self._streamer is not None:
            self._monitor.inputs.clear()
            self._send(self._streamer.deactivate(self._now_ns()))
            for publisher in self._outputs.values():
                publisher.wait_for_all_acked(Duration(seconds=ACK_S))
        self._publish_status()

    def _tear_down(self) -> None:
        self._halt()
        for publisher in self._outputs.values():
            self.destroy_publisher(publisher)
        self._outputs.clear()
        if self._e_stop is not None:
            self._e_stop.destroy()
        if self._jumps is not None:
            self._jumps.unregister()
        if self._streamer is not None:
            self._was_stopped = self._streamer.is_stopped
        self._streamer, self._config, self._monitor = None, None, None
        self._e_stop, self._jumps = None, None
        self._publish_status()

    def _publish_on(self, kind: type, topic: str, profile) -> None:
        events = qos.publisher_events(lambda policy: self._on_incompatible(topic, policy))
        self._outputs[topic] = self.create_publisher(kind, topic, profile, event_callbacks=events)

    def _subscribe(self, kind: type, topic: str, callback: Callable, profile) -> None:
        self._monitor.inputs[topic] = Arrivals()
        self._inputs.append(self._subscription(kind, topic, callback, profile))

    def _subscription(self, kind: type, topic: str, callback: Callable, profile):
        events = qos.subscription_events(lambda policy: self._on_incompatible(topic, policy))
        return self.create_subscription(kind, topic, callback, profile, event_callbacks=events)

    # Inputs ----------------------------------------------------------------------------------

    def _on_peer(self, msg: VlaStatus) -> None:
        self._monitor.inputs[PEER].count()
        self._peer = msg
        self._tell_peer()

    def _on_chunk(self, msg: ActionChunk) -> None:
        self._monitor.inputs[CHUNKS].count()
        try:
            chunk = conversions.chunk_from_msg(msg)
        except ValueError as error:
            self._monitor.malformed += 1
            self._fault('chunk_shape', f'action_chunk.data = {len(msg.data)} numbers: {error}')
            return
        self._streamer.put_chunk(chunk, self._now_ns())
        self._publish_changes()

    def _on_joints(self, msg: JointState) -> None:
        self._monitor.inputs[JOINTS].count()
        stamp_ns = self._stamp(JOINTS, msg)
        self._streamer.put_joints(stamp_ns, msg.name, msg.position, self._now_ns())

    def _on_pose(self, msg: PoseStamped) -> None:
        self._monitor.inputs[POSE].count()
        stamp_ns, pose = self._stamp(POSE, msg), conversions.pose_from_msg(msg)
        self._streamer.put_pose(stamp_ns, *pose, msg.header.frame_id, self._now_ns())

    def _on_e_stop(self, on: bool) -> None:
        self._send(self._streamer.e_stop(on, self._now_ns()))

    def _on_jump(self, jump) -> None:
        """Time went backwards or its source changed: the core is told before anything else."""
        self._send(self._streamer.tick(self._now_ns()))

    def _on_incompatible(self, topic: str, policy: str) -> None:
        """A peer that cannot be heard."""
        self._fault('qos_incompatible', f'{topic}: a peer differs in {policy}, nothing passes')

    # The control loop ------------------------------------------------------------------------

    def _on_step(self) -> None:
        self._monitor.steps.count()
        self._tell_peer()
        if self._streamer.state == StreamState.STREAMING and self._unheard():
            # Whoever listens next may be another controller: somebody has to enable it again.
            self._fault('subscriber_gone', f'{self._unheard()}: disabled')
            self._send(self._streamer.enable(False, self._now_ns())[2])
        self._send(self._streamer.tick(self._now_ns()))

    def _send(self, outputs: list[Output]) -> None:
        now_ns = self._now_ns()
        for output in outputs:
            if isinstance(output, Command):
                self._send_command(output, now_ns)
            else:
                self._send_safety(output, now_ns)
        self._publish_changes()

    def _send_safety(self, safety: Safety, now_ns: int) -> None:
        self.get_logger().warning(f'stopped streaming: {safety.reason}')
        if not safety.dry_run:
            self._send_target(safety.target, now_ns)
        if safety.executed is not None:
            self._publish_executed(safety.executed)

    def _send_command(self, command: Command, now_ns: int) -> None:
        self._monitor.commands.count()
        if not command.executed.dry_run:
            self._send_target(command.target, now_ns)
            if command.gripper is not None and GRIPPER_TOPIC in self._outputs:
                self._outputs[GRIPPER_TOPIC].publish(conversions.gripper_to_msg(command.gripper))
        self._publish_executed(command.executed)

    def _publish_executed(self, action: Executed) -> None:
        self._outputs['executed_action'].publish(conversions.executed_to_msg(action))

    def _send_target(self, target: object, now_ns: int) -> None:
        """Publish a target, where there is one, and a publisher for it: not in dry run."""
        stream = self._config.stream
        _, topic, to_msg = ROBOT_TOPICS[stream.output]
        if target is None or topic not in self._outputs:
            return
        # A trajectory stamped 0 starts when it arrives.
        at_once = stream.output == 'joint_trajectory' and stream.trajectory_start == 'now'
        self._outputs[topic].publish(to_msg(target, 0 if at_once else now_ns))

    def _unheard(self) -> str:
        """Why nobody would hear a command; empty when somebody does, or none is sent."""
        topics = self._robot_topics(self._config)
        deaf = [name for name in topics if self._outputs[name].get_subscription_count() == 0]
        return f'nobody subscribes to {", ".join(deaf)}' if deaf else ''

    def _tell_peer(self) -> None:
        """How old vla_node's newest status is, in steady time: simulated time may run faster."""
        if self._peer is None:
            return
        now_ns = self._now_ns()
        stamp_ns = now_ns - round(self._monitor.inputs[PEER].age_s() * conversions.NS)
        running = self._peer.state == VlaStatus.STATE_RUNNING
        self._streamer.put_peer(running, self._peer.epoch, stamp_ns, now_ns)

    # Services --------------------------------------------------------------------------------

    def _on_enable(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        if self._streamer is not None and request.data and self._unheard():
            response.message = f'{self._unheard()}: start the controller first'
            return response
        return self._answer(response, lambda core, now: core.enable(request.data, now))

    def _on_pause(self, request: SetBool.Request, response: SetBool.Response) -> SetBool.Response:
        return self._answer(response, lambda core, now: core.pause(request.data, now))

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        return self._answer(response, lambda core, now: core.reset(now))

    def _answer(self, response, act: Callable):
        """Let the operator act on the core, and say whether it took effect and why not."""
        if self._streamer is None:
            response.message = 'unconfigured: configure and activate the node first'
            return response
        response.success, why, outputs = act(self._streamer, self._now_ns())
        response.message = why or self._state().name.lower()
        self._send(outputs)
        return response

    # Parameters, status and diagnostics ------------------------------------------------------

    def _on_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        """Validate; what is fixed while configured, and what does not fit, keeps its old value."""
        try:
            self._settings.with_changes(parameters)
            fixed = fixed_changes(parameters, StreamerConfig) if self._config is not None else []
            for parameter in fixed:
                raise ConfigError(
                    parameter.name, parameter.value, 'is fixed once configured: clean up first'
                )
        except ConfigError as error:
            self._fault(error.code, str(error))
            return SetParametersResult(successful=False, reason=str(error))
        self._settings.accept(parameters)
        return SetParametersResult(successful=True)

    def _state(self) -> StreamState:
        return StreamState.UNCONFIGURED if self._streamer is None else self._streamer.state

    def _publish_changes(self) -> None:
        """A status at once when one of the things that an operator waits for has changed."""
        core = self._streamer
        now = (self._state(), self._fault_shown, core and (core.epoch, core.chunk_id))
        if now != self._shown:
            self._shown = now
            self._publish_status()

    def _publish_status(self) -> None:
        config = self._config
        msg = StreamerStatus(state=int(self._state()))
        msg.header.stamp = conversions.to_time(self._now_ns())
        # Without a configuration nothing leaves either.
        msg.dry_run = config is None or config.stream.dry_run
        msg.fault_code, msg.fault_message = self._fault_shown
        if self._streamer is not None:
            msg.names = list(config.robot.action_names)
            conversions.fill_streamer_status(msg, self._streamer)
            msg.chunks_rejected += self._monitor.malformed
        self._status.publish(msg)

    def _publish_diagnostics(self) -> None:
        name = diagnostics.node_name(self)
        statuses = [diagnostics.fault_status(name, self._health)]
        if self._monitor is not None:
            stream = self._config.stream
            silence_s = {PEER: stream.peer_timeout_s}
            silence_s |= dict.fromkeys((JOINTS, POSE), stream.max_state_age_s)
            statuses += self._monitor.statuses(name, self._fault_shown[1], silence_s)
        self._diagnostics.publish(diagnostics.array(self._now_ns(), '', statuses))

    def _stamp(self, field: str, msg) -> int:
        """Header stamp; the time of receipt, and a fault, where the sender left it 0."""
        stamp_ns = conversions.to_ns(msg.header.stamp)
        if stamp_ns == 0:
            self._fault('stamp_missing', f'{field}.header.stamp = 0: taking the time of receipt')
            return self._now_ns()
        return stamp_ns

    def _now_ns(self) -> int:
        return self.get_clock().now().nanoseconds

    def _fault(self, code: str, message: str, log: str = '') -> None:
        self._fault_shown = (faults.number(code), message)
        if self._health.fault(code, message):
            self.get_logger().error(log or message)


def main(args: list[str] | None = None) -> int:
    """Process entry point."""
    return spin_process(lambda stop: StreamerNode(), args)


if __name__ == '__main__':
    raise SystemExit(main())
