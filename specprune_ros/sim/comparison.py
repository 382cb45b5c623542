"""What episodes say of methods: rates with their intervals, and paired comparisons."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specprune_ros.sim.evaluate import LATER, Result
from specprune_ros.sim.summary import wilson_interval


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A method on one task, or on all.

    Attributes:
        task: its name; '' for all.
        method: its name.
        episodes: how many.
        successes: of them.
        low, high: 95 % interval of the success rate (Wilson).
        steps: of the successful ones, mean; NaN without.
        latency_ms: of a query, median over episodes.
        kept, static, fine, action_error: see Result, means.
        object_static, object_kept, flops, recall_static, recall_kept, fallback: likewise, of the
            episodes that have them.
        won, lost: episodes that only this method, or only the reference, solved; None for the
            reference itself.
        p_value: two-sided, of the exact test on these; None likewise.
    """

    task: str
    method: str
    episodes: int
    successes: int
    low: float
    high: float
    steps: float
    latency_ms: float
    kept: float
    static: float
    fine: float
    action_error: float
    object_static: float
    object_kept: float
    flops: float
    recall_static: float
    recall_kept: float
    fallback: float
    won: int | None
    lost: int | None
    p_value: float | None


def compare(results: Sequence[Result], reference: str) -> list[Cell]:
    """Cells of all tasks together, then per task; methods in the order in which they appear.

    Args:
        results: episodes.
        reference: method that others are paired with.
    """
    methods = list(dict.fromkeys(one.method for one in results))
    tasks = sorted({one.task for one in results})
    groups = [('', results)]
    if len(tasks) > 1:
        groups += [(task, [one for one in results if one.task == task]) for task in tasks]
    return [_cell(task, some, method, reference) for task, some in groups for method in methods]


def _cell(task: str, results: Sequence[Result], method: str, reference: str) -> Cell:
    mine = [one for one in results if one.method == method]
    successes = sum(one.success for one in mine)
    low, high = wilson_interval(successes, len(mine))
    won = lost = p_value = None
    if method != reference:
        won, lost = discordant(mine, [one for one in results if one.method == reference])
        p_value = mcnemar(won, lost)
    return Cell(
        task=task,
        method=method,
        episodes=len(mine),
        successes=successes,
        low=low,
        high=high,
        steps=_mean([one.steps for one in mine if one.success]),
        latency_ms=float(np.median([one.latency_ms for one in mine])) if mine else math.nan,
        kept=_mean([one.kept for one in mine]),
        static=_mean([one.static for one in mine]),
        fine=_mean([one.fine for one in mine]),
        action_error=_mean([one.action_error for one in mine]),
        **{name: _mean_known([getattr(one, name) for one in mine]) for name in LATER},
        won=won,
        lost=lost,
        p_value=p_value,
    )


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _mean_known(values: Sequence[float]) -> float:
    return _mean([value for value in values if not math.isnan(value)])


def discordant(mine: Sequence[Result], theirs: Sequence[Result]) -> tuple[int, int]:
    """Episodes that only the first, and only the second solved, of those that both ran."""
    other = {(one.task, one.seed): one.success for one in theirs}
    pairs = [
        (one.success, other[one.task, one.seed]) for one in mine if (one.task, one.seed) in other
    ]
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def mcnemar(won: int, lost: int) -> float:
    """Two-sided p-value of the hypothesis that either method is as likely to win an episode.

    Args:
        won, lost: discordant pairs, either way.

    Source: McNemar 1947, in its exact form: a binomial test with probability one half.
    """
    count = won + lost
    tail = sum(math.comb(count, k) for k in range(min(won, lost) + 1))
    return min(1.0, 2.0 * tail / 2**count)
