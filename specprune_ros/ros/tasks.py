"""Ways to start, hold and end a task: the action ~/run_task and services that do the same.

No callback waits. An `async` one that awaited its task's end would be run again by the executor
at every turn until then, so the goals are driven by the task's end instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

from rclpy.action import ActionServer, CancelResponse, GoalResponse
from rclpy.callback_groups import ReentrantCallbackGroup
from rclpy.node import Node
from std_srvs.srv import SetBool, Trigger

from specprune_ros.action import RunTask
from specprune_ros.checks import check_instruction
from specprune_ros.errors import ConfigError, SpecPruneError
from specprune_ros.health import keep_ratio
from specprune_ros.ros.vla_outputs import fault_number
from specprune_ros.srv import StartTask
from specprune_ros.tasks import EndReason, Goal, Task, TaskEnd, TaskMachine
from specprune_ros.types import PruneReport

RESULT_KEPT_S = 60  # for a client that asks late


class TaskActionServer(ActionServer):
    """An action server whose goals run without a callback, until `finish`."""

    def notify_execute(self, goal_handle, execute_callback) -> None:
        """A goal begins: nothing to call."""

    def finish(self, goal_handle, result) -> None:
        """Hand out the result of a goal that reached its terminal state."""
        super().notify_execute(goal_handle, lambda _: result)


class TaskServer:
    """The task's clients: what they ask for, and what they hear.

    Args:
        node: serves; its clock is the tasks'.
        acting: context in which the machine may be changed; the effects follow at its end.
        was_reset: called by every ~/reset that succeeds.
        is_busy: whether an inference runs.
        log: told in words what was refused or has ended.
    """

    def __init__(
        self,
        node: Node,
        acting: Callable[[], AbstractContextManager[TaskMachine]],
        *,
        was_reset: Callable[[], None],
        is_busy: Callable[[], bool],
        log: Callable[[str], None],
    ):
        self._acting, self._was_reset, self._is_busy, self._log = acting, was_reset, is_busy, log
        self._now_ns = lambda: node.get_clock().now().nanoseconds
        self._goals: dict[int, object] = {}  # task id -> handle of the action's goal
        self.timeout_s = 0.0  # of a goal that gives none
        node.create_service(StartTask, '~/start_task', self._on_start)
        node.create_service(Trigger, '~/cancel_task', self._on_cancel)
        node.create_service(SetBool, '~/pause', self._on_pause)
        node.create_service(Trigger, '~/reset', self._on_reset)
        self._server = TaskActionServer(
            node,
            RunTask,
            '~/run_task',
            lambda _: None,
            callback_group=ReentrantCallbackGroup(),
            goal_callback=self._on_goal,
            handle_accepted_callback=self._on_accepted,
            cancel_callback=self._on_cancel_goal,
            result_timeout=RESULT_KEPT_S,
        )

    @property
    def is_awaited(self) -> bool:
        """Whether a client of the action waits for a task's end."""
        return bool(self._goals)

    def destroy(self) -> None:
        """Remove the action."""
        self._server.destroy()

    def instruct(self, text: str) -> str:
        """A task without end.

        Returns:
            '', or why not.

        Raises:
            ObservationError: an empty instruction.
        """
        check_instruction(text)
        with self._acting() as machine:
            return machine.instruct(text.strip(), self._now_ns())

    def finish(self, end: TaskEnd) -> None:
        """Tell the action's client of the end; not from within one of the action's callbacks."""
        handle = self._goals.pop(end.task_id, None)
        if handle is None:
            return
        if end.reason is EndReason.COMPLETED:
            handle.succeed()
        elif end.reason is EndReason.CANCELED and handle.is_cancel_requested:
            handle.canceled()
        else:
            handle.abort()
        result = RunTask.Result(
            termination_reason=end.reason, error_code=fault_number(end.code), message=end.message
        )
        self._server.finish(handle, result)

    def give_feedback(self, task: Task, report: PruneReport | None) -> None:
        """How the task is doing; to whoever runs it by the action.

        Args:
            task: that runs.
            report: of the newest inference.
        """
        handle = self._goals.get(task.id)
        if handle is None:
            return
        feedback = RunTask.Feedback(
            elapsed_s=(self._now_ns() - task.started_ns) / 1e9,
            chunks=task.chunks,
            actions_sent=task.steps,
            queue_depth=task.queue_depth,
            waiting_for=task.waiting_for,
        )
        if report is not None and task.chunks:
            feedback.last_latency_s = report.latency_total_s
            feedback.token_keep_ratio = keep_ratio(report)
            feedback.mode = int(report.mode)
        handle.publish_feedback(feedback)

    # The action ------------------------------------------------------------------------------

    def _on_goal(self, request: RunTask.Goal) -> GoalResponse:
        """Accept what can start now; nothing comes between this and `_on_accepted`."""
        with self._acting() as machine:
            refusal = machine.refusal()
        try:
            self._goal(request)
        except SpecPruneError as error:
            refusal = refusal or str(error)
        if refusal:
            self._log(f'goal rejected: {refusal}')  # a rejection carries no words to the client
            return GoalResponse.REJECT
        return GoalResponse.ACCEPT

    def _on_accepted(self, handle) -> None:
        handle.execute()
        task_id, refusal = self._start(handle.request)
        if refusal:  # cannot be, but a client must never wait for ever
            handle.abort()
            self._server.finish(handle, RunTask.Result(message=refusal))
            return
        self._goals[task_id] = handle

    def _on_cancel_goal(self, handle) -> CancelResponse:
        """Stop the goal's own task at once; its result follows."""
        for task_id, goal in self._goals.items():
            if goal == handle:
                with self._acting() as machine:
                    machine.cancel(task_id, 'canceled by the client of the action')
                return CancelResponse.ACCEPT
        return CancelResponse.REJECT

    # Services --------------------------------------------------------------------------------

    def _on_start(self, request: StartTask.Request, response: StartTask.Response):
        try:
            response.task_id, response.message = self._start(request)
        except SpecPruneError as error:
            response.message = str(error)
        response.accepted = response.task_id > 0
        return response

    def _on_cancel(self, request: Trigger.Request, response: Trigger.Response):
        with self._acting() as machine:
            response.success = machine.cancel(message='canceled by ~/cancel_task')
        response.message = '' if response.success else 'no task runs'
        return response

    def _on_pause(self, request: SetBool.Request, response: SetBool.Response):
        with self._acting() as machine:
            response.message = machine.pause(request.data)
        response.success = not response.message
        return response

    def _on_reset(self, request: Trigger.Request, response: Trigger.Response):
        with self._acting() as machine:
            response.message = machine.reset(busy=self._is_busy())
            if not response.message:
                self._was_reset()
        response.success = not response.message
        return response

    def _start(self, request: RunTask.Goal | StartTask.Request) -> tuple[int, str]:
        goal = self._goal(request)
        with self._acting() as machine:
            return machine.start(goal, self._now_ns())

    def _goal(self, request: RunTask.Goal | StartTask.Request) -> Goal:
        """What a request asks for.

        Raises:
            ObservationError: an empty instruction.
            ConfigError: a duration that is none.
        """
        check_instruction(request.instruction)
        given = request.max_duration_s
        if not (math.isfinite(given) and given >= 0):
            raise ConfigError('max_duration_s', given, 'must be finite and not negative')
        duration_s = given or self.timeout_s or math.inf
        return Goal(request.instruction.strip(), duration_s, request.max_steps)
