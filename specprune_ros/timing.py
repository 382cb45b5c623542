"""Time the stages of one inference."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

STAGES = ('preprocess', 'embed', 'decode', 'act')
# What pruning adds, and the stage of which it is a part: patch similarity; scores from attention
# rows; choosing what stays; dropping rows; the record of what went.
PRUNING = {
    'similarity': 'preprocess',
    'score': 'decode',
    'select': 'decode',
    'gather': 'decode',
    'trace': 'act',
}
# What takes most of a stage and is not pruning; a query replayed as one CUDA graph has no stages
# between its images on the device and its actions, and all of that counts as 'graph'.
PARTS = {'vision': 'embed', 'projector': 'embed', 'graph': 'decode'}


class StageClock:
    """Times the stages of one inference without making the host wait between them."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == 'cuda'
        self._start = time.perf_counter()
        self._marks: list[tuple[str, object]] = [('', self._mark())]

    def lap(self, stage: str) -> None:
        """What passed since the last lap belongs to a stage; its laps add up."""
        self._marks.append((stage, self._mark()))

    def laps(self) -> dict[str, float]:
        """Stage or part of it -> seconds; waits for the last lap."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        spent = dict.fromkeys((*STAGES, *PRUNING, *PARTS), 0.0)
        for (_, before), (stage, after) in pairwise(self._marks):
            spent[stage] += before.elapsed_time(after) / 1e3 if self._cuda else after - before
        return spent

    def seconds(self) -> dict[str, float]:
        """Report field -> seconds; a part counts in its stage, and in what pruning adds."""
        laps = self.laps()
        spent = {stage: laps[stage] for stage in STAGES}
        for part, stage in {**PRUNING, **PARTS}.items():
            spent[stage] += laps[part]
        spent['pruning'] = sum(laps[part] for part in PRUNING)
        named = {f'latency_{name}_s': value for name, value in spent.items()}
        return {**named, 'latency_total_s': time.perf_counter() - self._start}

    def _mark(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class NoClock(StageClock):
    """Times nothing: inside a graph's recording there is no time."""

    def __init__(self) -> None:
        self._cuda = False
        self._start = 0.0
        self._marks = [('', 0.0)]

    def lap(self, stage: str) -> None:
        """Do nothing."""
