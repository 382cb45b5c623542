"""`vla_node`: cameras, robot state and a task in; action chunks and what pruning did out.

A lifecycle node. Threads: the executor's one thread runs callbacks, which only store, and owns the
task (tasks.py); the inference thread (worker.py) runs the policy and publishes; a third draws
overlays while inference pauses. No callback waits for an inference, so services, parameters and
deactivate are answered while one runs; cleanup and shutdown wait for it, STOP_S at the most.
Configure takes as long as loading the model takes, and gives up when the process is told to end;
until then status and diagnostics go on, and services wait.
"""

from __future__ import annotations

import dataclasses
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.clock import Clock, ClockType
from rclpy.exceptions import InvalidTopicNameException
from rclpy.expand_topic_name import expand_topic_name
from rclpy.parameter import Parameter
from rclpy.validate_topic_name import validate_topic_name
from std_srvs.srv import SetBool

from specprune_ros.config import PolicyConfig, PruneConfig
from specprune_ros.config_files import default_config
from specprune_ros.errors import ConfigError, ObservationError
from specprune_ros.health import Health, free_gpu_memory
from specprune_ros.loading import load_policy
from specprune_ros.msg import VlaStatus
from specprune_ros.ros import diagnostics, qos, vla_diagnostics
from specprune_ros.ros.e_stop import EmergencyStopInput
from specprune_ros.ros.lifecycle import ManagedNode
from specprune_ros.ros.params import Parameters, fixed_changes, given_parameters
from specprune_ros.ros.process import Mailbox, Paced, spin_process
from specprune_ros.ros.tasks import TaskServer
from specprune_ros.ros.vla_inputs import mismatch
from specprune_ros.ros.vla_once import InferOnceServer, OnceContext
from specprune_ros.ros.vla_outputs import StatusPublisher
from specprune_ros.ros.vla_pipeline import Pipeline, Surroundings
from specprune_ros.ros.vla_watch import WATCH_S, Watchdogs
from specprune_ros.shipped import is_shipped
from specprune_ros.tasks import NodeState, TaskEnd, TaskMachine
from specprune_ros.worker import InferenceWorker, LoadingThread, fault_code

if TYPE_CHECKING:
    from specprune_ros.policy import Policy

STOP_S = 1.0  # how long cleanup waits for a running inference
LAST_CALLS = 30  # turns of the executor in which the last answers leave


def warm_policy(config: PolicyConfig) -> Policy:
    """The policy, loaded and warmed up; what it raises, see loading.load_policy."""
    policy = load_policy(config)
    policy.warm_up()
    return policy


