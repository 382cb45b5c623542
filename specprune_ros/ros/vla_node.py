"""`vla_node`: cameras, robot state and an instruction in; action chunks and what pruning did out.

A lifecycle node. Threads: the executor's one thread runs callbacks, which only store; the
inference thread (worker.py) runs the policy and publishes. No callback waits for an inference, so
parameters and deactivate are answered while one runs; cleanup and shutdown wait for it, STOP_S at
the most. Configure takes as long as loading the model takes, and gives up when the process is told
to end.
"""

from __future__ import annotations

import gc
import threading
import traceback

from diagnostic_msgs.msg import DiagnosticArray, DiagnosticStatus
from geometry_msgs.msg import PoseStamped
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import InvalidTopicNameException
from rclpy.lifecycle import LifecycleNode, LifecycleState, TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.validate_topic_name import validate_topic_name
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from specprune_ros.config import PolicyConfig
from specprune_ros.errors import ConfigError, ObservationError, SpecPruneError
from specprune_ros.health import Health
from specprune_ros.images import as_rgb
from specprune_ros.inbox import JOINTS, POSE, Inbox, proprio_inputs
from specprune_ros.loading import load_policy
from specprune_ros.msg import ActionChunk, ExecutedAction, PruningDiagnostics
from specprune_ros.overlay import draw_overlay
from specprune_ros.ros import conversions, diagnostics, qos
from specprune_ros.ros.params import Parameters, fixed_changes
from specprune_ros.ros.process import spin_process
from specprune_ros.types import PolicyResult
from specprune_ros.worker import InferenceWorker, Job, LoadingThread

STOP_S = 1.0  # how long cleanup waits for a running inference
TRANSPORTS = {'raw': (Image, ''), 'compressed': (CompressedImage, '/compressed')}
SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


