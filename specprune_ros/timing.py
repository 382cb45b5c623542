"""Time the stages of one inference."""

from __future__ import annotations

import time

import torch

STAGES = ('preprocess', 'embed', 'decode', 'act')


class StageClock:
    """Times the stages of one inference without making the host wait between them."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == 'cuda'
        self._start = time.perf_counter()
        self._marks: list = [self._mark()]

    def lap(self) -> None:
        """End of a stage."""
        self._marks.append(self._mark())

    def seconds(self) -> dict[str, float]:
        """Report field -> seconds. Call after the result is on the host."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        laps = [a.elapsed_time(b) / 1e3 if self._cuda else b - a for a, b in pairs]
        named = {f'latency_{stage}_s': lap for stage, lap in zip(STAGES, laps, strict=True)}
        return {**named, 'latency_total_s': time.perf_counter() - self._start}

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
