"""The threads in which a policy lives. No ROS.

One loads it, and whoever waits for that can give up. The other infers, latest-value slot in,
callbacks out: callers only leave things for it, and never wait, neither to submit nor to stop
publishing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from specprune_ros.config import PruneConfig
from specprune_ros.errors import SpecPruneError
from specprune_ros.types import FRAMES_KEPT, ExecutedAction, Observation, PolicyResult

if TYPE_CHECKING:  # the node starts, and says so, where torch is missing
    from specprune_ros.policy import Policy

MAX_STEPS = 1024  # executed steps kept while no query comes
POLL_S = 0.05  # how often loading looks whether it is given up


class LoadingThread:
    """Loads a policy in a thread of its own.

    Args:
        load: returns the policy, or raises.
    """

    def __init__(self, load: Callable[[], Policy]):
        self._load = load
        self._outcome: list[Policy | Exception] = []
        self._thread = threading.Thread(target=self._run, name='load', daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it still loads."""
        return self._thread.is_alive()

    def wait(self, given_up: threading.Event) -> Policy:
        """The policy, once it is loaded; handed over, so that its memory is the caller's to free.

        Raises:
            SpecPruneError: given_up was set; the thread goes on, and nobody hears of it.
            Exception: whatever `load` raised.
        """
        while self._thread.is_alive():
            self._thread.join(POLL_S)
            if given_up.is_set():
                raise SpecPruneError('the process is to end: loading is given up')
        outcome = self._outcome.pop()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _run(self) -> None:
        try:
            self._outcome.append(self._load())
        except Exception as error:  # carried to the thread that waits
            self._outcome.append(error)
        except BaseException as error:  # a Rust extension's panic is no Exception
            self._outcome.append(RuntimeError(f'{type(error).__name__}: {error}'))


@dataclass(frozen=True, eq=False)
class Job:
    """One observation to infer on, and the caller's ticket for it."""

    ticket: int
    observation: Observation


class InferenceWorker:
    """Runs a policy in its own thread.

    Args:
        policy: handed over; nobody else may call it from now on.
        on_result: called in the worker's thread after every query.
        on_error: likewise, with whatever went wrong; the worker goes on.
        on_replan: likewise, when an executed action asks for a new query at once.
    """

    def __init__(
        self,
        policy: Policy,
        on_result: Callable[[Job, PolicyResult], None],
        on_error: Callable[[Exception], None],
        on_replan: Callable[[], None] = lambda: None,
    ):
        self._policy = policy
        self._on_result = on_result
        self._on_error = on_error
        self._on_replan = on_replan
        self._wake = threading.Condition()
        self._job: Job | None = None
        self._steps: deque[tuple[ExecutedAction, Mapping]] = deque(maxlen=MAX_STEPS)
        self._steps_before_job = 0  # of them, those executed before the waiting observation
        self._pruning: PruneConfig | None = None
        self._reset = False
        self._stop = False
        self._thread = threading.Thread(target=self._run, name='inference', daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Leave an observation; one that still waits is replaced."""
        with self._wake:
            self._job = job
            self._steps_before_job = len(self._steps)
            self._wake.notify()

    def observe(self, action: ExecutedAction, images: Mapping) -> None:
        """Leave an executed action; it counts before the first query left after it."""
        with self._wake:
            self._wake.notify()
            full = len(self._steps) == MAX_STEPS
            self._steps.append((action, images))
            self._steps_before_job -= full and self._steps_before_job > 0
            if len(self._steps) > FRAMES_KEPT:
                self._steps[-1 - FRAMES_KEPT] = (self._steps[-1 - FRAMES_KEPT][0], {})

    def set_pruning(self, pruning: PruneConfig) -> None:
        """Leave pruning parameters for before the next query."""
        with self._wake:
            self._pruning = pruning

    def reset(self) -> None:
        """Forget the episode and whatever waits."""
        with self._wake:
            self._job, self._reset = None, True
            self._steps.clear()
            self._steps_before_job = 0

    def stop(self, timeout_s: float) -> bool:
        """End the thread.

        Returns:
            False when a running inference did not end in time; it is abandoned.
        """
        with self._wake:
            self._stop = True
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stop or self._job or self._steps)
                if self._stop:
                    return
                job, self._job = self._job, None
                count = self._steps_before_job if job else len(self._steps)
                steps = [self._steps.popleft() for _ in range(count)]
                self._steps_before_job = 0
                pruning, reset = self._pruning, self._reset
                self._pruning, self._reset = None, False
            try:
                replan = self._prepare(steps, pruning, reset)
                if job is not None:
                    result = self._policy.infer(job.observation)
                    if not self._stop:
                        self._on_result(job, result)
                elif replan:
                    self._on_replan()
            except Exception as error:  # the thread must outlive any fault of one query
                self._on_error(error)

    def _prepare(self, steps: list, pruning: PruneConfig | None, reset: bool) -> bool:
        """Whether one of the executed steps asks for a new query at once."""
        if reset:
            self._policy.reset()
        if pruning is not None:
            self._policy.set_pruning(pruning)
        replan = False
        for action, images in steps:
            try:
                replan |= bool(self._policy.observe_executed(action, images))
            except SpecPruneError as error:
                self._on_error(error)
        return replan
