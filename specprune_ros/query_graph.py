"""Queries recorded once per kind and replayed, as CUDA graphs; the only owner of them.

A replay costs the host one call instead of thousands. It repeats the very operations of the
recording on whatever then lies in its inputs, so only a function whose course depends on no number
in its tensors may be recorded.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from specprune_ros.tensor_tree import map_tensors, signature, tensors

GRAPHS = 16  # kinds of query that stay recorded; each holds its results' memory
LOG = logging.getLogger(__name__)

Inputs, Result = TypeVar('Inputs'), TypeVar('Result')


class Recorder(Protocol):
    """Records what a function does on a device."""

    def rehearse(self, work: Callable[[], Result]) -> Result:
        """Run it where it will be recorded, so that nothing is allocated or tuned then."""

    def record(self, work: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """Record it.

        Returns:
            What repeats it, and its result, which a repetition overwrites.
        """


class CudaRecorder:
    """CUDA graphs that share one memory pool.

    They may share it though they are replayed in any order: never two at once, no input lies in
    the pool, and results are held as long as their graph.
    """

    def __init__(self, device: torch.device):
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def rehearse(self, work: Callable[[], Result]) -> Result:
        """See Recorder."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def record(self, work: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """See Recorder."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may use CUDA meanwhile, such as one that reads a report.
        scope = torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode='thread_local'
        )
        with scope:
            result = work()
        return graph.replay, result


@dataclass(frozen=True, eq=False)
class _Recording:
    """One kind's graph: fill `inputs`, call `replay`, read `result`."""

    inputs: object
    replay: Callable[[], None]
    result: object


class QueryGraphs:
    """Runs functions of tensors, recorded from the second time on.

    Attributes:
        replays: how many results came from a recording.

    Args:
        recorder: of the device.
        limit: how many recordings stay; the one not used for longest goes.
    """

    def __init__(self, recorder: Recorder, limit: int = GRAPHS):
        self._recorder = recorder
        self._limit = limit
        self._recordings: OrderedDict[Hashable, _Recording | None] = OrderedDict()
        self._said: set[str] = set()
        self.replays = 0

    def run(
        self,
        kind: Hashable,
        function: Callable[[Inputs], Result],
        inputs: Inputs,
        plain: Callable[[Inputs], Result],
    ) -> Result:
        """The function's result on these inputs.

        The first time, it runs as it is, and is then recorded.

        Args:
            kind: whatever decides the function's course, beside the inputs' signature.
            function: of `inputs` alone; may be another object each time.
            inputs: see tensor_tree.
            plain: runs instead, from the first time on, where recording fails.

        Returns:
            Its own tensors, which no later run touches.
        """
        try:
            key = kind, signature(inputs)
        except TypeError as error:
            self.eager(str(error))
            return plain(inputs)
        if key not in self._recordings:
            return self._first(key, function, inputs, plain)
        recording = self._recordings[key]
        if recording is None:
            return plain(inputs)
        self._recordings.move_to_end(key)
        for static, fresh in zip(tensors(recording.inputs), tensors(inputs), strict=True):
            static.copy_(fresh)
        recording.replay()
        self.replays += 1
        return map_tensors(torch.clone, recording.result)

    def eager(self, why: str) -> None:
        """Say once why a query is not recorded."""
        if why not in self._said:
            self._said.add(why)
            LOG.info('queries run without a CUDA graph: %s', why)

    def _first(
        self,
        key: Hashable,
        function: Callable[[Inputs], Result],
        inputs: Inputs,
        plain: Callable[[Inputs], Result],
    ) -> Result:
        static = map_tensors(torch.clone, inputs)
        if len(self._recordings) >= self._limit:
            self._recordings.popitem(last=False)
        try:
            result = self._recorder.rehearse(lambda: function(static))
            tensors(result)  # a result in which some could hide would go stale
            replay, held = self._recorder.record(lambda: function(static))
        except Exception as error:  # a recording costs speed at worst, never the action
            self._recordings[key] = None
            self.eager(f'{type(error).__name__}: {error}')
            return plain(inputs)
        self._recordings[key] = _Recording(static, replay, held)
        return result
