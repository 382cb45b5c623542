"""From stored inputs to published chunks: what a configured `vla_node` has, in one object."""

from __future__ import annotations

import dataclasses
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from rclpy.node import Node

from specprune_ros.config import PolicyConfig
from specprune_ros.errors import ActionError, ObservationError, SpecPruneError, named
from specprune_ros.health import Health
from specprune_ros.inbox import NS, Inbox, QueryTrigger
from specprune_ros.msg import ActionChunk, ModelInfo
from specprune_ros.ros import conversions, qos
from specprune_ros.ros.process import Mailbox, control_clock
from specprune_ros.ros.vla_inputs import InputEvents, Inputs, mismatch
from specprune_ros.ros.vla_model import model_info
from specprune_ros.ros.vla_once import InferOnceServer
from specprune_ros.ros.vla_outputs import ChunkPublisher, OverlayPublisher, stamped
from specprune_ros.tasks import NodeState, TaskMachine
from specprune_ros.types import ExecutedAction, PolicyResult
from specprune_ros.worker import InferenceWorker, Job, fault_code

if TYPE_CHECKING:
    from specprune_ros.policy import Policy

QUERY_POLL_S = 0.02  # how often a due query looks whether it has waited long enough


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the pipeline shares with its node.

    Attributes:
        machine: the task; changed within `acting` only, and by the executor's thread.
        acting: context in which to change it.
        gate: held while a chunk goes out, and while the machine changes.
        mailbox: brings calls into the executor's thread.
        health: counts.
        fault: told a code, a message, and what to log instead of it.
        once: the service whose queries are answered instead of published.
        instruction, peer: see InputEvents.
    """

    machine: TaskMachine
    acting: Callable[[], AbstractContextManager[TaskMachine]]
    gate: threading.Lock
    mailbox: Mailbox
    health: Health
    fault: Callable[..., None]
    once: InferOnceServer
    instruction: Callable[[str], None]
    peer: Callable[[], None]


class Pipeline:
    """Inputs, the policy's worker, and what it publishes.

    Args:
        node: subscribes and publishes.
        config: all axes; `config` may be replaced by one that differs in live parameters.
        policy: loaded; handed over.
        around: what is shared with the node.
    """

    def __init__(self, node: Node, config: PolicyConfig, policy: Policy, around: Surroundings):
        self.config = config
        self.hardware = policy.model.info.name
        self.inbox = Inbox(config.robot, config.runtime)
        self._node, self._around = node, around
        self._now_ns = lambda: node.get_clock().now().nanoseconds
        self._frame_ids: dict[str, str] = {}
        self._inputs: Inputs | None = None
        self._timer: object | None = None
        period_ns = round(NS * config.query_period_s)
        self._state_lag_s = config.robot.step_dt_s / 2
        patience_ns = min(round(self._state_lag_s * NS), QueryTrigger.PATIENCE_NS)
        self._trigger = QueryTrigger(config.robot.camera_names, period_ns, patience_ns)
        info = model_info(policy, config, self._now_ns())  # what can fail comes before what stays
        self._chunks = ChunkPublisher(node, config, self._on_mismatch)
        self._model = node.create_publisher(
            ModelInfo, '~/model_info', qos.LATCHED, event_callbacks=qos.NO_EVENTS
        )
        self._model.publish(info)
        self._overlays = OverlayPublisher(
            node,
            lambda: self.config,
            lambda: not self.worker.is_idle,
            around.machine.accepts,
            self._frame_ids,
            lambda error: self._on_error(error, None),
            self._on_mismatch,
        )
        # Last: a thread, and the model in it, would stay if anything failed after it.
        self.worker = InferenceWorker(
            policy, self._on_result, self._on_error, lambda: around.mailbox.post(self._query)
        )

    @property
    def is_active(self) -> bool:
        """Whether inputs are subscribed."""
        return self._inputs is not None

    @property
    def has_reader(self) -> bool:
        """Whether anybody subscribes to the chunks."""
        return self._chunks.has_reader

    def activate(self) -> None:
        """Subscribe to the inputs."""
        around = self._around
        events = InputEvents(
            image=self._on_image,
            state=self._on_state,
            executed=self._on_executed,
            instruction=around.instruction,
            peer=around.peer,
            fault=around.fault,
            arrived=around.health.arrived,
        )
        self._inputs = Inputs(self._node, self.config.robot, self.inbox, events, self._frame_ids)
        poll_s = min(QUERY_POLL_S, 0.5 * self.config.query_period_s)
        clock = control_clock(self._node)
        self._timer = self._node.create_timer(poll_s, self._on_timer, clock=clock)

    def deactivate(self) -> None:
        """Unsubscribe, and forget what came."""
        if self._inputs is not None:
            self._inputs.destroy()
            self._node.destroy_timer(self._timer)
            self._inputs = self._timer = None
        self.inbox.forget_inputs()

    def restart(self) -> None:
        """Another epoch is another episode: drop what waits, and query anew."""
        self._trigger.start(self._now_ns())
        self.worker.reset()

    def destroy(self, timeout_s: float) -> bool:
        """End threads, remove topics.

        Returns:
            False when a running inference did not end in time; it is abandoned.
        """
        self.deactivate()
        self._overlays.destroy(timeout_s)
        ended = self.worker.stop(timeout_s)
        self._chunks.destroy()
        self._node.destroy_publisher(self._model)
        return ended

    # Queries: in the executor's thread -------------------------------------------------------

    def _on_image(self, camera: str) -> None:
        if self._trigger.image(camera, self._now_ns()):
            self._query()

    def _on_state(self) -> None:
        if self._trigger.is_held:
            self._query()

    def _on_timer(self) -> None:
        if self._trigger.is_held or self._trigger.is_overdue(self._now_ns()):
            self._query()

    def _on_executed(self, action: ExecutedAction, images: Mapping) -> None:
        with self._around.acting() as machine:
            machine.executed(action.epoch, action.chunk_id, action.step)
        stamps_ns = {name: self.inbox.image_stamps_ns[name] for name in images}
        self.worker.observe(action, images, stamps_ns)

    def _query(self) -> None:
        """Leave one observation for the inference thread, or say in the end why there is none."""
        machine = self._around.machine
        if machine.state is not NodeState.RUNNING or not self.worker.is_idle:
            return
        now_ns, task = self._now_ns(), machine.task
        if self.inbox.proprio_lag_s > self._state_lag_s and self._trigger.hold(now_ns):
            return  # the state of the images' time may be in the next message
        try:
            observation = self.inbox.observation(now_ns, task.goal.instruction)
        except ObservationError as error:
            if self._trigger.is_overdue(now_ns):  # before that, what is missing may yet come
                self._trigger.queried(now_ns)
                self._around.fault(error.code, str(error))
                with self._around.acting():
                    machine.waits(error.code, str(error), now_ns)
            return
        self._trigger.queried(now_ns)
        self.worker.submit(Job(machine.epoch, observation))
        if task.waiting_for:
            with self._around.acting():
                task.fed()

    def _after_result(self, job: Job, result: PolicyResult, published: bool) -> None:
        health = self._around.health
        if published:
            health.inferred(result)
        else:
            health.discarded()
        with self._around.acting() as machine:
            machine.inferred(job.ticket)
            if published:
                machine.published(job.ticket, result.chunk.chunk_id, result.chunk.horizon)

    def _after_error(self, job: Job, error: Exception, code: str, message: str) -> None:
        if self._around.once.owns(job):
            self._around.once.answer(job, error)
            return
        with self._around.acting() as machine:
            machine.failed(job.ticket, code, message)

    # Results: in the inference thread --------------------------------------------------------

    def _on_result(self, job: Job, result: PolicyResult) -> None:
        around, now_ns = self._around, self._now_ns()
        if not np.isfinite(result.chunk.data).all():
            raise ActionError('the policy gave an action that is not finite; it was discarded')
        result = stamped(result, now_ns, job.ticket)
        if around.once.owns(job):
            around.mailbox.post(partial(around.once.answer, job, result))
            return
        late = self._is_late(job, now_ns)
        valid = self._send(job.ticket, None if late else conversions.chunk_to_msg(result.chunk))
        published = valid and not late
        if valid:
            # Of a late chunk as well: the next query builds on this one, and whoever computes the
            # run again needs all of them. That its chunk_id never came says what became of it.
            self._chunks.publish_report(result.report)
        around.mailbox.post(partial(self._after_result, job, result, published))
        if published:
            self._overlays.offer(job, result)
        around.health.look_at_memory()

    def _send(self, epoch: int, chunk: ActionChunk | None) -> bool:
        """Publish the chunk, if there is one, unless the epoch is void.

        Returns:
            False when it is; it cannot become so while the chunk goes out.
        """
        with self._around.gate:
            valid = self._around.machine.accepts(epoch)
            if valid and chunk is not None:
                self._chunks.publish_chunk(chunk)
            return valid

    def _is_late(self, job: Job, now_ns: int) -> bool:
        """Whether the observation is too old for its chunk to be acted on."""
        age_s = (now_ns - job.observation.stamp_ns) / NS
        limit = self.config.runtime.max_result_age_s
        if age_s > limit:
            text = f'chunk of an observation {age_s:.3f} s old, limit {limit:g} s'
            self._around.fault('late', text)
        return age_s > limit

    def _on_error(self, error: Exception, job: Job | None) -> None:
        code, message, log = fault_code(error), str(error), ''
        if not isinstance(error, SpecPruneError):
            message = named(error)
            log = ''.join(traceback.format_exception(error))
        self._around.fault(code, message, log)
        if job is not None:
            self._around.mailbox.post(partial(self._after_error, job, error, code, message))

    def _on_mismatch(self, topic: str, policy: str) -> None:
        self._around.fault('qos_incompatible', mismatch(topic, policy))
