"""The threads in which a policy lives. No ROS.

One loads it, and whoever waits for that can give up. Another infers, latest-value slot in,
callbacks out: callers only leave things for it, and never wait, neither to submit nor to stop
publishing. A third does what may wait while inference runs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from specprune_ros.config import PruneConfig
from specprune_ros.errors import SpecPruneError, named
from specprune_ros.types import FRAMES_KEPT, MAX_STEPS, ExecutedAction, Observation, PolicyResult

if TYPE_CHECKING:  # the node starts, and says so, where torch is missing
    from specprune_ros.policy import Policy

POLL_S = 0.05  # how often loading looks whether it is given up
GIVE_WAY_S = 0.5  # longest that spare work waits for inference to pause
GIVE_WAY_POLL_S = 0.005
# Words of an exception of the CPU's allocator, which has no class of its own.
NO_MEMORY = ('out of memory', 'not enough memory')

Item = TypeVar('Item')
# Pruning parameters, and who hears whether they were taken: None, or why not.
Change = tuple[PruneConfig, Callable[[Exception | None], None]]


def fault_code(error: Exception) -> str:
    """The fault (specprune_ros.faults) that an error of the policy stands for."""
    if isinstance(error, SpecPruneError):
        return error.code
    # By name: torch has moved the class about, and is not imported here.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {'OutOfMemoryError', 'MemoryError'}:
        return 'out_of_memory'
    if isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY):
        return 'out_of_memory'
    return 'inference'


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

    def wait(
        self, given_up: threading.Event, meanwhile: Callable[[], None] = lambda: None
    ) -> Policy:
        """The policy, once it is loaded; handed over, so that its memory is the caller's to free.

        Args:
            given_up: not to wait any longer.
            meanwhile: called every POLL_S, in the thread that waits.

        Raises:
            SpecPruneError: given_up was set; the thread goes on, and nobody hears of it.
            Exception: whatever `load` raised.
        """
        while self._thread.is_alive():
            self._thread.join(POLL_S)
            meanwhile()
            if given_up.is_set():
                raise SpecPruneError('the process is to end: loading is given up')
        outcome = self._outcome.pop()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _run(self) -> None:
        try:
            self._outcome.append(self._load())
        except BaseException as error:  # carried to the thread that waits
            self._outcome.append(_as_exception(error))


def _as_exception(error: BaseException) -> Exception:
    """A Rust extension's panic is no Exception."""
    if isinstance(error, Exception):
        return error
    return RuntimeError(named(error))


@dataclass(frozen=True, eq=False)
class Job:
    """One observation to infer on.

    Attributes:
        ticket: the caller's.
        observation: all that the policy reads.
        apart: it is no part of the episode, which starts anew after it.
    """

    ticket: int
    observation: Observation
    apart: bool = False


