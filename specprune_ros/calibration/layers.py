"""Which two layers' V_global tells best what the next query will find important.

SpecPrune-VLA (sections 3.1, 4.1.1) takes layers 15 and 32 of OpenVLA's 32. Here every pair of
layers after the static pruning is asked, at the same number of tokens, how much it foresees of the
next query's important patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from specprune_ros.calibration.folds import Gain, gain_of
from specprune_ros.calibration.scan import QueryScores
from specprune_ros.config import PruneConfig
from specprune_ros.pruning import scores
from specprune_ros.pruning.budget import DECODER_DEPTH, STATIC_LAYER, k_budget, scale_layers


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerSearch:
    """Recall of every pair of layers.

    Attributes:
        pairs: [P, 2] 1-based layers of the decoder itself, ascending.
        names: of each pair in the numbering of pruning.global_layers (32 layers).
        recall: [P] share of the next query's important patches that a pair foresees.
        own_recall: [P] Eq. 1, how much of itself a pair foresees.
        configured: the configured layers, of the decoder itself.
        configured_recall: of those, at the same number of tokens.
        tokens: patches per camera that every pair names: as many as the configured layers'
            V_global has on average.
        best: index of the pair of highest recall.
        gain: of the best pair over the configured layers.
    """

    pairs: np.ndarray
    names: list[tuple[int, int]]
    recall: np.ndarray
    own_recall: np.ndarray
    configured: tuple[int, ...]
    configured_recall: float
    tokens: int
    best: int
    gain: Gain


def search_layers(records: Sequence[QueryScores], config: PruneConfig) -> LayerSearch | None:
    """Compare all pairs of layers on consecutive queries.

    Args:
        records: dense queries in order.
        config: gives K_global, the fusion, the rank weight, and the layers to compare with.

    Returns:
        None when no query follows another, or the decoder has no pair to choose from.
    """
    followers = [index for index, record in enumerate(records) if record.follows]
    depth = len(records[0].scores) if records else 0
    layers = range(STATIC_LAYER + 1, depth + 1)
    names = {
        pair: config_layers(pair, depth, config.global_layers) for pair in combinations(layers, 2)
    }
    pairs = [pair for pair in names if names[pair]]
    if not followers or not pairs:
        return None
    fusion = _Fusion(records, config)
    before, target = [index - 1 for index in followers], fusion.important(followers)
    recalls = np.stack([_recall(fusion.members(pair, before), target) for pair in pairs])
    own = [
        _recall(fusion.members(pair, before), fusion.members(pair, followers)) for pair in pairs
    ]
    configured = _recall(fusion.members(fusion.configured, before), target)
    return LayerSearch(
        pairs=np.array(pairs),
        names=[names[pair] for pair in pairs],
        recall=recalls.mean(axis=1),
        own_recall=np.mean(own, axis=1),
        configured=fusion.configured,
        configured_recall=float(configured.mean()),
        tokens=fusion.tokens,
        best=int(recalls.mean(axis=1).argmax()),
        gain=gain_of(lambda q: recalls[recalls[:, q].mean(axis=1).argmax()], configured),
    )


class _Fusion:
    """Sets of patches that layers name, all of one size: else a pair that agrees less would win.

    Attributes:
        configured: the configured layers, of this decoder.
        tokens: the size, that of the configured layers' V_global on average.
    """

    def __init__(self, records: Sequence[QueryScores], config: PruneConfig):
        self._config = config
        self._scores = torch.stack([record.scores for record in records])  # [Q, L, V, N]
        self._ranks = all_ranks(self._scores)
        self._confidence = torch.stack([record.confidence for record in records])
        depth = self._scores.shape[1]
        self.configured = scale_layers(config.global_layers, depth, first=1)
        k = k_budget(config, fine=False).k_global
        size: float = k
        if config.global_fusion == 'union':
            size = (self._of(self._ranks, self.configured).amin(dim=1) < k).sum(-1).float().mean()
        self.tokens = max(round(float(size)), 1)

    def members(self, layers: Sequence[int], queries: Sequence[int]) -> Tensor:
        """[Q, V, N] bool: the best patches of these layers, at these queries."""
        if self._config.global_fusion == 'mean':
            return self._best(self._of(self._scores, layers)[list(queries)].mean(dim=1))
        ranks = self._of(self._ranks, layers)[list(queries)]
        # Equally ranked in their best layers: the other layers decide.
        return self._best(-ranks.amin(dim=1) - ranks.mean(dim=1) / (2 * ranks.shape[-1]))

    def important(self, queries: Sequence[int]) -> Tensor:
        """[Q, V, N] bool: the best patches by omega_rank omega_conf (Eqs. 5, 6, 8).

        differs: summed over the layers after static pruning, and ranked by the heads' mean.
        """
        rows, config = list(queries), self._config
        ranks = self._ranks[rows, STATIC_LAYER:]
        weight = torch.sigmoid(-config.rank_slope * (ranks + config.rank_base))
        if config.layer_weight == 'entropy':
            weight = weight * self._confidence[rows, STATIC_LAYER:, None, None]
        return self._best(weight.sum(dim=1))

    def _best(self, key: Tensor) -> Tensor:
        best = key.topk(min(self.tokens, key.shape[-1]), dim=-1).indices
        return torch.zeros_like(key, dtype=torch.bool).scatter_(-1, best, True)

    @staticmethod
    def _of(values: Tensor, layers: Sequence[int]) -> Tensor:
        return values[:, [layer - 1 for layer in layers]]


def _recall(foreseen: Tensor, important: Tensor) -> np.ndarray:
    """[Q] mean over cameras of Eq. 1, of [Q, V, N] each."""
    return scores.recall(foreseen, important).mean(dim=-1).double().numpy()


def config_layer(layer: int, depth: int, preferred: Sequence[int] = ()) -> int | None:
    """The name of one layer in the numbering of 32 layers: the inverse of `scale_layers`.

    Args:
        layer: 1-based, of a decoder of `depth` layers.
        depth: decoder layers.
        preferred: names to take if they mean this layer.

    Returns:
        None when no name means it (a decoder of more than 32 layers).
    """
    nearest = layer * DECODER_DEPTH / depth
    names = sorted(range(1, DECODER_DEPTH + 1), key=lambda name: abs(name - nearest))
    meant = (n for n in (*preferred, *names) if scale_layers((n,), depth, first=1) == (layer,))
    return next(meant, None)


def config_layers(
    layers: Sequence[int], depth: int, preferred: Sequence[int] = ()
) -> tuple[int, ...] | None:
    """Names of several ascending layers, or None; `scale_layers` of them gives the layers back."""
    names = tuple(config_layer(layer, depth, preferred) for layer in layers)
    if None in names or scale_layers(names, depth, first=1) != tuple(layers):
        return None
    return names


def all_ranks(scores_of: Tensor) -> Tensor:
    """Rank of every patch in its row, 0 for the best; equal scores rank by index.

    Args:
        scores_of: [..., N].
    """
    order = scores_of.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(order.shape[-1], dtype=torch.float32).expand(order.shape)
    return torch.empty(order.shape).scatter_(-1, order, ranks)
