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

from specprune_ros.errors import named
from specprune_ros.tensor_tree import map_tensors, signature, tensors

GRAPHS = 16  # kinds of query that stay recorded; each holds its results' memory
TRIES, REST = 3, 100  # a kind that fails is tried again, so often, after so many queries eagerly
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
        try:
            with torch.cuda.stream(self._stream):
                return work()
        finally:  # what failed may have queued work on the inputs
            current.wait_stream(self._stream)

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


@dataclass(eq=False)
class _Failed:
    """A kind that could not be recorded: how often, and queries until it is tried again."""

    times: int
    rest: int = REST


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
        self._recordings: OrderedDict[Hashable, _Recording | _Failed] = OrderedDict()
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
            plain: runs instead where recording fails, which may pass: out of memory, say.

        Returns:
            Its own tensors, which no later run touches.
        """
        try:
            key = kind, signature(inputs)
        except TypeError as error:
            self.eager(str(error))
            return plain(inputs)
        recording = self._recordings.get(key)
        if not isinstance(recording, _Recording):
            recorded = self._due(key) and self._recorded(key, function, inputs)
            return map_tensors(torch.clone, recorded[0]) if recorded else plain(inputs)
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

    def prepare(
        self, kind: Hashable, function: Callable[[Inputs], Result], inputs: Inputs
    ) -> None:
        """Record a kind before it is needed; nothing where it is recorded, or failed.

        Args:
            kind, function: as for `run`.
            inputs: of the right shapes, whatever their numbers.
        """
        key = kind, signature(inputs)
        if key not in self._recordings:
            self._recorded(key, function, inputs)

    def _due(self, key: Hashable) -> bool:
        """Whether a kind that is not recorded may be tried now."""
        failed = self._recordings.get(key)
        if failed is None:
            return True
        failed.rest -= 1
        return failed.rest < 0 and failed.times < TRIES

    def _recorded(
        self, key: Hashable, function: Callable[[Inputs], Result], inputs: Inputs
    ) -> tuple[Result] | None:
        """Record, and the rehearsal's result; None where that failed."""
        failed = self._recordings.pop(key, None)
        if len(self._recordings) >= self._limit:
            self._recordings.popitem(last=False)
        try:
            static = map_tensors(torch.clone, inputs)
            result = self._recorder.rehearse(lambda: function(static))
            tensors(result)  # a result in which some could hide would go stale
            replay, held = self._recorder.record(lambda: function(static))
        except Exception as error:  # a recording costs speed at worst, never the action
            self._recordings[key] = _Failed(1 + (failed.times if failed else 0))
            self.eager(named(error))
            return None
        self._recordings[key] = _Recording(static, replay, held)
        return (result,)
