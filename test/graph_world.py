"""Stands in for CUDA graphs on the CPU: writes operators down as they run, and repeats them.

As a graph does, a repetition runs the same operators on the same memory: whatever Python computed
of a tensor's numbers in the recording is a constant in every repetition.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that hand a number to the host, or whose result's size depends on the data.
HOST_READS = {
    'item', '_local_scalar_dense', 'is_nonzero', 'equal', 'allclose', 'nonzero', 'masked_select',
    'unique_consecutive', '_unique2', 'bincount', 'repeat_interleave.Tensor',
}  # fmt: skip


def name_of(operator) -> str:
    """Such as 'mm' or 'add.Tensor'."""
    return str(operator).removeprefix('aten.').removesuffix('.default')


class Tape(TorchDispatchMode):
    """Writes every operator down that runs within.

    Attributes:
        calls: (operator, arguments, keyword arguments, result), in order.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, result))
        return result

    @property
    def operators(self) -> Counter[str]:
        """Operator -> how often it ran."""
        return Counter(name_of(operator) for operator, *_ in self.calls)

    def play(self) -> None:
        """Run all again, into the same memory."""
        for operator, args, kwargs, result in self.calls:
            fresh = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(fresh), strict=True):
                # Views, and what was written in place, are in the old memory already.
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class TapeRecorder:
    """A query_graph.Recorder.

    Attributes:
        tapes: of every recording.
    """

    def __init__(self):
        self.tapes: list[Tape] = []

    def rehearse(self, work):
        return work()

    def record(self, work):
        tape = Tape()
        with tape:
            result = work()
        self.tapes.append(tape)
        return tape.play, result
