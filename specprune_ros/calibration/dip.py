"""Hartigan's dip: does one mode explain a sample?"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

DIP_LEVELS = np.geomspace(0.02, 20.0, 48)  # densities of the dip, in units of 1 / spread
NULL_STEPS, NULL_SAMPLES = 400, 500  # of the dip's simulated null distribution


def dip_statistic(sample: np.ndarray) -> np.ndarray:
    """Hartigan's dip: the least distance of the empirical distribution to a unimodal one.

    Args:
        sample: [..., n], any order.

    Returns:
        [...] half the most that a second interval adds to the excess mass, which is the dip
        (Mueller and Sawitzki 1991), over the density levels DIP_LEVELS.
    """
    x = np.sort(sample, axis=-1)[..., None, :]
    n = x.shape[-1]
    low, high = np.quantile(x, (0.01, 0.99), axis=-1, keepdims=True)
    level = DIP_LEVELS[:, None] / np.maximum(high - low, np.finfo(float).tiny)
    opening = np.arange(n) / n - level * x  # an interval that starts at i subtracts this
    closing = opening + 1 / n  # one that ends at i adds this
    one = closing - np.minimum.accumulate(opening, axis=-1)
    one = np.maximum.accumulate(one, axis=-1)
    two = np.maximum.accumulate(one[..., :-1] - opening[..., 1:], axis=-1) + closing[..., 1:]
    gain = np.maximum(two.max(axis=-1) - one[..., -1], 0.0)
    return gain.max(axis=-1) / 2


def dip_p_value(dip: float, steps: int) -> float:
    """Share of uniform samples, the hardest unimodal ones, whose dip is at least as large."""
    size = min(steps, NULL_STEPS)
    # The dip of a uniform sample shrinks with the root of its size.
    scaled = dip * math.sqrt(steps / size)
    return float((1 + (_null_dips(size) >= scaled).sum()) / (1 + NULL_SAMPLES))


@lru_cache(maxsize=16)
def _null_dips(size: int) -> np.ndarray:
    samples = np.random.default_rng(0).random((NULL_SAMPLES // 10, 10, size))
    return np.concatenate([dip_statistic(some) for some in samples])
