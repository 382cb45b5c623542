"""Counts and timings that `/diagnostics` shows. No ROS; safe to call from several threads."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque

import numpy as np

from specprune_ros.types import Mode, PolicyResult, PruneReport

LATENCY_WINDOW = 200  # queries over which percentiles are taken
KINDS_KEPT = 1000  # kinds of fault whose last logging is remembered
MEMORY_S = 1.0  # at most how often the GPU's memory is looked at
REPEAT_S = 5.0  # the same kind of error is logged at most this often
CLOCK_STEP_NS = 10_000_000  # a clock that is set back by less was corrected, and did not jump


def has_jumped_back(before_ns: int, now_ns: int) -> bool:
    """Whether a clock that showed the one and shows the other jumped."""
    return before_ns - now_ns >= CLOCK_STEP_NS


class Health:
    """Faults by code, and how inference is doing. One per node."""

    def __init__(self):
        self._lock = threading.Lock()
        self._faults: Counter[str] = Counter()
        self._messages: dict[str, str] = {}
        self._logged_at: dict[tuple[str, str], float] = {}
        self._latency_s: deque[float] = deque(maxlen=LATENCY_WINDOW)
        self._since_last_look = 0
        self._queries = 0
        self._discarded = 0
        self._modes: Counter[str] = Counter()
        self._report: PruneReport | None = None
        self._newest: tuple[str, str] = ('', '')
        self._arrived: Counter[str] = Counter()
        self._rates_since = time.monotonic()
        self._clamped = 0
        self._compared = 0
        self._memory: dict[str, str] = {}
        self._memory_at = -MEMORY_S

    def fault(self, code: str, message: str) -> bool:
        """Count a fault.

        Returns:
            True when it should be logged: none of this code and field was logged lately.
        """
        now = time.monotonic()
        # "cameras/wrist = '0.61 s old'" and "... '0.71 s old'" are the same to who reads the log.
        kind = (code, message.partition(' = ')[0])
        with self._lock:
            self._faults[code] += 1
            self._since_last_look += 1
            self._messages[code] = message
            self._newest = (code, message)
            if now - self._logged_at.get(kind, -REPEAT_S) < REPEAT_S:
                return False
            if len(self._logged_at) >= KINDS_KEPT:
                self._logged_at.clear()
            self._logged_at[kind] = now
            return True

    def inferred(self, result: PolicyResult) -> None:
        """Count a query."""
        with self._lock:
            self._queries += 1
            self._latency_s.append(result.report.latency_total_s)
            self._modes[Mode(result.report.mode).name.lower()] += 1
            self._report = result.report
            self._compared += bool(np.isfinite(result.report.guard_disagreement))
            self._clamped += result.chunk.clamped

    def discarded(self) -> None:
        """Count a result that came too late to be published (stopped, or a new epoch)."""
        with self._lock:
            self._discarded += 1

    def look_at_memory(self) -> None:
        """Note the GPU's memory; for the thread that infers: torch may make the caller wait."""
        now = time.monotonic()
        if now - self._memory_at >= MEMORY_S:
            self._memory_at, self._memory = now, gpu_memory()

    def forget_memory(self) -> None:
        """The model is gone."""
        self._memory, self._memory_at = {}, -MEMORY_S

    def arrived(self, stream: str) -> None:
        """Count a message of an input."""
        with self._lock:
            self._arrived[stream] += 1

    def rates_hz(self) -> dict[str, float]:
        """Input -> messages per second since the last call."""
        now = time.monotonic()
        with self._lock:
            counts, self._arrived = self._arrived, Counter()
            passed, self._rates_since = max(now - self._rates_since, 1e-3), now
        return {stream: count / passed for stream, count in counts.items()}

    @property
    def report(self) -> PruneReport | None:
        """Of the newest query."""
        return self._report

    @property
    def newest_fault(self) -> tuple[str, str]:
        """Code and message of the newest fault; both empty when there is none."""
        return self._newest

    def forgive(self) -> None:
        """No fault counts as the newest any more; the counts stay."""
        self._newest = ('', '')

    def faults(self) -> tuple[dict[str, int], dict[str, str], int]:
        """Counts by code, the last message of each, and how many came since the last call."""
        with self._lock:
            recent, self._since_last_look = self._since_last_look, 0
            return dict(self._faults), dict(self._messages), recent

    def inference(self) -> dict[str, str]:
        """Figures of inference, as text."""
        with self._lock:
            latency = 1e3 * np.array(self._latency_s)
            figures = {'queries': str(self._queries), 'discarded': str(self._discarded)}
            if len(latency):
                figures['latency p50 ms'] = f'{np.percentile(latency, 50):.1f}'
                figures['latency p95 ms'] = f'{np.percentile(latency, 95):.1f}'
            return figures | self._memory

    def guard(self) -> dict[str, str]:
        """What the limits and the pruning guard did, as text."""
        with self._lock:
            figures = {
                'clamped elements': str(self._clamped),
                'actions not finite': str(self._faults['action']),
                'pruning failures': str(self._modes['fallback']),
                'queries compared with dense': str(self._compared),
            }
            report = self._report
        if report is not None and np.isfinite(report.guard_disagreement):
            figures['disagreement'] = f'{report.guard_disagreement:.4f}'
        return figures

    def pruning(self) -> dict[str, str]:
        """Figures of pruning, as text."""
        with self._lock:
            figures = {f'queries {mode}': str(count) for mode, count in self._modes.items()}
            report = self._report
        if report is None:
            return figures
        total = max(int(report.tokens_total.sum()), 1)
        figures['alpha'] = f'{report.alpha:.2f}'
        figures['method'] = report.method
        figures['mode'] = Mode(report.mode).name.lower()
        figures['mode reason'] = report.mode_reason
        figures['kept after static'] = f'{report.tokens_static.sum() / total:.3f}'
        figures['kept after layers'] = f'{report.tokens_kept.sum() / total:.3f}'
        known = report.recall[np.isfinite(report.recall)]
        if len(known):
            figures['recall'] = f'{known.mean():.3f}'
        if report.fallback_reason:
            figures['fallback reason'] = report.fallback_reason
        return figures


