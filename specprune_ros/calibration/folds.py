"""What a choice made on this recording is worth on queries that did not take part in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

LEAST_QUERIES = 6
RESAMPLES = 500


@dataclass(frozen=True)
class Gain:
    """Recall gained over the configured parameters.

    Attributes:
        queries: consecutive pairs of queries that were compared.
        in_sample: where the choice was made, so flattered by it.
        held_out: chosen on one half of the recording and measured on the other, both ways; what
            to expect.
        interval: 95 % interval of `in_sample` from resampled queries.
    """

    queries: int
    in_sample: float
    held_out: float
    interval: tuple[float, float]

    @property
    def worth_it(self) -> bool:
        """Whether the choice still gains where it was not made."""
        return self.queries >= LEAST_QUERIES and self.held_out > 0.0


def gain_of(
    choose: Callable[[np.ndarray], np.ndarray], configured: np.ndarray, seed: int = 0
) -> Gain:
    """Compare a choice with what is configured.

    Args:
        choose: makes the choice by the queries of these indices [q], and returns its recall at
            all queries [Q].
        configured: [Q] recall of the configured parameters.
        seed: of the resampling.
    """
    queries = np.arange(len(configured))
    gains = choose(queries) - configured
    drawn = np.random.default_rng(seed).integers(0, len(gains), (RESAMPLES, len(gains)))
    low, high = np.percentile(gains[drawn].mean(axis=1), (2.5, 97.5))
    held_out = 0.0
    if len(queries) > 1:  # halves in time: neighbours are alike, and would give the answer away
        halves = np.array_split(queries, 2)
        for half, other in (halves, halves[::-1]):
            held_out += (choose(half) - configured)[other].sum() / len(queries)
    return Gain(len(queries), float(gains.mean()), float(held_out), (float(low), float(high)))
