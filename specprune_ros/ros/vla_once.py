"""~/infer_once: one inference on the side, answered when it is done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node
from rclpy.task import Future

from specprune_ros.checks import check_instruction, check_proprio
from specprune_ros.errors import ObservationError, SpecPruneError
from specprune_ros.inbox import Inbox
from specprune_ros.ros import conversions
from specprune_ros.srv import InferOnce
from specprune_ros.types import Observation, PolicyResult
from specprune_ros.worker import InferenceWorker, Job

ANOTHER = 'another ~/infer_once waits for its inference'


@dataclasses.dataclass(frozen=True)
class OnceContext:
    """What the node has while it is configured.

    Attributes:
        inbox: the newest inputs.
        worker: infers.
        instruction: of the running task; empty: none runs.
        epoch: the node's.
    """

    inbox: Inbox
    worker: InferenceWorker
    instruction: str
    epoch: int


class InferOnceServer:
    """Serves ~/infer_once through the node's own worker. Never publishes a chunk.

    On the newest images and the running task's instruction it is one more query of the task's
    episode; anything else while a task runs is an episode of its own, after which the task's
    starts anew with a dense query.

    Args:
        node: serves.
        context: what it has now, or why no inference is possible.
    """

    def __init__(self, node: Node, context: Callable[[], OnceContext | str]):
        self._context = context
        self._now_ns = lambda: node.get_clock().now().nanoseconds
        self._pending: tuple[Job, Future] | None = None
        # Reentrant: the answer is awaited, and nobody else's callback may wait for it.
        node.create_service(
            InferOnce, '~/infer_once', self._on_request, callback_group=ReentrantCallbackGroup()
        )

    @property
    def is_awaited(self) -> bool:
        """Whether a client waits for an answer."""
        return self._pending is not None

    def owns(self, job: Job | None) -> bool:
        """Whether a job is this service's. From any thread."""
        pending = self._pending
        return pending is not None and pending[0] is job

    def answer(self, job: Job, outcome: PolicyResult | Exception) -> None:
        """The job's result, or what went wrong."""
        if self.owns(job):
            self._pending[1].set_result(outcome)
            self._pending = None

    def give_up(self, why: str) -> None:
        """No result will come."""
        if self._pending is not None:
            self.answer(self._pending[0], SpecPruneError(why))

    async def _on_request(self, request: InferOnce.Request, response: InferOnce.Response):
        try:
            future = self._ask(request)
        except SpecPruneError as error:
            response.message = str(error)
            return response
        outcome = await future
        if isinstance(outcome, Exception):
            response.message = str(outcome) or type(outcome).__name__
            return response
        chunk = dataclasses.replace(outcome.chunk, dry_run=True)
        response.success = True
        response.chunk = conversions.chunk_to_msg(chunk)
        response.report = conversions.report_to_msg(outcome.report)
        return response

    def _ask(self, request: InferOnce.Request) -> Future:
        """Leave the job.

        Raises:
            SpecPruneError: no inference is possible, or not on this.
        """
        context = self._context()
        if isinstance(context, str):
            raise SpecPruneError(context)
        observation = self._observation(request, context)
        given = bool(request.images) or len(request.proprio) > 0
        other = given or observation.instruction != context.instruction
        job = Job(context.epoch, observation, apart=bool(context.instruction) and other)
        if self._pending is not None:
            raise SpecPruneError(ANOTHER)
        future = Future()
        self._pending = (job, future)
        if not context.worker.ask(job):  # one that was given up waits still
            self._pending = None
            raise SpecPruneError(ANOTHER)
        return future

    def _observation(self, request: InferOnce.Request, context: OnceContext) -> Observation:
        """What the request and the newest inputs make.

        Raises:
            ObservationError: something is missing or bad.
        """
        inbox, now_ns = context.inbox, self._now_ns()
        instruction = request.instruction.strip() or context.instruction
        check_instruction(instruction)
        proprio = np.array(request.proprio, float) if len(request.proprio) else None
        if proprio is not None:
            check_proprio(proprio, len(inbox.joint_names))
        if not request.images:
            observation = inbox.observation(now_ns, instruction)
            changes = {} if proprio is None else {'proprio': proprio}
            return dataclasses.replace(observation, **changes)
        if len(request.images) != len(request.cameras):
            got = f'{len(request.images)} images, {len(request.cameras)} cameras'
            raise ObservationError('image_shape', 'images', got, 'must be as many')
        pairs = zip(request.cameras, request.images, strict=True)
        return Observation(
            images={
                name: conversions.image_from_msg(msg, f'cameras/{name}') for name, msg in pairs
            },
            proprio=inbox.proprio if proprio is None else proprio,
            instruction=instruction,
            stamp_ns=now_ns,
        )
