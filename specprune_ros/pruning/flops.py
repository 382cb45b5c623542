"""What pruning saves: the FLOPs model of SpecPrune-VLA A.3, for any depth and schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def layer_flops(tokens: float, width: int, mlp_width: int) -> float:
    """4 L D^2 + 2 L^2 D + 2 L D M + L M of one decoder layer (A.3).

    Args:
        tokens: L, rows of the hidden states.
        width: D.
        mlp_width: M, inner width of the MLP.
    """
    return (
        4 * tokens * width**2
        + 2 * tokens**2 * width
        + 2 * tokens * width * mlp_width
        + tokens * mlp_width
    )


def tokens_per_layer(total: int, depth: int, gone_after: Mapping[int, int]) -> list[int]:
    """Rows that every layer computes.

    Args:
        total: tokens of the unpruned sequence.
        depth: decoder layers.
        gone_after: 1-based layer -> tokens that left after it.

    Returns:
        [depth] counts; the layer after which tokens leave still computes them (Eq. 12).
    """
    counts, alive = [], total
    for layer in range(1, depth + 1):
        counts.append(alive)
        alive -= gone_after.get(layer, 0)
    return counts


def scheduled_tokens(
    total: float,
    depth: int,
    *,
    static_share: float,
    static_layer: int,
    prune_layers: Sequence[int],
    keep_ratio: float,
) -> list[float]:
    """Rows per layer as A.3 plans them, the whole sequence shrinking alike.

    Args:
        total: L.
        depth: H.
        static_share: L_r / L.
        static_layer: after which static pruning happens.
        prune_layers: S, 1-based, pruned after.
        keep_ratio: gamma.
    """
    counts, alive = [], float(total)
    for layer in range(1, depth + 1):
        counts.append(alive)
        if layer == static_layer:
            alive *= static_share
        if layer in prune_layers:
            alive *= keep_ratio
    return counts


def flops_share(counts: Sequence[float], *, width: int, mlp_width: int) -> float:
    """FLOPs of a decoder with these rows per layer, as a share of the dense decoder's.

    Args:
        counts: rows per layer; the first layer sees all.
        width, mlp_width: D and M.
    """
    dense = len(counts) * layer_flops(counts[0], width, mlp_width)
    return sum(layer_flops(count, width, mlp_width) for count in counts) / dense


def linear_share(counts: Sequence[float]) -> float:
    """The same with FLOPs taken as proportional to rows, as A.3 does for its 0.44 and 0.37."""
    return sum(counts) / (len(counts) * counts[0])
