"""The formulas of SpecPrune-VLA as pure functions on tensors.

None of them synchronises with the host. Letters: V cameras, N patches per camera, H heads,
T query rows, M visual tokens that are still alive. Source: SpecPrune-VLA v3.
"""

from __future__ import annotations

import torch
from torch import Tensor

ENTROPY_EPS = 1e-6  # epsilon of Eq. 8


def patch_similarity(current: Tensor, reference: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosine similarity of raw RGB patches of two frames.

    Args:
        current: [V, Y, X, 3] uint8, the images that the model sees.
        reference: the same shape and type, T control steps earlier.
        grid: (rows, cols) of patches; must divide Y and X.

    Returns:
        [V, N] float32 in 0..1; two black patches are equal (1), a black and another one are not
        (0).

    Raises:
        ValueError: the shapes differ, or the grid does not divide them.

    Source: section 4.1.2, Sim(P_m, P_n).
    """
    if current.shape != reference.shape:
        raise ValueError(f'frames {tuple(current.shape)} and {tuple(reference.shape)} differ')
    cameras, height, width, channels = current.shape
    rows, cols = grid
    if height % rows or width % cols:
        raise ValueError(f'grid {grid} does not divide a frame of {height} x {width}')
    shape = (cameras, rows, height // rows, cols, width // cols * channels)
    a, b = current.view(shape).float(), reference.view(shape).float()
    dot, aa, bb = ((p * q).sum(dim=(2, 4)) for p, q in ((a, b), (a, a), (b, b)))
    norms = (aa * bb).sqrt()
    similarity = torch.where(norms > 0, dot / norms.clamp_min(1.0), (aa == bb).float())
    return similarity.flatten(1)


def attention_score(attention: Tensor) -> Tensor:
    """How much the text attends to each visual token, or the reverse (Eq. 2).

    Args:
        attention: [H, T, M] probabilities of the text's rows at the visual columns; or the
            transpose's, [H, T, M] with the visual rows' probabilities at the text's columns.

    Returns:
        [M] float32, mean over heads and text tokens.

    differs: Eq. 2 takes the image's rows; text rows are the default, since in a causal model the
        image comes first and attends to no text.
    """
    return attention.float().mean(dim=(0, 1))


def attention_entropy(attention: Tensor) -> Tensor:
    """Mean entropy of the text's attention over the image (Eq. 7).

    Args:
        attention: [H, T, M] probabilities of the text's rows at the visual columns.

    Returns:
        [] float32, in nats.

    differs: heads are averaged and rows renormalised over the image first; raw weights of a layer
        that ignores the image would give an entropy near 0 and with it the highest confidence.
    """
    rows = attention.float().mean(dim=0)
    rows = rows / rows.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return -torch.special.xlogy(rows, rows).sum(dim=-1).mean()


def layer_confidence(entropy: Tensor) -> Tensor:
    """omega_conf = 1 / (H + eps), any shape (Eq. 8)."""
    return 1.0 / (entropy + ENTROPY_EPS)


def rank_weight(attention: Tensor, slope: float, base: int = 0) -> Tensor:
    """Rank-based weight of every visual token (Eq. 6).

    Args:
        attention: [H, M] score of each token in each head.
        slope: k > 0.
        base: rank of the best token, 0 or 1.

    Returns:
        [M] float32, sums to 1: per head sigma(-k rank) normalised, then the mean over heads. Equal
        scores rank by index.

    differs: the paper gives neither k nor the base; 0.1 and 0 are our choice.
    """
    order = attention.argsort(dim=-1, descending=True, stable=True)
    weight = torch.sigmoid(
        -slope * torch.arange(base, base + order.shape[-1], device=order.device)
    )
    weight = weight / weight.sum()
    ranked = torch.empty(order.shape, dtype=weight.dtype, device=order.device)
    return ranked.scatter_(-1, order, weight.expand(order.shape)).mean(dim=0)


def ema(previous: Tensor, score: Tensor, rate: float) -> Tensor:
    """S <- (1 - beta) S + beta s (Eq. 9)."""
    return (1.0 - rate) * previous + rate * score


def top_k_rank(scores: Tensor, k: int) -> Tensor:
    """Rank of the k best per row, 0 first; infinity for all others.

    Args:
        scores: [V, N]; -inf marks what cannot be chosen.
        k: how many per row; more than N means all.

    Returns:
        [V, N] float32. Equal scores rank by index.
    """
    k = min(k, scores.shape[-1])
    order = scores.argsort(dim=-1, descending=True, stable=True)[:, :k]
    ranks = torch.arange(k, dtype=torch.float32, device=scores.device).expand(len(scores), k)
    out = torch.full(scores.shape, torch.inf, device=scores.device)
    out.scatter_(-1, order, ranks)
    return out.masked_fill(scores.isneginf(), torch.inf)


def changed_patches(similarity: Tensor, threshold: float, k: int) -> Tensor:
    """V_dynamic: the k least similar of the patches below a threshold (Eqs. 3-4).

    Args:
        similarity: [V, N].
        threshold: tau.
        k: K_dynamic.

    Returns:
        [V, N] bool.
    """
    candidates = (-similarity).masked_fill(similarity >= threshold, -torch.inf)
    return top_k_rank(candidates, k).isfinite()


def recall(previous: Tensor, current: Tensor) -> Tensor:
    """|V_{t-1} n V_t| / |V_t| per camera (Eq. 1).

    Args:
        previous, current: [V, N] bool, the important sets of two consecutive queries.

    Returns:
        [V] float32; NaN where the current set is empty.
    """
    size = current.sum(dim=-1)
    common = (previous & current).sum(dim=-1)
    return (common / size.clamp_min(1)).masked_fill(size == 0, torch.nan)
