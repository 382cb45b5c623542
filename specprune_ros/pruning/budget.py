"""How many patches stay, and which: the K tables and the two static budgets.

Source: SpecPrune-VLA v3, sections 4.1.3 and A.6.2, Table 8. `fixed` is our own (see select_fixed).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from specprune_ros.config import PruneConfig

DECODER_DEPTH = 32  # layers of the decoder that the paper's layer numbers speak of
STATIC_LAYER = 2  # static pruning follows this layer, at any depth
# Table 8's retention is near linear in alpha: 25.4, 29.8, 34.4 % at 0.6, 0.8, 1.0.
SHARE_INTERCEPT, SHARE_SLOPE = 0.12, 0.225
ROUNDING = 1e-9  # 0.7 * 30 is 20.999999999999996 in floating point, the paper means 21


@dataclass(frozen=True)
class KBudget:
    """K_global, K_local and K_dynamic per camera."""

    k_global: int
    k_local: int
    k_dynamic: int


def k_budget(config: PruneConfig, fine: bool, alpha: float | None = None) -> KBudget:
    """floor(alpha K) of the mode's base values (A.6.2); the configured alpha unless given."""
    alpha = config.alpha if alpha is None else alpha
    local = config.k_local_fine if fine else config.k_local_coarse
    dynamic = config.k_dynamic_fine if fine else config.k_dynamic_coarse
    return KBudget(*(_scaled(alpha, k) for k in (config.k_global, local, dynamic)))


def fixed_count(config: PruneConfig, fine: bool, patches: int, alpha: float | None = None) -> int:
    """Patches that the fixed budget keeps per camera, at the configured alpha unless given.

    The mean of both modes follows Table 8's line; the modes differ by the ratio of their K sums
    (98 to 120 with the paper's K). At alpha 0.8: 27 % coarse, 33 % fine.
    """
    sums = [
        config.k_global
        + 2 * (config.k_local_fine if mode else config.k_local_coarse)
        + (config.k_dynamic_fine if mode else config.k_dynamic_coarse)
        for mode in (False, True)
    ]
    mean = SHARE_INTERCEPT + SHARE_SLOPE * (config.alpha if alpha is None else alpha)
    share = mean * 2 * sums[fine] / max(sum(sums), 1)
    return min(max(math.floor(share * patches + ROUNDING), 1), patches)


def layer_keep_count(ratio: float, tokens: int) -> int:
    """floor(gamma n), at least one (section 5.2)."""
    return max(math.floor(ratio * tokens + ROUNDING), 1)


def scale_layers(layers: tuple[int, ...], depth: int, first: int) -> tuple[int, ...]:
    """Carry layer numbers of a 32-layer decoder to one of another depth, in proportion.

    Args:
        layers: 1-based, ascending.
        depth: decoder layers.
        first: lowest layer allowed.

    Returns:
        Ascending 1-based layers; neighbours that fall together are moved one layer deeper, those
        that then leave the decoder are dropped.
    """
    scaled: list[int] = []
    for layer in layers:
        nearest = math.floor(layer * depth / DECODER_DEPTH + 0.5)
        scaled.append(max(nearest, scaled[-1] + 1 if scaled else first))
    return tuple(layer for layer in scaled if layer <= depth)


def select_union(
    global_set: Tensor, dynamic_set: Tensor, local_set: Tensor
) -> tuple[Tensor, Tensor]:
    """V_retain = V_global u V_dynamic u V_local (section 4.1.3).

    Args:
        global_set, dynamic_set, local_set: [V, N] bool.

    Returns:
        Kept `visual_idx`, ascending [n], and the [V, N] bool of fillers (none here). The size
        depends on the data: one synchronisation.
    """
    keep = global_set | dynamic_set | local_set
    return keep.flatten().nonzero().flatten(), torch.zeros_like(keep)


def select_fixed(
    count: int,
    *,
    global_rank: Tensor,
    dynamic_set: Tensor,
    local_rank: Tensor,
    similarity: Tensor,
    local_score: Tensor,
) -> tuple[Tensor, Tensor]:
    """Exactly `count` patches per camera, the best candidates first.

    Order: wanted by all three sets, by two, by V_dynamic alone (least similar first), by V_global
    or V_local alone (by rank), then the best local scores of the rest.

    Args:
        count: patches per camera.
        global_rank, local_rank: [V, N], rank in the set; infinity outside it.
        dynamic_set: [V, N] bool.
        similarity: [V, N], to the reference frame.
        local_score: [V, N] >= 0, text attention of the first layers.

    Returns:
        Kept `visual_idx`, ascending [V * count], and the [V, N] bool of those kept that no set
        wanted. No synchronisation: the shape is known.

    differs: not in the paper, whose union has a data-dependent size and so costs a host
        synchronisation and a fresh kernel launch sequence per query.
    """
    in_global, in_local = global_rank.isfinite(), local_rank.isfinite()
    votes = in_global.int() + dynamic_set.int() + in_local.int()
    share = local_score / local_score.amax(dim=-1, keepdim=True).clamp_min(1e-30)
    by_rank = 1.0 / (1.0 + torch.minimum(global_rank, local_rank))
    # Tier in the integer part, order within it in a fraction below 1.
    key = (votes + 2.0).masked_fill(votes < 2, 0.0) + 0.99 * share
    key = torch.where((votes == 1) & dynamic_set, 3.0 + 0.49 * (1.0 - similarity), key)
    key = torch.where((votes == 1) & ~dynamic_set, 2.0 + 0.99 * by_rank, key)
    order = key.argsort(dim=-1, descending=True, stable=True)[:, :count]
    cameras, patches = key.shape
    chosen = torch.zeros_like(dynamic_set).scatter_(-1, order, True)
    offset = torch.arange(cameras, device=key.device)[:, None] * patches
    return (order.sort(dim=-1).values + offset).flatten(), chosen & (votes == 0)


def _scaled(alpha: float, k: int) -> int:
    return math.floor(alpha * k + ROUNDING)