class Presence:
    """Whether somebody who was there still is. Times are steady seconds, passed in.

    Args:
        timeout_s: who was silent for longer is gone.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._seen_s: float | None = None
        self._told = False

    def seen(self, now_s: float) -> None:
        """There it is."""
        self._seen_s, self._told = now_s, False

    def forget(self) -> None:
        """Nobody is expected any more."""
        self._seen_s, self._told = None, False

    @property
    def is_known(self) -> bool:
        """Whether it was ever there."""
        return self._seen_s is not None

    def is_gone(self, now_s: float) -> bool:
        """Whether it was there and is no longer."""
        return self._seen_s is not None and now_s - self._seen_s > self._timeout_s

    def went(self, now_s: float) -> bool:
        """`is_gone`, but True only once for every loss."""
        told, self._told = self._told, self.is_gone(now_s)
        return self._told and not told


def keep_ratio(report: PruneReport) -> float:
    """Share of the visual tokens that an inference kept to the end, unit 1."""
    total = int(report.tokens_total.sum())
    return float(report.tokens_kept.sum()) / total if total else 1.0


def _uses_gpu() -> bool:
    # Another thread may be in the middle of importing torch.
    cuda = getattr(sys.modules.get('torch'), 'cuda', None)
    return cuda is not None and cuda.is_available() and cuda.is_initialized()


def free_gpu_memory() -> None:
    """Let other processes have what torch's allocator keeps of freed tensors."""
    if _uses_gpu():
        sys.modules['torch'].cuda.empty_cache()


def gpu_memory() -> dict[str, str]:
    """Memory that torch holds on its current GPU, as text; empty where it uses none.

    From the allocator's own books: asking the driver could wait for a running kernel.
    """
    if not _uses_gpu():
        return {}
    torch = sys.modules['torch']
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return {
        'gpu memory allocated MiB': f'{torch.cuda.memory_allocated() / 2**20:.0f}',
        'gpu memory reserved MiB': f'{torch.cuda.memory_reserved() / 2**20:.0f}',
        'gpu memory peak MiB': f'{torch.cuda.max_memory_allocated() / 2**20:.0f}',
        'gpu memory total MiB': f'{total / 2**20:.0f}',
    }
