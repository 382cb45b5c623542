"""Counts and timings that `/diagnostics` shows. No ROS; safe to call from several threads."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque

import numpy as np

from specprune_ros.types import Mode, PolicyResult, PruneReport

LATENCY_WINDOW = 200  # queries over which percentiles are taken
KINDS_KEPT = 1000  # kinds of fault whose last logging is remembered
REPEAT_S = 5.0  # the same kind of error is logged at most this often


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

    def discarded(self) -> None:
        """Count a result that came too late to be published (stopped, or a new epoch)."""
        with self._lock:
            self._discarded += 1

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
            return figures

    def pruning(self) -> dict[str, str]:
        """Figures of pruning, as text."""
        with self._lock:
            figures = {f'queries {mode}': str(count) for mode, count in self._modes.items()}
            report = self._report
        if report is None:
            return figures
        total = max(int(report.tokens_total.sum()), 1)
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