class VlaNode(LifecycleNode):
    """Runs a pruned VLA on the robot.

    Subscribes (when active): cameras/<name>/image_raw[/compressed] or the configured topics,
    joint_states and eef_pose where the robot's proprioception needs them, executed_action,
    ~/instruction. Publishes: ~/action_chunk, ~/pruning, ~/overlay/<name>, /diagnostics.
    """

    def __init__(self, stop: threading.Event | None = None, *, name: str = 'vla_node', **kwargs):
        # Undeclared ones are let through to `_on_parameters`, which refuses them with a reason.
        super().__init__(name, allow_undeclared_parameters=True, **kwargs)
        self._stop = stop or threading.Event()
        self._loading: LoadingThread | None = None
        self._health = Health()
        self._settings = Parameters(self, PolicyConfig)
        self._config: PolicyConfig | None = None
        self._worker: InferenceWorker | None = None
        self._inbox: Inbox | None = None
        self._hardware = ''
        self._late_s = 0.0
        self._inputs: list = []  # subscriptions and the query timer, while active
        self._outputs: dict[str, object] = {}
        self._overlays: dict[str, object] = {}
        self._frame_ids: dict[str, str] = {}
        # Results of an older ticket are void: it rises with every activation and instruction.
        self._ticket = 0
        self._active = False
        self._gate = threading.Lock()  # held while a chunk goes out, and to stop that
        self._diagnostics = self.create_publisher(DiagnosticArray, '/diagnostics', qos.DIAGNOSTICS)
        # Steady time: diagnostics must come even when simulated time stands still.
        self.create_timer(
            diagnostics.PERIOD_S,
            self._publish_diagnostics,
            clock=Clock(clock_type=ClockType.STEADY_TIME),
        )
        self._replan = self.create_guard_condition(self._on_replan)  # from the inference thread
        self.add_on_set_parameters_callback(self._on_parameters)
        for stranger, value in self._settings.strangers().items():
            error = ConfigError(stranger, value, 'unknown parameter, ignored')
            self._fault(error.code, str(error))
        self.get_logger().info('up and unconfigured: configure and activate it')

    # Lifecycle -------------------------------------------------------------------------------

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Load the model, warm it up, make publishers. On failure the node stays unconfigured."""
        try:
            config = self._settings.read()
            self._check_topics(config)
            self._loading = LoadingThread(lambda: warm_policy(config))
            policy = self._loading.wait(self._stop)
            self._set_up(config, policy)
        except SpecPruneError as error:
            self._fault(error.code, str(error))
            return FAILURE
        except Exception:  # rclpy would swallow the traceback
            self._fault('configure', traceback.format_exc())
            return FAILURE
        info = policy.model.info
        self.get_logger().info(
            f'{info.name}: {info.parameters / 1e6:.1f} M parameters, cameras '
            f'{", ".join(info.cameras)}, method {config.pruning.method}'
        )
        if info.stand_in:
            self.get_logger().warning('random stand-in weights: the actions mean nothing')
        return SUCCESS

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Subscribe and start to infer; on failure the node stays inactive."""
        try:
            self._start_inputs()
        except Exception:  # rclpy would swallow the traceback
            self._stop_inputs()
            self._fault('activate', traceback.format_exc())
            return FAILURE
        return super().on_activate(state)

    def _start_inputs(self) -> None:
        robot = self._config.robot
        transports = robot.per_camera('camera_transports')
        for camera, topic in robot.image_topics().items():
            kind, suffix = TRANSPORTS[transports[camera]]
            callback = self._image_callback(camera)
            self._subscribe(kind, topic + suffix, callback, qos.SENSOR)
        states = {JOINTS: (JointState, self._on_joints), POSE: (PoseStamped, self._on_pose)}
        for topic in proprio_inputs(robot):
            kind, callback = states[topic]
            self._subscribe(kind, topic, callback, qos.SENSOR)
        self._subscribe(ExecutedAction, 'executed_action', self._on_executed, qos.EVERY_STEP)
        self._subscribe(String, '~/instruction', self._on_instruction, qos.LATCHED)
        period = 1.0 / self._config.runtime.query_rate_hz
        self._inputs.append(self.create_timer(period, self._on_query))
        with self._gate:
            self._ticket += 1
            self._active = True

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop at once: nothing is published from here on, a running inference is discarded."""
        self._stop_inputs()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Free the model."""
        self._tear_down()
        return SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Stop and free, from any state."""
        self._tear_down()
        return SUCCESS

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """A transition raised: free everything and become unconfigured, to be configured again."""
        self._fault('transition', f'a transition from {state.label} failed')
        self._tear_down()
        return SUCCESS

    def shut_down(self) -> bool:
        """What the process does last (see ros/process.py); False when a thread would not end."""
        loading = self._loading is not None and self._loading.is_alive
        return self._tear_down() and not loading

    @staticmethod
    def _check_topics(config: PolicyConfig) -> None:
        for topic in config.robot.image_topics().values():
            try:
                validate_topic_name(topic)
            except InvalidTopicNameException as error:
                raise ConfigError('robot.camera_topics', topic, str(error)) from error

    def _set_up(self, config: PolicyConfig, policy) -> None:
        self._config = config
        self._hardware = policy.model.info.name
        self._late_s = config.runtime.max_result_age_s
        self._inbox = Inbox(config.robot, config.runtime)
        self._outputs = {
            'chunk': self.create_publisher(
                ActionChunk,
                '~/action_chunk',
                qos.chunk(config.robot.horizon * config.robot.step_dt_s),
            ),
            'pruning': self.create_publisher(PruningDiagnostics, '~/pruning', qos.REPORTS),
        }
        self._overlays = {
            name: self.create_publisher(Image, f'~/overlay/{name}', qos.RELIABLE)
            for name in config.robot.camera_names
        }
        self._worker = InferenceWorker(
            policy, self._on_result, self._on_error, self._replan.trigger
        )

    def _stop_inputs(self) -> None:
        with self._gate:
            self._active = False
            self._ticket += 1
        for handle in self._inputs:
            destroy = self.destroy_timer if hasattr(handle, 'reset') else self.destroy_subscription
            destroy(handle)
        self._inputs.clear()
        if self._inbox is not None:
            self._inbox.forget_inputs()
        if self._worker is not None:
            self._worker.reset()

    def _tear_down(self) -> bool:
        self._stop_inputs()
        ended = self._worker is None or self._worker.stop(STOP_S)
        if not ended:
            self._fault('hung', f'an inference did not end within {STOP_S:g} s; abandoned')
        for publisher in (*self._outputs.values(), *self._overlays.values()):
            self.destroy_publisher(publisher)
        self._outputs, self._overlays = {}, {}
        self._worker, self._inbox, self._config, self._hardware = None, None, None, ''
        gc.collect()  # the model, and with it the GPU's memory
        return ended

    def _subscribe(self, kind: type, topic: str, callback, profile) -> None:
        self._inputs.append(self.create_subscription(kind, topic, callback, profile))

    # Inputs: callbacks only store ------------------------------------------------------------

    def _image_callback(self, camera: str):
        field = f'cameras/{camera}'

        def on_image(msg: Image | CompressedImage) -> None:
            with self._counting():
                image = conversions.image_from_msg(msg, field)
                self._inbox.put_image(camera, self._stamp(field, msg), image)
                self._frame_ids[camera] = msg.header.frame_id

        return on_image

    def _on_joints(self, msg: JointState) -> None:
        with self._counting():
            self._inbox.put_joints(self._stamp(JOINTS, msg), msg.name, msg.position)

    def _on_pose(self, msg: PoseStamped) -> None:
        with self._counting():
            self._inbox.put_pose(self._stamp(POSE, msg), *conversions.pose_from_msg(msg))

    def _on_instruction(self, msg: String) -> None:
        with self._counting():
            if self._inbox.put_instruction(msg.data):
                with self._gate:
                    self._ticket += 1

    def _on_executed(self, msg: ExecutedAction) -> None:
        images = self._inbox.recent_images(self._now_ns())
        self._worker.observe(conversions.executed_from_msg(msg), images)

    def _on_replan(self) -> None:
        """Motion turned fine, and pruning.replan_on_fine asks for a query at once."""
        if self._active:
            self._on_query()

    def _on_query(self) -> None:
        """Leave one observation for the inference thread, or say why there is none."""
        if not self._inbox.has_task:
            return  # waiting for a task is a state, and `inputs` in the diagnostics says so
        with self._counting():
            observation = self._inbox.observation(self._now_ns())
            self._worker.submit(Job(self._ticket, observation))

    # Outputs: in the inference thread --------------------------------------------------------

    def _on_result(self, job: Job, result: PolicyResult) -> None:
        now = self._now_ns()
        result = conversions.stamped(result, now)
        chunk, report = (
            conversions.chunk_to_msg(result.chunk),
            conversions.report_to_msg(result.report),
        )
        with self._gate:
            if self._is_void(job) or self._is_late(job, now):
                self._health.discarded()
                return
            self._outputs['chunk'].publish(chunk)
            self._outputs['pruning'].publish(report)
        self._health.inferred(result)
        self._publish_overlays(job, result)

    def _is_void(self, job: Job) -> bool:
        return not self._active or job.ticket != self._ticket

    def _is_late(self, job: Job, now_ns: int) -> bool:
        """Whether the observation is too old for its chunk to be acted on."""
        age_s, limit = (now_ns - job.observation.stamp_ns) / 1e9, self._late_s
        if age_s > limit:
            self._fault('late', f'chunk of an observation {age_s:.3f} s old, limit {limit:g} s')
        return age_s > limit

    def _publish_overlays(self, job: Job, result: PolicyResult) -> None:
        opacity = self.get_parameter('runtime.overlay_opacity').value
        for camera, publisher in self._overlays.items():
            if publisher.get_subscription_count() == 0:
                continue
            image = as_rgb(job.observation.images[camera])
            overlay = draw_overlay(image, result.report, camera, opacity)
            stamp_ns = job.observation.image_stamps_ns[camera]
            frame_id = self._frame_ids.get(camera, '')
            msg = conversions.image_to_msg(overlay, stamp_ns, frame_id)
            with self._gate:
                if self._is_void(job):
                    return
                publisher.publish(msg)

    def _on_error(self, error: Exception) -> None:
        if isinstance(error, SpecPruneError):
            self._fault(error.code, str(error))
            return
        text = ''.join(traceback.format_exception(error))
        self._fault('inference', f'{type(error).__name__}: {error}', text)

    # Parameters and diagnostics --------------------------------------------------------------

    def _on_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        """Validate; what is fixed while configured, and what does not fit, keeps its old value."""
        try:
            config = self._settings.with_changes(parameters)
            for parameter in fixed_changes(parameters) if self._config is not None else []:
                raise ConfigError(
                    parameter.name, parameter.value, 'is fixed once configured: clean up first'
                )
            if self._worker is not None and config.pruning != self._config.pruning:
                self._worker.set_pruning(checked_pruning(config))
                self._config = config
        except ConfigError as error:
            self._fault(error.code, str(error))
            return SetParametersResult(successful=False, reason=str(error))
        self._settings.accept(parameters)
        return SetParametersResult(successful=True)

    def _publish_diagnostics(self) -> None:
        now, name = self._now_ns(), diagnostics.node_name(self)
        statuses = [
            self._input_status(now),
            diagnostics.status(
                f'{name}: inference', diagnostics.OK, self._state(), self._health.inference()
            ),
            diagnostics.status(
                f'{name}: pruning', diagnostics.OK, self._state(), self._health.pruning()
            ),
            diagnostics.fault_status(name, self._health),
        ]
        self._diagnostics.publish(diagnostics.array(now, self._hardware, statuses))

    def _input_status(self, now_ns: int) -> DiagnosticStatus:
        name = f'{diagnostics.node_name(self)}: inputs'
        if not self._active:
            return diagnostics.status(name, diagnostics.OK, self._state(), {})
        ages = self._inbox.age_s(now_ns)
        values = {f'{key} age s': f'{age:.3f}' for key, age in ages.items()}
        try:
            self._inbox.observation(now_ns)
        except ObservationError as error:
            return diagnostics.status(name, diagnostics.STALE, str(error), values)
        return diagnostics.status(name, diagnostics.OK, 'complete', values)

    def _state(self) -> str:
        if self._active:
            return 'active'
        return 'inactive' if self._worker is not None else 'unconfigured'

    def _stamp(self, field: str, msg) -> int:
        """Header stamp; the time of receipt, and a fault, where the sender left it 0."""
        stamp_ns = conversions.to_ns(msg.header.stamp)
        if stamp_ns == 0:
            self._fault('stamp_missing', f'{field}.header.stamp = 0: taking the time of receipt')
            return self._now_ns()
        return stamp_ns

    def _now_ns(self) -> int:
        return self.get_clock().now().nanoseconds

    def _counting(self) -> _Counting:
        return _Counting(self)

    def _fault(self, code: str, message: str, log: str = '') -> None:
        if self._health.fault(code, message):
            self.get_logger().error(log or message)


class _Counting:
    """Context in which an ObservationError is counted, and skips what comes after it."""

    def __init__(self, node: VlaNode):
        self._node = node

    def __enter__(self) -> None: ...

    def __exit__(self, kind, error, trace) -> bool:
        if isinstance(error, ObservationError):
            self._node._fault(error.code, str(error))
            return True
        return False


def warm_policy(config: PolicyConfig):
    """The policy, loaded and warmed up; what it raises, see loading.load_policy."""
    policy = load_policy(config)
    policy.warm_up()
    return policy


def checked_pruning(config: PolicyConfig):
    """The pruning parameters, if their method exists.

    Raises:
        ConfigError: no such method.
    """
    from specprune_ros.pruning import make_method

    make_method(config.pruning)
    return config.pruning


def main(args: list[str] | None = None) -> int:
    """Process entry point."""
    return spin_process(VlaNode, args)


if __name__ == '__main__':
    raise SystemExit(main())
