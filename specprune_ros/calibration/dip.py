"""Hartigan's dip: does one mode explain a sample?"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DIP_LEVELS = np.geomspace(0.02, 200.0, 64)  # densities of the dip, in units of 1 / spread
NULL_STEPS, NULL_SAMPLES = 400, 199  # of the dip's null distribution
AT_ONCE = 10  # null samples


def dip_statistic(sample: np.ndarray) -> np.ndarray:
    """Hartigan's dip: the least distance of the empirical distribution to a unimodal one.

    Args:
        sample: [..., n], any order.

    Returns:
        [...] half the most that a second interval adds to the excess mass, which is the dip
        (Mueller and Sawitzki 1991), over the density levels DIP_LEVELS.
    """
    _, _, one, two = _excess_masses(np.sort(sample, axis=-1))
    gain = np.maximum(two.max(axis=-1) - one[..., -1], 0.0)
    return gain.max(axis=-1) / 2


def sparse_stretch(sample: np.ndarray) -> tuple[float, float]:
    """Where two modes part, if there are two: what lies between the dip's two intervals.

    Args:
        sample: [n], any order.

    Returns:
        The highest value of the lower interval and the lowest of the upper one.
    """
    x = np.sort(sample)
    opening, closing, one, two = _excess_masses(x)
    level = int(np.argmax(two.max(axis=-1) - one[..., -1]))
    opening, closing, one, two = (each[level] for each in (opening, closing, one, two))
    end = 1 + int(two.argmax())
    start = 1 + int((one[:-1] - opening[1:])[:end].argmax())
    first = int((closing - np.minimum.accumulate(opening))[:start].argmax())
    return float(x[first]), float(x[start])


def _excess_masses(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of one and of two intervals, per level, among the first values of x [..., n], ascending.

    Returns:
        [..., levels, n] what an interval that starts at a value subtracts, what one that ends
        there adds, the most that one interval has by then, and [..., levels, n - 1] that two have.
    """
    x = x[..., None, :]
    n = x.shape[-1]
    low, high = np.quantile(x, (0.01, 0.99), axis=-1, keepdims=True)
    level = DIP_LEVELS[:, None] / np.maximum(high - low, np.finfo(float).tiny)
    opening = np.arange(n) / n - level * x
    closing = opening + 1 / n
    one = np.maximum.accumulate(closing - np.minimum.accumulate(opening, axis=-1), axis=-1)
    two = np.maximum.accumulate(one[..., :-1] - opening[..., 1:], axis=-1) + closing[..., 1:]
    return opening, closing, one, two


def dip_p_value(dip: float, counts: np.ndarray, edges: np.ndarray, seed: int = 0) -> float:
    """Share of samples of the likeliest unimodal distribution whose dip is at least as large.

    A uniform distribution, which is the hardest one, would take many a real valley for chance.

    Args:
        dip: of the sample.
        counts: [K] of the sample in bins.
        edges: [K + 1] of the bins.
        seed: of the samples.

    Source: the dip calibrated by resampling, as Cheng and Hall (1998); differs: the unimodal
    distribution is that of maximum likelihood.
    """
    steps = int(counts.sum())
    size = min(steps, NULL_STEPS)
    mass = unimodal_mass(counts, np.diff(edges))
    below = np.pad(np.cumsum(mass), (1, 0))
    ranks = np.random.default_rng(seed).random((NULL_SAMPLES, size))
    samples = np.interp(ranks, below / below[-1], edges)
    parts = np.split(samples, range(AT_ONCE, NULL_SAMPLES, AT_ONCE))
    null = np.concatenate([dip_statistic(part) for part in parts])
    # A dip by chance shrinks at least with the root of the number of steps.
    scaled = dip * math.sqrt(steps / size)
    return float((1 + (null >= scaled).sum()) / (1 + NULL_SAMPLES))


def unimodal_mass(counts: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The likeliest mass in bins of a density that rises up to one of them and falls from there.

    Args:
        counts: [K] observations in the bins.
        widths: [K] of the bins.

    Returns:
        [K], as much in all as the counts.
    """
    rising = _rising_likelihoods(counts, widths)
    falling = _rising_likelihoods(counts[::-1], widths[::-1])[::-1]
    top = int(np.argmax(rising + falling))
    up = _rise(counts[:top], widths[:top])
    down = _rise(counts[top:][::-1], widths[top:][::-1])[::-1]
    return np.concatenate((up, down)) * widths


def _rise(counts: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """[K] the likeliest density that never falls."""
    blocks: list[tuple[float, float, int]] = []
    for count, width in zip(counts, widths, strict=True):
        _pool(blocks, count, width)
    return np.repeat([c / w for c, w, _ in blocks], [size for *_, size in blocks])


def _rising_likelihoods(counts: Sequence[float], widths: Sequence[float]) -> np.ndarray:
    """[K + 1] log-likelihood of the density that never falls over the first 0..K bins."""
    blocks: list[tuple[float, float, int]] = []
    sums, found = [0.0], [0.0]
    for count, width in zip(counts, widths, strict=True):
        _pool(blocks, count, width)
        del sums[len(blocks) :]
        count, width, _ = blocks[-1]
        sums.append(sums[-1] + (count * math.log(count / width) if count else 0.0))
        found.append(sums[-1])
    return np.array(found)


def _pool(blocks: list[tuple[float, float, int]], count: float, width: float) -> None:
    """Append a bin; neighbours that would fall become one block (pool adjacent violators)."""
    size = 1
    while blocks and blocks[-1][0] * width >= count * blocks[-1][1]:
        former = blocks.pop()
        count, width, size = count + former[0], width + former[1], size + former[2]
    blocks.append((count, width, size))
