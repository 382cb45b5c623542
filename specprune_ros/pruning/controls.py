"""Controls for SpecPrune-VLA: they keep as many patches as it would, chosen without looking.

A setting in which these do as well does not measure what a method chooses. They score as SpecPrune
does, to know how many it would keep, so their speed says nothing.

With the budget `fixed` the counts are SpecPrune's own. With `union` they are what its sets come
to after this control's last query, some 10 % more: blind survivors overlap less. Compare with
`fixed`.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from specprune_ros.pruning.base import QueryContext
from specprune_ros.pruning.specprune import SpecPrune, SpecPruneRun
from specprune_ros.types import Reason

MIX = (0x85EBCA6B, 0xC2B2AE35)  # odd factors of the 32-bit finalizer of MurmurHash3
WORD = 0xFFFFFFFF


class BlindRun(SpecPruneRun):
    """SpecPrune's schedule and counts: per camera in static, in all in dynamic pruning."""

    def order(self, patches: Tensor) -> Tensor:
        """Which of these to keep first.

        Args:
            patches: [n] ascending visual_idx.

        Returns:
            [n] 0 or more; the lowest stay.
        """
        raise NotImplementedError

    def _select_static(self) -> Tensor:
        cameras, patches = self._shape
        would = super()._select_static()
        if self._budget == 'fixed':
            counts = [len(would) // cameras] * cameras
        else:
            counts = torch.bincount(would // patches, minlength=cameras).tolist()
        every = torch.arange(cameras * patches, device=would.device).view(cameras, patches)
        keep = torch.cat([self._first(*each) for each in zip(every, counts, strict=True)])
        self._reason = torch.zeros_like(self._reason)
        self._reason.view(-1).index_fill_(0, keep, int(Reason.FILL))
        return keep

    def _select_dynamic(self, alive: Tensor) -> Tensor:
        keep = self._first(alive, len(super()._select_dynamic(alive)))
        # The scores that are left belong to what SpecPrune would have kept.
        self._ema = torch.zeros_like(self._ema)
        return keep

    def _first(self, patches: Tensor, count: int) -> Tensor:
        order = self.order(patches)
        for camera in self.context.unseen:  # all of a returned camera stays
            order = order.masked_fill(patches // self._shape[1] == camera, -1)
        return patches[order.argsort(stable=True)[:count].sort().values]


class RandomRun(BlindRun):
    """Drawn anew in every query.

    A hash of the seed and of the last bits of the patches' scores: other images give other draws,
    the same ones the same draw, and no generator is needed on the device.
    """

    def order(self, patches: Tensor) -> Tensor:
        """Any order."""
        bits = self._local_score.flatten()[patches].contiguous().view(torch.int32).long()
        word = (bits + (patches + 1) * MIX[0] + self._config.seed) & WORD
        for factor in MIX:
            word = ((word ^ word >> 16) * factor) & WORD
        return word ^ word >> 16


class UniformRun(BlindRun):
    """Evenly spread over every image, the same in every query."""

    def order(self, patches: Tensor) -> Tensor:
        """Rank in Bayer's matrix for ordered dithering: any number of the first ones is even."""
        place, (rows, columns) = patches % self._shape[1], self.context.layout.grid
        row, column = place // columns, place % columns
        rank = torch.zeros_like(place)
        for bit in range((max(rows, columns) - 1).bit_length()):
            pair = ((row ^ column) >> bit & 1) << 1 | (row >> bit & 1)
            rank = rank << 2 | pair
        return rank


class _Control(SpecPrune):
    """A method with SpecPrune's course and another choice."""

    def graph_key(self, context: QueryContext) -> Hashable | None:
        """SpecPrune's: its counts are the control's."""
        return SpecPrune(self.config).graph_key(context)


class RandomPatches(_Control):
    """`random`: as many patches as SpecPrune would keep here, drawn."""

    name = 'random'

    def begin(self, context: QueryContext) -> RandomRun:
        """Start one inference."""
        return RandomRun(self.config, context)


class UniformPatches(_Control):
    """`uniform`: as many patches as SpecPrune would keep here, evenly spread."""

    name = 'uniform'

    def begin(self, context: QueryContext) -> UniformRun:
        """Start one inference."""
        return UniformRun(self.config, context)
