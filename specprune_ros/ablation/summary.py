"""From the figures of all queries to one estimate per variant and figure, with its spread."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from specprune_ros.ablation.panel import QueryFigures
from specprune_ros.ablation.runner import Ablation
from specprune_ros.ablation.studies import Study, Variant
from specprune_ros.errors import RecordingError

RESAMPLES = 2000
LEVEL = 0.95
QUARTILES = (25, 75)
INTERVAL = (
    'Means over all seeds and queries but the first query of an episode, which is dense in every '
    f'variant, ± half of their {100 * LEVEL:.0f} % interval: a bootstrap ({RESAMPLES} resamples) '
    'that draws seeds, and independently of them blocks of neighbouring queries, the same ones '
    'for all seeds, since neighbours are alike and all seeds see the same episode. Latencies are '
    'medians with quartiles; x is the median of the ratios dense / variant, each on one '
    'observation in one run. Variants of several studies with the same configuration are one run.'
)


@dataclass(frozen=True)
class Figure:
    """A measured figure, as tables show it.

    Attributes:
        name: field of QueryFigures.
        heading: of its column.
        meaning: for a reader of the files.
        scale: by which the tables multiply it.
        digits: decimals in the tables.
        median: the estimate is the median with quartiles, not the mean with its interval.
    """

    name: str
    heading: str
    meaning: str
    scale: float = 100.0
    digits: int = 1
    median: bool = False


FIGURES = (
    Figure('static_share', 'static %', 'visual tokens left after static pruning'),
    Figure('final_share', 'final %', 'visual tokens left after the last layer'),
    Figure('flops_share', 'FLOPs %', "decoder FLOPs, of the dense decoder's (A.3)"),
    Figure(
        'recall',
        'Eq. 1 %',
        "recall of the variant's own important tokens (Eq. 1); survivors only are scored, which "
        'raises it in pruned runs',
    ),
    Figure(
        'recall_supplemented',
        '7.2 %',
        'recall against V_t supplemented by V_local and V_dynamic (7.2)',
    ),
    Figure(
        'kept_static',
        'kept, static %',
        "share of the dense model's important tokens of the same observation (V_global of the "
        'base configuration) that static pruning retained',
    ),
    Figure('kept_final', 'kept, final %', 'the same, retained to the last layer'),
    Figure(
        'action_error',
        'error, e-3',
        'mean absolute difference to the dense normalised actions on the same observation, 1/1000',
        1000.0,
    ),
    Figure(
        'action_error_max', 'worst, e-3', 'its greatest element, mean over queries, 1/1000', 1000.0
    ),
    Figure('decode_ms', 'decode ms', 'latency of the decoder', 1.0, 1, True),
    Figure('decode_ratio', 'decode x', 'dense / variant, decoder', 1.0, 2, True),
    Figure('total_ms', 'total ms', 'latency from uint8 images to actions', 1.0, 1, True),
    Figure('total_ratio', 'total x', 'dense / variant, end to end', 1.0, 2, True),
)


@dataclass(frozen=True)
class Estimate:
    """A figure of a variant over all seeds and queries; NaN where it is not known.

    Attributes:
        value: mean, or median of a latency.
        low, high: 95 % interval of the mean, or quartiles.
        least, greatest: of single queries.
        count: how many know it.
    """

    value: float
    low: float
    high: float
    least: float
    greatest: float
    count: int


@dataclass(frozen=True)
class VariantSummary:
    """A row of a table.

    Attributes:
        variant: which.
        estimates: figure -> Estimate.
        by_seed: seed -> figure -> mean or median of that seed alone.
        modes: mode -> share of the queries.
        budgets: that pruned, in order of first use.
        outcomes: the task's, per episode.
    """

    variant: Variant
    estimates: Mapping[str, Estimate]
    by_seed: Mapping[int, Mapping[str, float]]
    modes: Mapping[str, float]
    budgets: tuple[str, ...]
    outcomes: Sequence[Mapping[str, float]]


def summarize(ablation: Ablation, study: Study) -> list[VariantSummary]:
    """One summary per variant of a study.

    Raises:
        RecordingError: no query came after the first of an episode.
    """
    return [summarize_variant(ablation, variant) for variant in study.variants]


def summarize_variant(ablation: Ablation, variant: Variant) -> VariantSummary:
    """All figures of one variant.

    Raises:
        RecordingError: no query came after the first of an episode.
    """
    key = variant.configured(ablation.base)
    rows = [row for row in ablation.figures[key] if not row.first]
    if not rows:
        raise RecordingError(
            ablation.task, 'has one query per episode, dense in every variant: nothing to compare'
        )
    seeds = {seed: [row for row in rows if row.seed == seed] for seed in ablation.seeds}
    modes = Counter(row.mode for row in rows)
    return VariantSummary(
        variant=variant,
        estimates={f.name: estimate(by_query(rows, f.name), f.median) for f in FIGURES},
        by_seed={
            seed: {f.name: centre(column(mine, f.name), f.median) for f in FIGURES}
            for seed, mine in seeds.items()
        },
        modes={mode: count / len(rows) for mode, count in modes.most_common()},
        budgets=tuple(dict.fromkeys(row.budget for row in rows if row.budget)),
        outcomes=ablation.outcomes[key],
    )


def column(rows: Sequence[QueryFigures], name: str) -> np.ndarray:
    """[n] one figure of all rows."""
    return np.array([getattr(row, name) for row in rows], float)


def by_query(rows: Sequence[QueryFigures], name: str) -> np.ndarray:
    """[S, Q] one figure by seed and query; NaN where a seed has no such query."""
    seeds = {seed: index for index, seed in enumerate(dict.fromkeys(row.seed for row in rows))}
    queries = {query: index for index, query in enumerate(sorted({row.query for row in rows}))}
    values = np.full((len(seeds), len(queries)), np.nan)
    for row in rows:
        values[seeds[row.seed], queries[row.query]] = getattr(row, name)
    return values


def centre(values: np.ndarray, median: bool) -> float:
    """Mean or median of what is finite; NaN without any."""
    known = values[np.isfinite(values)]
    if not known.size:
        return math.nan
    return float(np.median(known) if median else known.mean())


def estimate(values: np.ndarray, median: bool) -> Estimate:
    """Centre and spread of [S, Q] values."""
    known = values[np.isfinite(values)]
    if not known.size:
        return Estimate(*[math.nan] * 5, count=0)
    low, high = np.percentile(known, QUARTILES) if median else mean_interval(values)
    return Estimate(
        value=centre(values, median),
        low=float(low),
        high=float(high),
        least=float(known.min()),
        greatest=float(known.max()),
        count=known.size,
    )


def mean_interval(values: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of a mean over seeds and queries.

    Seeds are drawn with replacement, and so, independently, are circular blocks of about the cube
    root of Q queries, the same ones for every seed (Owen 2007, the pigeonhole bootstrap, with
    blocks for the order in time). Seeds share observations and neighbouring queries share
    images, so drawing single values would give an interval that is too narrow. With one seed it
    says nothing of other seeds.

    Args:
        values: [S, Q] in the order of time; NaN is unknown, at least one is not.
    """
    seeds, queries = values.shape
    rng = np.random.default_rng(0)
    block = max(round(queries ** (1 / 3)), 1)
    starts = rng.integers(queries, size=(RESAMPLES, math.ceil(queries / block)))
    drawn = (starts[..., None] + np.arange(block)).reshape(RESAMPLES, -1)[:, :queries] % queries
    by_seed = _times_drawn(rng.integers(seeds, size=(RESAMPLES, seeds)), seeds)
    by_query = _times_drawn(drawn, queries)
    known = np.isfinite(values)
    total = ((by_seed @ np.where(known, values, 0.0)) * by_query).sum(axis=1)
    count = ((by_seed @ known) * by_query).sum(axis=1)
    means = total[count > 0] / count[count > 0]
    low, high = np.percentile(means, (50 * (1 - LEVEL), 50 * (1 + LEVEL)))
    return float(low), float(high)


def _times_drawn(drawn: np.ndarray, size: int) -> np.ndarray:
    """[B, n] indices -> [B, size] how often each was drawn."""
    flat = drawn + size * np.arange(len(drawn))[:, None]
    return np.bincount(flat.ravel(), minlength=size * len(drawn)).reshape(len(drawn), size)
