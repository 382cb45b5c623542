"""Which row of which chunk is due, and what several chunks say about one control step.

Row i of a chunk is for its stamp + (i + 1) control periods. That holds for the first row to be
executed; from then on a chunk advances by the control periods that really went by, so that a
timer which ticks a little early or late neither skips nor repeats rows. Rows that were executed
after a chunk's observation count as done: its policy did not see them happen. So do those that
were sent before it but had no effect yet: an arm takes its time.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from specprune_ros.types import ActionChunk

NS = 1_000_000_000


@dataclass(eq=False)
class QueuedChunk:
    """One chunk that waits or is executed.

    Attributes:
        rows: [L, A] in the robot's column order.
        last: row that was executed last, or that counts as executed; -1: none.
        since_ns: when that was; None: `last` is -1, and the chunk's own stamp says what is due.
        started: a row of it was executed.
    """

    chunk: ActionChunk
    rows: np.ndarray
    last: int = -1
    since_ns: int | None = None
    started: bool = False

    def due(self, now_ns: int, dt_ns: int) -> int:
        """The row for now: -1 or less before the first, L or more after the last.

        It is `last` when the next one is not due yet.
        """
        by_stamp = (now_ns - self.chunk.stamp_ns) / dt_ns - 1.0
        if self.since_ns is None:
            return math.floor(by_stamp)
        went_by = math.floor((now_ns - self.since_ns) / dt_ns + 0.5)
        if not self.started:  # time in which nothing was executed is no reason to drop rows
            went_by = min(went_by, 1)
        # Half a period of grace, for a chunk whose first row was executed late in its period.
        return max(self.last + went_by, math.floor(by_stamp - 0.5))

    def is_over(self, now_ns: int, dt_ns: int) -> bool:
        """Whether all its rows were executed or are past."""
        return max(self.last + 1, self.due(now_ns, dt_ns)) >= len(self.rows)


@dataclass(frozen=True, eq=False)
class Due:
    """What to execute now: a row [A] of `chunk`, at index `step`, blended with other chunks'."""

    row: np.ndarray
    chunk: ActionChunk
    step: int


