"""Controls for SpecPrune-VLA: they keep as many patches as it would, chosen without looking.

A setting in which these do as well does not measure what a method chooses. No graph can record
them, and their speed means nothing: they score as SpecPrune does, to know how many it would keep.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specprune_ros.config import PruneConfig
from specprune_ros.pruning.base import QueryContext
from specprune_ros.pruning.specprune import SpecPrune, SpecPruneRun
from specprune_ros.types import Reason


class BlindRun(SpecPruneRun):
    """SpecPrune's schedule and counts, per camera in static and in all in dynamic pruning."""

    def order(self, patches: Tensor) -> Tensor:
        """Which of these to keep first.

        Args:
            patches: [n] ascending visual_idx.

        Returns:
            [n] rank of each; the lowest stay.
        """
        raise NotImplementedError

    def _select_static(self) -> Tensor:
        patches = self._shape[1]
        counts = torch.bincount(super()._select_static() // patches, minlength=self._shape[0])
        every = torch.arange(patches, device=self._gone.device)
        keep = torch.cat(
            [
                self._first(camera * patches + every, count)
                for camera, count in enumerate(counts.tolist())
            ]
        )
        self._reason = torch.zeros_like(self._reason)
        self._reason.view(-1)[keep] = int(Reason.FILL)
        return keep

    def _select_dynamic(self, alive: Tensor) -> Tensor:
        keep = self._first(alive, len(super()._select_dynamic(alive)))
        # The scores that are left belong to what SpecPrune would have kept.
        self._ema = torch.zeros(len(keep), device=keep.device)
        return keep

    def _first(self, patches: Tensor, count: int) -> Tensor:
        return patches[self.order(patches).argsort(stable=True)[:count].sort().values]


class RandomRun(BlindRun):
    """Drawn anew in every query."""

    def __init__(self, config: PruneConfig, context: QueryContext, *, dense: bool = False):
        super().__init__(config, context, dense=dense)
        self._generator = torch.Generator().manual_seed(config.seed * 1_000_003 + context.query)

    def order(self, patches: Tensor) -> Tensor:
        """Any order."""
        return torch.rand(len(patches), generator=self._generator).to(patches.device)


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


class RandomPatches(SpecPrune):
    """`random`: as many patches as SpecPrune would keep, drawn."""

    name = 'random'

    def begin(self, context: QueryContext) -> RandomRun:
        """Start one inference."""
        return RandomRun(self.config, context)


class UniformPatches(SpecPrune):
    """`uniform`: as many patches as SpecPrune would keep, evenly spread."""

    name = 'uniform'

    def begin(self, context: QueryContext) -> UniformRun:
        """Start one inference."""
        return UniformRun(self.config, context)
