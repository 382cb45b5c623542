"""Time the stages of one inference."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

STAGES = ('preprocess', 'embed', 'decode', 'act')


class StageClock:
    """Times the stages of one inference without making the host wait between them."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == 'cuda'
        self._start = time.perf_counter()
        self._marks: list[tuple[str, object]] = [('', self._mark())]

    def lap(self, stage: str) -> None:
        """What passed since the last lap belongs to a stage; its laps add up."""
        self._marks.append((stage, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Report field -> seconds. Call after the result is on the host."""
        spent = dict.fromkeys(STAGES, 0.0)
        for (_, before), (stage, after) in pairwise(self._marks):
            spent[stage] += before.elapsed_time(after) / 1e3 if self._cuda else after - before
        named = {f'latency_{stage}_s': seconds for stage, seconds in spent.items()}
        return {**named, 'latency_total_s': time.perf_counter() - self._start}

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