class InferenceWorker:
    """Runs a policy in its own thread.

    Args:
        policy: handed over; nobody else may call it from now on.
        on_result: called in the worker's thread after every query.
        on_error: likewise, with whatever went wrong and the query it ended, None for an executed
            action that was bad; the worker goes on.
        on_replan: likewise, when an executed action asks for a new query at once.
    """

    def __init__(
        self,
        policy: Policy,
        on_result: Callable[[Job, PolicyResult], None],
        on_error: Callable[[Exception, Job | None], None],
        on_replan: Callable[[], None] = lambda: None,
    ):
        self._policy = policy
        self._on_result = on_result
        self._on_error = on_error
        self._on_replan = on_replan
        self._wake = threading.Condition()
        self._job: Job | None = None
        self._asked: Job | None = None
        self._current: Job | None = None
        self._busy_since: float | None = None
        self._steps: deque[tuple[ExecutedAction, Mapping, Mapping]] = deque(maxlen=MAX_STEPS)
        self._steps_before_job = 0  # of them, those executed before the waiting observation
        self._pruning: Change | None = None
        self._reset = False
        self._stop = False
        self._thread = threading.Thread(target=self._run, name='inference', daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Whether no query runs or waits."""
        with self._wake:
            return self._job is self._asked is self._current is None

    @property
    def busy_s(self) -> float:
        """For how long the policy has been at work; 0 when it is not."""
        since = self._busy_since
        return 0.0 if since is None else time.monotonic() - since

    def submit(self, job: Job) -> None:
        """Leave an observation; one that still waits is replaced."""
        with self._wake:
            self._job = job
            self._steps_before_job = len(self._steps)
            self._wake.notify()

    def ask(self, job: Job) -> bool:
        """Leave an observation that a reset does not drop and no other replaces.

        Returns:
            False when such a one waits already.
        """
        with self._wake:
            if self._asked is not None:
                return False
            self._asked = job
            self._wake.notify()
            return True

    def observe(
        self, action: ExecutedAction, images: Mapping, stamps_ns: Mapping | None = None
    ) -> None:
        """Leave an executed action; it counts before the first query left after it.

        Args:
            action: what was executed.
            images: camera -> its newest image then.
            stamps_ns: camera -> that image's stamp, where known.
        """
        with self._wake:
            self._wake.notify()
            full = len(self._steps) == MAX_STEPS
            self._steps.append((action, images, stamps_ns or {}))
            self._steps_before_job -= full and self._steps_before_job > 0
            if len(self._steps) > FRAMES_KEPT:
                self._steps[-1 - FRAMES_KEPT] = (self._steps[-1 - FRAMES_KEPT][0], {}, {})

    def set_pruning(
        self, pruning: PruneConfig, on_answer: Callable[[Exception | None], None]
    ) -> None:
        """Leave pruning parameters for before the next query; those that still wait are dropped.

        Args:
            pruning: what is to hold.
            on_answer: called in the worker's thread with None when the policy took it, else with
                the reason: then what held before holds on, and the query goes on with it.
        """
        with self._wake:
            self._pruning = pruning, on_answer

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
        try:
            self._serve()
        finally:
            # Whoever still holds an abandoned worker must not hold the model with it.
            self._policy = self._on_result = self._on_error = self._on_replan = None

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stop or self._job or self._asked or self._steps)
                if self._stop:
                    return
                # One that was asked for comes first: the others never end.
                job, self._asked = self._asked, None
                if job is None:
                    job, self._job = self._job, None
                    count = self._steps_before_job if job else len(self._steps)
                    self._steps_before_job = 0
                else:
                    count = 0
                steps = [self._steps.popleft() for _ in range(count)]
                pruning, reset = self._pruning, self._reset
                self._pruning, self._reset = None, False
                self._current, self._busy_since = job, time.monotonic()
            try:
                self._work(job, steps, pruning, reset)
            except BaseException as error:  # the thread must outlive any fault of one query
                self._rest()
                if not self._stop:
                    self._tell(_as_exception(error), job)
            self._rest()

    def _tell(self, error: Exception, job: Job | None) -> None:
        try:
            self._on_error(error, job)
        except Exception:  # an error that cannot even be told
            logging.getLogger(__name__).exception('an error of an inference could not be told')

    def _rest(self) -> None:
        self._current = self._busy_since = None

    def _work(self, job: Job | None, steps: list, pruning: Change | None, reset: bool) -> None:
        replan = self._prepare(steps, pruning, reset or (job is not None and job.apart))
        if job is None:
            if replan:
                self._on_replan()
            return
        try:
            result = self._policy.infer(job.observation)
        finally:
            if job.apart:
                self._policy.reset()
        self._rest()
        if not self._stop:
            self._on_result(job, result)

    def _prepare(self, steps: list, pruning: Change | None, reset: bool) -> bool:
        """Whether one of the executed steps asks for a new query at once."""
        if reset:
            self._policy.reset()
        if pruning is not None:
            self._change_pruning(*pruning)
        replan = False
        for action, images, stamps_ns in steps:
            try:
                replan |= bool(self._policy.observe_executed(action, images, stamps_ns))
            except Exception as error:  # it must cost neither the others nor the query
                self._on_error(error, None)
        return replan

    def _change_pruning(
        self, pruning: PruneConfig, on_answer: Callable[[Exception | None], None]
    ) -> None:
        try:
            self._policy.set_pruning(pruning)
        except Exception as error:
            on_answer(error)
        else:
            on_answer(None)


class SpareThread(Generic[Item]):
    """Does what may wait: the newest item left for it, while inference pauses, at a limited rate.

    Args:
        work: called in the thread.
        in_the_way: whether it should wait now; it does, but for GIVE_WAY_S at most.
        rate_hz: how often per second at most, asked anew every time; 0: never.
        on_error: called in the thread with what `work` raises; the thread goes on.
    """

    def __init__(
        self,
        work: Callable[[Item], None],
        in_the_way: Callable[[], bool],
        rate_hz: Callable[[], float],
        on_error: Callable[[Exception], None],
    ):
        self._work = work
        self._in_the_way = in_the_way
        self._rate_hz = rate_hz
        self._on_error = on_error
        self._wake = threading.Condition()
        self._item: Item | None = None
        self._next = 0.0  # when the rate allows the next
        self._stop = False
        self._thread = threading.Thread(target=self._run, name='spare', daemon=True)
        self._thread.start()

    def offer(self, item: Item) -> None:
        """Leave an item; one that still waits is dropped, as is this when it comes too soon."""
        rate, now = self._rate_hz(), time.monotonic()
        if rate <= 0 or now < self._next:
            return
        with self._wake:
            # A little less than the period: items that come at this very rate must all pass.
            self._next = now + 0.9 / rate
            self._item = item
            self._wake.notify()

    def give_way(self) -> None:
        """Wait while something is in the way; for `work`, between two parts of what it does."""
        end = time.monotonic() + GIVE_WAY_S
        while self._in_the_way() and time.monotonic() < end and not self._stop:
            time.sleep(GIVE_WAY_POLL_S)

    def stop(self, timeout_s: float) -> bool:
        """End the thread; False when it did not end in time."""
        with self._wake:
            self._stop, self._item = True, None
            self._wake.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stop or self._item is not None)
            self.give_way()
            with self._wake:
                if self._stop:
                    return
                item, self._item = self._item, None
            try:
                self._work(item)
            except Exception as error:  # a bad picture must not end all later ones
                self._on_error(error)