class VlaNode(ManagedNode):
    """Runs a pruned VLA on the robot.

    Subscribes (when active): cameras/<name>/image_raw[/compressed] or the configured topics,
    joint_states and eef_pose where the robot's proprioception needs them, executed_action,
    ~/instruction, action_streamer/status; while configured: e_stop. Publishes: ~/action_chunk,
    ~/pruning, ~/overlay/<name>, ~/status, ~/model_info, /diagnostics. Serves: ~/run_task and the
    services in ros/tasks.py, ~/set_dense, ~/infer_once.

    Args:
        stop: set when the process is to end: loading is given up.
        load: gives the policy.
        name: of the node.
    """

    def __init__(
        self,
        stop: threading.Event | None = None,
        *,
        load: Callable[[PolicyConfig], Policy] = warm_policy,
        name: str = 'vla_node',
        **kwargs,
    ):
        # Undeclared ones are let through to `_on_parameters`, which refuses them with a reason.
        super().__init__(name, allow_undeclared_parameters=True, **kwargs)
        self._ending, self._load = stop or threading.Event(), load
        self._loading: LoadingThread | None = None
        self._health = Health()
        self._settings = Parameters(self, default_config(given_parameters(self)))
        self._pipeline: Pipeline | None = None  # while configured
        self._asked = self._held = PruneConfig(), False  # pruning, whether dense: see _set_pruning
        self._emergency: EmergencyStopInput | None = None  # likewise
        self._abandoned: list[InferenceWorker] = []
        self._ended: list[TaskEnd] = []
        self._machine = TaskMachine(self._ended.append)
        self._settled_epoch = 0
        self._gate = threading.Lock()  # held while a chunk goes out, and to stop that
        self._mailbox = Mailbox(self)
        self._make_servers()
        self._make_timers()
        self.add_on_set_parameters_callback(self._on_parameters)
        for stranger, value in self._settings.strangers().items():
            error = ConfigError(stranger, value, 'unknown parameter, ignored')
            self._fault(error.code, str(error))
        self._status.publish()
        self.get_logger().info('up and unconfigured: configure and activate it')

    def _make_servers(self) -> None:
        self._diagnostics = self.create_publisher(
            DiagnosticArray, '/diagnostics', qos.DIAGNOSTICS, event_callbacks=qos.NO_EVENTS
        )
        self._status = StatusPublisher(self, self._machine, lambda: self._health.newest_fault)
        self._tasks = TaskServer(
            self,
            self._acting,
            was_reset=self._health.forgive,
            is_busy=self._is_busy,
            log=self.get_logger().info,
        )
        self._once = InferOnceServer(self, self._once_context)
        self.create_service(SetBool, '~/set_dense', self._on_set_dense)
        self._around = Surroundings(
            machine=self._machine,
            acting=self._acting,
            gate=self._gate,
            mailbox=self._mailbox,
            health=self._health,
            fault=self._fault,
            once=self._once,
            instruction=self._on_instruction,
            peer=lambda: self._watchdogs.peer_seen(),
        )
        self._watchdogs = Watchdogs(self, self._around, lambda: self._pipeline)

    def _make_timers(self) -> None:
        """In steady time: they must come even when simulated time stands still."""
        periods = [*self._signs_of_life(), (WATCH_S, self._watchdogs.look)]
        steady = Clock(clock_type=ClockType.STEADY_TIME)
        for period_s, callback in periods:
            self.create_timer(period_s, callback, clock=steady)

    def _signs_of_life(self) -> list[tuple[float, Callable[[], None]]]:
        """Period in s, and what shows that the node lives."""
        return [
            (diagnostics.PERIOD_S, self._publish_diagnostics),
            (1.0 / VlaStatus.HEARTBEAT_HZ, self._on_heartbeat),
        ]

    # Lifecycle -------------------------------------------------------------------------------

    def _set_up(self) -> None:
        config = self._settings.read()
        self._check_topics(config)
        self._check_place(config)
        # A thread that is given up must not hold the node, see process.py.
        load, health = self._load, self._health
        self._loading = LoadingThread(lambda: loaded(load, config, health))
        # The executor is here, and its timers are not.
        beats = [Paced(period_s, call) for period_s, call in self._signs_of_life()]
        policy = self._loading.wait(self._ending, lambda: [beat() for beat in beats])
        self._take(config, policy)
        info = policy.model.info
        self.get_logger().info(
            f'{info.name}: {info.parameters / 1e6:.1f} M parameters, cameras '
            f'{", ".join(info.cameras)}, method {config.pruning.method}'
        )
        if info.stand_in:
            self.get_logger().warning('random stand-in weights: the actions mean nothing')
        # Else now and then Python would look through all of torch's and the model's objects, for a
        # fifth of a second in which no emergency stop is heard.
        gc.collect()
        gc.freeze()

    def _start(self) -> None:
        with self._acting() as machine:
            machine.activate()
        self._pipeline.activate()

    def shut_down(self) -> bool:
        """What the process does last (see ros/process.py); False when a thread would not end."""
        waited_for = self._tasks.is_awaited or self._once.is_awaited
        self._tear_down()
        for _ in range(LAST_CALLS if waited_for and self.executor is not None else 0):
            self.executor.spin_once(timeout_sec=0.0)
        loading = self._loading is not None and self._loading.is_alive
        return not loading and not any(worker.is_alive for worker in self._abandoned)

    def destroy_node(self) -> None:
        """As rclpy's."""
        self._watchdogs.destroy()
        self._tasks.destroy()
        super().destroy_node()

    def _check_topics(self, config: PolicyConfig) -> None:
        for topic in config.robot.image_topics().values():
            try:
                validate_topic_name(topic)
                expand_topic_name(topic, self.get_name(), self.get_namespace())
            except (InvalidTopicNameException, ValueError, RuntimeError) as error:
                raise ConfigError('robot.camera_topics', topic, str(error)) from error

    def _check_place(self, config: PolicyConfig) -> None:
        """What ships with this package has seen no real arm, and moves none."""
        folder, simulated = config.model.checkpoint, self.get_parameter('use_sim_time').value
        if folder and is_shipped(folder) and not (config.runtime.dry_run or simulated):
            why = f'{folder} is for simulated arms: it needs use_sim_time'
            raise ConfigError('runtime.dry_run', False, why)

    def _take(self, config: PolicyConfig, policy: Policy) -> None:
        self._pipeline = Pipeline(self, config, policy, self._around)
        self._asked = self._held = config.pruning, False
        self._status.dense, self._status.dry_run = False, config.runtime.dry_run
        self._tasks.timeout_s = config.runtime.task_timeout_s
        with self._acting() as machine:
            machine.configure(config.runtime.max_failures, config.runtime.input_timeout_s)
        self._emergency = EmergencyStopInput(
            self,
            self._on_e_stop,
            lambda policy: self._fault('qos_incompatible', mismatch('e_stop', policy)),
        )

    def _halt(self) -> None:
        with self._acting() as machine:
            machine.deactivate()
        self._watchdogs.forget_peer()
        if self._pipeline is not None:
            self._pipeline.deactivate()

    def _tear_down(self) -> None:
        self._halt()
        self._once.give_up('the node was cleaned up')
        emergency, self._emergency = self._emergency, None
        if emergency is not None:
            emergency.destroy()
        pipeline, self._pipeline = self._pipeline, None
        if pipeline is not None and not pipeline.destroy(STOP_S):
            self._fault('hung', f'an inference did not end within {STOP_S:g} s; abandoned')
            self._abandoned.append(pipeline.worker)
        self._abandoned = [worker for worker in self._abandoned if worker.is_alive]
        with self._acting() as machine:
            machine.cleanup()
        self._health.forget_memory()
        del pipeline
        gc.unfreeze()
        gc.collect()  # the model, and with it the GPU's memory
        if not self._abandoned:  # beside an inference that hangs this would wait for it
            free_gpu_memory()

    # The task --------------------------------------------------------------------------------

    @contextmanager
    def _acting(self) -> Iterator[TaskMachine]:
        """Change the machine, in the executor's thread; what follows from it is done at the end.

        A chunk goes out before or after, never meanwhile.
        """
        with self._gate:
            yield self._machine
        self._settle()

    def _settle(self) -> None:
        if self._machine.epoch != self._settled_epoch:
            self._settled_epoch = self._machine.epoch
            if self._pipeline is not None:
                self._pipeline.restart()
        for end in self._ended:
            self.get_logger().info(f'task {end.task_id} {end.reason.name}: {end.message}')
            self._mailbox.post(partial(self._tasks.finish, end))
        self._ended.clear()
        self._status.publish()

    def _on_instruction(self, text: str) -> None:
        refusal = self._tasks.instruct(text)
        if refusal:
            raise ObservationError('instruction_refused', 'instruction', text, refusal)

    def _on_e_stop(self, on: bool) -> None:
        if on and not self._machine.is_stopped:
            self._fault('e_stop', 'e_stop = true: stopped until it is false and ~/reset is called')
        with self._acting() as machine:
            machine.e_stop(on)

    def _on_set_dense(self, request: SetBool.Request, response: SetBool.Response):
        """Bypass pruning, or prune again, from the next query on."""
        response.success = self._pipeline is not None
        if not response.success:
            response.message = 'the node is not configured'
            return response
        self._set_pruning(self._pipeline.config.pruning, request.data)
        self._status.publish()
        return response

    def _set_pruning(self, pruning: PruneConfig, dense: bool) -> None:
        """From the next query on these parameters hold, but without a method where dense.

        `_asked` is what was accepted last, `_held` what the policy took last.
        """
        self._status.dense = dense
        asked = self._asked = pruning, dense
        answered = partial(self._on_pruning_answered, self._pipeline, asked)
        self._pipeline.worker.set_pruning(
            dataclasses.replace(pruning, method='none') if dense else pruning,
            lambda error: self._mailbox.post(partial(answered, error)),
        )

    def _on_pruning_answered(
        self, pipeline: Pipeline, asked: tuple[PruneConfig, bool], error: Exception | None
    ) -> None:
        if error is not None:
            self._fault(fault_code(error), f'pruning = refused by the policy: {error}')
        if pipeline is not self._pipeline:
            return
        if error is None:
            self._held = asked
        elif asked is self._asked:  # else what was accepted since is still to be answered
            self._take_back()

    def _take_back(self) -> None:
        """The parameters, and the status, say again what holds."""
        refused = dataclasses.asdict(self._asked[0])
        held, dense = self._asked = self._held
        self._pipeline.config = dataclasses.replace(self._pipeline.config, pruning=held)
        self._status.dense = dense
        changes = [
            Parameter(f'pruning.{name}', value=[''] if value == () else value)
            for name, value in dataclasses.asdict(held).items()
            if value != refused[name]
        ]
        if changes:  # all at once: one by one each would be a change of its own
            self.set_parameters_atomically(changes)
        self._status.publish()

    def _once_context(self) -> OnceContext | str:
        if self._pipeline is None:
            return 'the node is not configured'
        if self._machine.is_hung:
            return 'an inference hung: call ~/reset'
        task = self._machine.task
        instruction = task.goal.instruction if task else ''
        inbox, worker = self._pipeline.inbox, self._pipeline.worker
        return OnceContext(inbox, worker, instruction, self._machine.epoch)

    def _is_busy(self) -> bool:
        return self._pipeline is not None and self._pipeline.worker.busy_s > 0.0

    def _on_heartbeat(self) -> None:
        self._status.publish(heartbeat=True)
        if self._machine.task is not None:
            self._tasks.give_feedback(self._machine.task, self._health.report)

    # Parameters and diagnostics --------------------------------------------------------------

    def _on_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        """Validate; what is fixed while configured, and what does not fit, keeps its old value."""
        pipeline = self._pipeline
        try:
            config = self._settings.with_changes(parameters)
            for parameter in fixed_changes(parameters) if pipeline is not None else []:
                raise ConfigError(
                    parameter.name, parameter.value, 'is fixed once configured: clean up first'
                )
            if pipeline is not None and config.pruning != pipeline.config.pruning:
                self._set_pruning(checked_pruning(config), self._status.dense)
        except ConfigError as error:
            self._fault(error.code, str(error))
            return SetParametersResult(successful=False, reason=str(error))
        if pipeline is not None:
            pipeline.config = config
        self._settings.accept(parameters)
        return SetParametersResult(successful=True)

    def _publish_diagnostics(self) -> None:
        now_ns, pipeline = self._now_ns(), self._pipeline
        shot = vla_diagnostics.Snapshot(
            name=diagnostics.node_name(self),
            now_ns=now_ns,
            state=self._state(),
            machine=self._machine,
            health=self._health,
            inbox=pipeline.inbox if pipeline is not None and pipeline.is_active else None,
            dense=self._status.dense,
            has_reader=None if pipeline is None else pipeline.has_reader,
            peer=self._watchdogs.peer,
        )
        hardware = '' if pipeline is None else pipeline.hardware
        lines = vla_diagnostics.lines(shot)
        self._diagnostics.publish(diagnostics.array(now_ns, hardware, lines))

    def _state(self) -> str:
        """The lifecycle's, in words."""
        if self._loading is not None and self._loading.is_alive:
            return 'loading the model'
        state = self._machine.state
        return state.name.lower() if state <= NodeState.INACTIVE else 'active'

    def _now_ns(self) -> int:
        return self.get_clock().now().nanoseconds

    def _fault(self, code: str, message: str, log: str = '') -> None:
        if self._health.fault(code, message):
            self.get_logger().error(log or message)


def loaded(load: Callable[[PolicyConfig], Policy], config: PolicyConfig, health: Health) -> Policy:
    """The policy, and what it takes of the GPU's memory noted; whatever `load` raises."""
    policy = load(config)
    health.look_at_memory()
    return policy


def checked_pruning(config: PolicyConfig) -> PruneConfig:
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