class ChunkQueue:
    """Chunks of one epoch, oldest first.

    Args:
        dt_s: control period.
        horizon: L, of every chunk.
        decay: m of the ensemble's weights; None: the newest chunk replaces the others.
        unblended: action columns that are never averaged (grippers: half closed is neither).
        latency_s: from a command to its effect in an observation.
    """

    def __init__(
        self,
        dt_s: float,
        horizon: int,
        decay: float | None,
        unblended: np.ndarray,
        latency_s: float = 0.0,
    ):
        self._dt_ns, self._latency_ns = round(dt_s * NS), round(latency_s * NS)
        self._decay = decay
        self._unblended = unblended
        self._chunks: list[QueuedChunk] = []
        self._executed_ns: deque[int] = deque(maxlen=horizon)  # when commands were sent

    @property
    def newest(self) -> QueuedChunk | None:
        """The chunk that came last."""
        return self._chunks[-1] if self._chunks else None

    @property
    def current(self) -> QueuedChunk | None:
        """The newest chunk of which a row was executed, else the newest."""
        started = [queued for queued in self._chunks if queued.started]
        return started[-1] if started else self.newest

    def flush(self, stopped_ns: int | None = None) -> None:
        """Drop all chunks; what was executed stays known.

        Args:
            stopped_ns: when a stop was sent: it overtakes the commands that had no effect by then;
                None: none was.
        """
        self._chunks.clear()
        if stopped_ns is not None:
            had_effect = [t for t in self._executed_ns if t <= stopped_ns - self._latency_ns]
            self._executed_ns = deque(had_effect, maxlen=self._executed_ns.maxlen)

    def forget(self) -> None:
        """Drop all chunks and what was executed."""
        self._chunks.clear()
        self._executed_ns.clear()

    def aligned(self, chunk: ActionChunk, rows: np.ndarray) -> QueuedChunk:
        """A chunk with the rows marked as done whose effect its observation does not show."""
        shown_ns = chunk.observation_stamp_ns - self._latency_ns
        done = sum(stamp > shown_ns for stamp in self._executed_ns)
        queued = QueuedChunk(chunk, rows)
        if done:
            queued.last, queued.since_ns = done - 1, self._executed_ns[-1]
        return queued

    def put(self, queued: QueuedChunk) -> None:
        """Append the newest chunk."""
        self._chunks.append(queued)

    def drop_unusable(self, now_ns: int, timeout_s: float) -> bool:
        """Drop chunks that are over or too old; whether one of them had rows to come."""
        over = [queued.is_over(now_ns, self._dt_ns) for queued in self._chunks]
        stale = [self._is_stale(queued, now_ns, timeout_s) for queued in self._chunks]
        kept = [not (ended or old) for ended, old in zip(over, stale, strict=True)]
        self._chunks = [q for q, keep in zip(self._chunks, kept, strict=True) if keep]
        return any(old and not ended for ended, old in zip(over, stale, strict=True))

    @staticmethod
    def _is_stale(queued: QueuedChunk, now_ns: int, timeout_s: float) -> bool:
        chunk = queued.chunk
        if (now_ns - chunk.observation_stamp_ns) / NS > timeout_s:
            return True
        return not queued.started and (now_ns - chunk.stamp_ns) / NS > chunk.valid_for_s

    def due(self, now_ns: int) -> Due | None:
        """What to execute now; None when nothing is due."""
        ready = [(queued, step) for queued, step in self._steps(now_ns) if step is not None]
        if not ready:
            return None
        rows = np.array([queued.rows[step] for queued, step in ready])
        row = self._blend(rows[:, None], np.ones((len(ready), 1), bool))[0]
        newest, step = ready[-1]
        return Due(row, newest.chunk, step)

    def _steps(self, now_ns: int) -> list[tuple[QueuedChunk, int | None]]:
        """Every chunk, and its row that is due now, if there is one."""
        steps = [(queued, queued.due(now_ns, self._dt_ns)) for queued in self._chunks]
        return [(q, step if q.last < step < len(q.rows) else None) for q, step in steps]

    def executed(self, now_ns: int) -> None:
        """Note that what was due now was executed."""
        self._executed_ns.append(now_ns)
        for queued, step in self._steps(now_ns):
            if step is not None:
                queued.last, queued.started = step, True
            else:  # a control step went by that its policy did not see
                queued.last += 1
            queued.since_ns = now_ns
        if self._decay is None:
            started = [index for index, queued in enumerate(self._chunks) if queued.started]
            del self._chunks[: max(started, default=0)]

    def preview(self, candidate: QueuedChunk, now_ns: int) -> np.ndarray:
        """[K, A] the rows that would be executed from now on if the candidate were put."""
        chunks = [q for q in self._chunks if not q.is_over(now_ns, self._dt_ns)] + [candidate]
        waits = [self._wait(queued, now_ns) for queued in chunks]
        starts = [self._next(queued, now_ns) for queued in chunks]
        if min(waits):  # nobody executes anything meanwhile
            waits = [wait - min(waits) for wait in waits]
        lengths = [len(q.rows) - start for q, start in zip(chunks, starts, strict=True)]
        rows = np.zeros((len(chunks), max(lengths), candidate.rows.shape[1]))
        valid = np.zeros(rows.shape[:2], bool)
        for index, (queued, start) in enumerate(zip(chunks, starts, strict=True)):
            rows[index, : lengths[index]] = queued.rows[start:]
            valid[index, waits[index] : lengths[index]] = True
        some = valid.any(axis=0)
        count = len(some) if some.all() else int(np.argmin(some))
        return self._blend(rows[:, :count], valid[:, :count])

    def _next(self, queued: QueuedChunk, now_ns: int) -> int:
        return max(queued.last + 1, queued.due(now_ns, self._dt_ns), 0)

    def _wait(self, queued: QueuedChunk, now_ns: int) -> int:
        """Control steps before the first row is due."""
        if queued.since_ns is not None:
            return 0
        next_ns = max([now_ns, *(stamp + self._dt_ns for stamp in self._executed_ns)])
        first_ns = queued.chunk.stamp_ns + self._dt_ns
        return max(0, math.ceil((first_ns - next_ns) / self._dt_ns))

    def _blend(self, rows: np.ndarray, valid: np.ndarray) -> np.ndarray:
        """[K, A] one row for each of K steps, of what C chunks say about it.

        Args:
            rows: [C, K, A], oldest chunk first.
            valid: [C, K] whether a chunk has a row for a step; some chunk has for each.

        Source: ACT, temporal ensembling: weights exp(-m i), i = 0 for the oldest prediction of a
            step.
        """
        count, steps = valid.shape
        newest = count - 1 - np.argmax(valid[::-1], axis=0)
        taken = rows[newest, np.arange(steps)]
        if self._decay is None or count == 1:
            return taken
        rank = np.cumsum(valid, axis=0) - 1
        weights = np.where(valid, np.exp(-self._decay * rank), 0.0)
        mean = np.einsum('ck,cka->ka', weights / weights.sum(axis=0), rows)
        mean[:, self._unblended] = taken[:, self._unblended]
        return mean

    def depth(self, now_ns: int) -> int:
        """Rows of the current chunk that are still to come."""
        current = self.current
        return 0 if current is None else max(len(current.rows) - self._next(current, now_ns), 0)
