"""Tasks and epochs: what may run, when it ends, and which chunks are void. No ROS, no clocks.

One task at a time, and only while the node is active. Whatever makes the chunks in flight void
raises the epoch; the node stamps it onto every chunk, so that nobody acts on an old one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

NS = 1_000_000_000


class NodeState(IntEnum):
    """What the node does; STATE_* of VlaStatus."""

    UNCONFIGURED = 0
    INACTIVE = 1
    IDLE = 2
    RUNNING = 3
    PAUSED = 4
    STOPPED = 5
    FAULT = 6


class EndReason(IntEnum):
    """Why a task ended; the constants of RunTask's result."""

    COMPLETED = 0
    CANCELED = 1
    TIMEOUT = 2
    DEACTIVATED = 3
    ESTOP = 4
    STALE_INPUT = 5
    POLICY_ERROR = 6


# Why no task starts in a state.
REFUSALS = {
    NodeState.UNCONFIGURED: 'the node is not active: configure and activate it',
    NodeState.INACTIVE: 'the node is not active: activate it',
    NodeState.STOPPED: 'emergency stop: release e_stop, then call ~/reset',
    NodeState.FAULT: 'an inference hung: call ~/reset',
}


@dataclass(frozen=True)
class Goal:
    """What a task is to do, and when it is over.

    Attributes:
        instruction: in the user's words.
        duration_s: the task ends after so long; infinity: never by itself.
        steps: it is complete after so many executed control steps; 0: never by itself.
        patient: it waits for its inputs as long as it takes, instead of ending STALE_INPUT.
    """

    instruction: str
    duration_s: float = math.inf
    steps: int = 0
    patient: bool = False


@dataclass(frozen=True)
class TaskEnd:
    """How a task ended.

    Attributes:
        task_id: which one.
        reason: one of EndReason.
        code: the fault that ended it (specprune_ros.faults); empty: none.
        message: in words.
    """

    task_id: int
    reason: EndReason
    code: str
    message: str


@dataclass
class Task:
    """The running task.

    Attributes:
        id: counts tasks from 1.
        goal: what it is to do.
        started_ns: ROS time.
        chunks: published for it.
        chunk_id: the newest one's.
        chunk_rows: its length in control steps.
        queue_depth: rows of it that are still to be executed.
        steps: control steps executed for it.
        failures: failed inferences in a row.
        waiting_for: input that is missing or stale, with its value; empty: none.
        waiting_code: that fault's code.
        waiting_since_ns: since when; None while nothing is missing.
    """

    id: int
    goal: Goal
    started_ns: int
    chunks: int = 0
    chunk_id: int = 0
    chunk_rows: int = 0
    queue_depth: int = 0
    steps: int = 0
    failures: int = 0
    waiting_for: str = ''
    waiting_code: str = ''
    waiting_since_ns: int | None = None

    def fed(self) -> None:
        """All inputs are there."""
        self.waiting_for, self.waiting_code, self.waiting_since_ns = '', '', None


