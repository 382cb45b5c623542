"""The inference thread: latest-value slot in, callbacks out. No ROS.

The policy lives in this thread alone. Callers only leave things for it, and never wait: neither to
submit, nor to stop publishing.
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
    """

    def __init__(
        self,
        policy: Policy,
        on_result: Callable[[Job, PolicyResult], None],
        on_error: Callable[[Exception], None],
    ):
        self._policy = policy
        self._on_result = on_result
        self._on_error = on_error
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
        """Leave an executed action for the first query whose observation comes after it."""
        with self._wake:
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
                self._wake.wait_for(lambda: self._stop or self._job is not None)
                if self._stop:
                    return
                job, self._job = self._job, None
                steps = [self._steps.popleft() for _ in range(self._steps_before_job)]
                self._steps_before_job = 0
                pruning, reset = self._pruning, self._reset
                self._pruning, self._reset = None, False
            try:
                self._prepare(steps, pruning, reset)
                result = self._policy.infer(job.observation)
                if not self._stop:
                    self._on_result(job, result)
            except Exception as error:  # the thread must outlive any fault of one query
                self._on_error(error)

    def _prepare(self, steps: list, pruning: PruneConfig | None, reset: bool) -> None:
        if reset:
            self._policy.reset()
        if pruning is not None:
            self._policy.set_pruning(pruning)
        for action, images in steps:
            try:
                self._policy.observe_executed(action, images)
            except SpecPruneError as error:
                self._on_error(error)
