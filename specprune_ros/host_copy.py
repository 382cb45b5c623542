"""Tensors on their way to the host, while the host goes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Generic, TypeVar

import torch
from torch import Tensor

from specprune_ros.tensor_tree import map_tensors
from specprune_ros.types import ActionChunk, PolicyResult, PruneReport

Value = TypeVar('Value')


class HostCopy(Generic[Value]):
    """A value whose tensors are being copied to the host; on the CPU it is the value itself.

    Attributes:
        value: the copy, its numbers not there before `wait` came back.

    Args:
        value: see tensor_tree; its tensors lie on one device.
        device: that one. On CUDA the copies go to pinned memory, in order behind all work so far.
    """

    def __init__(self, value: Value, device: torch.device):
        self._arrived = None
        self.value = value
        if device.type == 'cuda':
            self.value = map_tensors(_pinned_copy, value)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> Value:
        """The value, once it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self.value


def _pinned_copy(tensor: Tensor) -> Tensor:
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)


class DeferredResult(PolicyResult):
    """A result whose report is made when somebody first reads it, and not before the actions.

    Args:
        chunk: the actions.
        report: makes the report, of nothing that changes later; or the report itself, which is
            what dataclasses.replace gives.
    """

    def __init__(self, chunk: ActionChunk, report: Callable[[], PruneReport] | PruneReport):
        object.__setattr__(self, 'chunk', chunk)
        object.__setattr__(self, '_report', report)

    @cached_property
    def report(self) -> PruneReport:
        """What pruning did."""
        return self._report() if callable(self._report) else self._report