class TaskMachine:
    """The node's task and its epoch; the only owner of both.

    Every time is integer ns of ROS time, passed in. Not thread-safe.

    Args:
        on_end: told how every task ended, once.
    """

    def __init__(self, on_end: Callable[[TaskEnd], None]):
        self._on_end = on_end
        self._configured = self._active = self._paused = False
        self._e_stop = False  # the input
        self._stopped = False  # stays after the input is released, until reset
        self._hung = False
        self._tasks = 0
        self._max_failures, self._input_timeout_ns = 1, 0
        self.epoch = 0
        self.task: Task | None = None

    @property
    def state(self) -> NodeState:
        """What the node does."""
        if not self._active:
            return NodeState.INACTIVE if self._configured else NodeState.UNCONFIGURED
        if self._stopped:
            return NodeState.STOPPED
        if self._hung:
            return NodeState.FAULT
        if self.task is None:
            return NodeState.IDLE
        return NodeState.PAUSED if self._paused else NodeState.RUNNING

    @property
    def is_hung(self) -> bool:
        """Whether an inference outlived its deadline, and no reset followed."""
        return self._hung

    @property
    def task_id(self) -> int:
        """The newest task's; 0 before the first."""
        return self._tasks

    def accepts(self, epoch: int) -> bool:
        """Whether a chunk that was asked for in an epoch may be published."""
        return epoch == self.epoch and self.state is NodeState.RUNNING

    # Lifecycle -------------------------------------------------------------------------------

    def configure(self, max_failures: int, input_timeout_s: float) -> None:
        """A policy is there, and the emergency stop is about to be heard anew; a stop stays.

        Args:
            max_failures: failed inferences in a row that end a task.
            input_timeout_s: a task ends when an input is missing for so long.
        """
        self._configured = True
        self._e_stop = False  # whoever pressed it and is gone cannot release it any more
        self._max_failures = max_failures
        self._input_timeout_ns = round(input_timeout_s * NS)

    def cleanup(self) -> None:
        """The policy is gone, and with it an inference that hung; an emergency stop stays."""
        self.deactivate()
        self._configured = self._hung = False

    def activate(self) -> None:
        """Tasks may start, unless an emergency stop or a hung inference forbids it."""
        self._active = True
        self._void()

    def deactivate(self) -> None:
        """Nothing runs any more."""
        if self._active:
            self._end(EndReason.DEACTIVATED, '', 'the node was deactivated')
            self._void()
        self._active = False

    # Tasks -----------------------------------------------------------------------------------

    def refusal(self) -> str:
        """Why no task can start now; empty when one can."""
        if self.task is not None:
            return f'task {self.task.id} runs: cancel it first'
        return REFUSALS.get(self.state, '')

    def start(self, goal: Goal, now_ns: int) -> tuple[int, str]:
        """Start a task.

        Returns:
            Its id and '', or 0 and why not.
        """
        if refusal := self.refusal():
            return 0, refusal
        self._tasks += 1
        self.task = Task(self._tasks, goal, now_ns)
        self._void()
        return self._tasks, ''

    def instruct(self, instruction: str, now_ns: int) -> str:
        """A task without end, from a topic: it replaces its like, and stays paused when that was.

        Returns:
            '', or why it is not taken.
        """
        task, goal = self.task, Goal(instruction, patient=True)
        if task is not None and task.goal == goal:
            return ''
        if task is not None and task.goal.patient:
            paused = self._paused
            self._end(EndReason.CANCELED, '', 'another instruction came')
            self._paused = paused
        return self.start(goal, now_ns)[1]

    def cancel(self, task_id: int | None = None, message: str = 'canceled') -> bool:
        """End the running task.

        Args:
            task_id: only if it is this one; None: whichever.
            message: of the result.

        Returns:
            Whether there was one to cancel.
        """
        if self.task is None or task_id not in (None, self.task.id):
            return False
        self._end(EndReason.CANCELED, '', message)
        return True

    def pause(self, on: bool) -> str:
        """Hold the task, or go on with it.

        Returns:
            '', or why not.
        """
        if on and self.task is None:
            return REFUSALS.get(self.state, 'no task runs')
        if on and not self._paused:
            self._void()
        if self.task is not None:
            self.task.fed()  # time that passed in a pause is nobody's fault
        self._paused = on and self.task is not None
        return ''

    def reset(self, *, busy: bool) -> str:
        """End the task and every stop.

        Args:
            busy: an inference still runs.

        Returns:
            '', or why not.
        """
        if not self._active:
            return REFUSALS[self.state]
        if self._e_stop:
            return 'e_stop is true: release it first'
        if self._hung and busy:
            return (
                'the inference that hung still runs and cannot be interrupted: wait for it, or '
                'deactivate, clean up and configure, which loads the model anew'
            )
        self._end(EndReason.CANCELED, '', 'reset')
        self._stopped = self._hung = False
        self._void()
        return ''

    # What happens ----------------------------------------------------------------------------

    @property
    def is_stopped(self) -> bool:
        """Whether an emergency stop holds, active or not."""
        return self._stopped

    def e_stop(self, on: bool) -> None:
        """The emergency stop: overrides all, and stays until it is released and reset."""
        if on and not self._e_stop:
            self._stopped = True
            self._end(EndReason.ESTOP, 'e_stop', 'emergency stop')
            self._void()
        self._e_stop = on

    def hang(self, message: str) -> None:
        """An inference outlived its deadline."""
        self._hung = True
        self._end(EndReason.POLICY_ERROR, 'hung', message)
        self._void()

    def clock_jumped(self, delta_ns: int) -> None:
        """ROS time jumped: what is in flight is void; the task's own times go along."""
        self._void()
        if self.task is not None:
            self.task.started_ns += delta_ns
            self.task.fed()

    def inferred(self, epoch: int) -> None:
        """An inference gave a chunk, published or too late to be."""
        if self._is_current(epoch):
            self.task.failures = 0

    def published(self, epoch: int, chunk_id: int, rows: int) -> None:
        """A chunk of so many control steps went out."""
        if self._is_current(epoch):
            self.task.chunks += 1
            self.task.chunk_id, self.task.chunk_rows = chunk_id, rows
            self.task.queue_depth = rows

    def failed(self, epoch: int, code: str, message: str) -> None:
        """An inference failed."""
        if not self._is_current(epoch):
            return
        self.task.failures += 1
        if self.task.failures >= self._max_failures:
            times = f'{self.task.failures} inferences in a row failed: {message}'
            self._end(EndReason.POLICY_ERROR, code, times)

    def executed(self, epoch: int, chunk_id: int = 0, step: int = 0) -> None:
        """A control step was executed, also one of a dry run.

        Args:
            epoch: of its chunk; 0: it came from elsewhere.
            chunk_id, step: the chunk and its row; 0 with an epoch: a safety output, no step.
        """
        if self.task is None or epoch not in (0, self.epoch) or (epoch and not chunk_id):
            return
        self.task.steps += 1
        if chunk_id and chunk_id == self.task.chunk_id:
            self.task.queue_depth = max(self.task.chunk_rows - step - 1, 0)
        if self.task.steps == self.task.goal.steps:
            self._end(EndReason.COMPLETED, '', f'{self.task.steps} control steps were executed')

    def waits(self, code: str, message: str, now_ns: int) -> None:
        """An input is missing or stale."""
        task = self.task
        if task is not None:
            task.waiting_for, task.waiting_code = message, code
            if task.waiting_since_ns is None:
                task.waiting_since_ns = now_ns

    def tick(self, now_ns: int) -> None:
        """Look what time has run out."""
        task = self.task
        if task is None:
            return
        if now_ns - task.started_ns >= task.goal.duration_s * NS:
            self._end(EndReason.TIMEOUT, '', f'{task.goal.duration_s:g} s went by')
        elif self._is_starved(task, now_ns):
            waited = self._input_timeout_ns / NS
            self._end(
                EndReason.STALE_INPUT,
                task.waiting_code,
                f'for {waited:g} s an input was missing: {task.waiting_for}',
            )

    def _is_starved(self, task: Task, now_ns: int) -> bool:
        since = task.waiting_since_ns
        if task.goal.patient or self._paused or since is None:
            return False
        return now_ns - since >= self._input_timeout_ns

    def _is_current(self, epoch: int) -> bool:
        return self.task is not None and epoch == self.epoch

    def _end(self, reason: EndReason, code: str, message: str) -> None:
        task, self.task, self._paused = self.task, None, False
        if task is not None:
            self._void()
            self._on_end(TaskEnd(task.id, reason, code, message))

    def _void(self) -> None:
        """Chunks asked for before this are void."""
        self.epoch += 1
