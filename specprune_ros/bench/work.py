"""Cost against work: time of a query over cameras, patches per camera and alpha.

The stand-ins' towers are built for images of other sizes, so that a whole query has the patches
asked for. K_global, K_local and K_dynamic count patches, whatever there are; the budget 'fixed'
keeps the same share of few and of many.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from specprune_ros.bench.latency import measure
from specprune_ros.bench.variants import DENSE, Variant, in_form, with_cameras
from specprune_ros.config import PolicyConfig
from specprune_ros.errors import ConfigError
from specprune_ros.models import pick_device
from specprune_ros.models.tiny import SIZES, build

PATCHES = (64, 144, 256, 400, 576)  # per camera: squares, as grids are
ALPHAS = (0.4, 0.6, 0.8, 1.0)
BUDGET = 'fixed'


@dataclass(frozen=True)
class Point:
    """One setting, measured; times in milliseconds.

    Attributes:
        method, form: what ran.
        cameras, patches: images, and patches of each.
        alpha: of the pruning; None for the dense model.
        tokens: visual tokens before pruning.
        kept_final: share of them left by all pruning, mean.
        flops_share: of the decoder, by the model of A.3.
        decoder_ms: median; None where the query is one recorded piece.
        total_ms: median of whole queries.
        decoder_ratio, total_ratio: median of dense / this over paired queries.
    """

    method: str
    form: str
    cameras: int
    patches: int
    alpha: float | None
    tokens: int
    kept_final: float
    flops_share: float
    decoder_ms: float | None
    total_ms: float
    decoder_ratio: float | None
    total_ratio: float


def sweep(
    config: PolicyConfig,
    *,
    cameras: Sequence[int],
    patches: Sequence[int] = PATCHES,
    alphas: Sequence[float] = ALPHAS,
    form: str,
    repeats: int,
) -> Iterator[Point]:
    """Measure every number of cameras with every number of patches, dense and with every alpha.

    Args:
        config: of a stand-in, with the pruning method.
        cameras: each 1 to 4.
        patches: per camera; squares.
        alphas: prune ratios.
        form: a key of models.forms.FORMS, for dense and pruned alike.
        repeats: queries per setting.

    Raises:
        ConfigError: the model is no stand-in, or a number of patches is no square.
    """
    if config.model.name not in SIZES:
        raise ConfigError(
            'model.name', config.model.name, f'a sweep needs one of {", ".join(SIZES)}'
        )
    for count in patches:
        if math.isqrt(count) ** 2 != count:
            raise ConfigError('--patches', count, 'must be a square')
    for number in cameras:
        for count in patches:
            yield from points_of(
                variants_at(with_cameras(config, number), count, alphas, form), repeats
            )


def variants_at(
    config: PolicyConfig, patches: int, alphas: Sequence[float], form: str
) -> list[Variant]:
    """Dense, then one variant per alpha, over one model."""
    gc.collect()  # policies refer to themselves: the last point's weights would stay
    side = math.isqrt(patches)
    sizes = SIZES[config.model.name].with_grid(side)
    model = build(config, pick_device(config.model.device), sizes)
    variants = [in_form(model, config, DENSE, form)]
    for alpha in alphas:
        pruning = dataclasses.replace(config.pruning, alpha=alpha)
        pruned = dataclasses.replace(config, pruning=pruning)
        variants.append(in_form(model, pruned, config.pruning.method, form, BUDGET))
    return variants


def points_of(variants: Sequence[Variant], repeats: int) -> list[Point]:
    """Measure variants over one model, interleaved; the first one is dense."""
    samples = list(zip(*measure(variants, repeats), strict=True))
    return [_point(*pair, samples[0]) for pair in zip(variants, samples, strict=True)]


def _point(variant: Variant, samples: Sequence, dense: Sequence) -> Point:
    policy, reports = variant.policy, [sample.report for sample in samples]
    grid = policy.model.info.grid
    times = {
        stage: np.array([[s.seconds(stage) for s in those] for those in (samples, dense)])
        for stage in ('decoder', 'total')
    }
    staged = (times['decoder'] > 0).all()
    total = sum(int(report.tokens_total.sum()) for report in reports)
    return Point(
        method=variant.method,
        form=variant.label,
        cameras=variant.cameras,
        patches=grid[0] * grid[1],
        alpha=None if variant.method == DENSE else policy.config.pruning.alpha,
        tokens=variant.cameras * grid[0] * grid[1],
        kept_final=sum(int(report.tokens_kept.sum()) for report in reports) / total,
        flops_share=float(np.mean([report.flops_share for report in reports])),
        decoder_ms=1e3 * float(np.median(times['decoder'][0])) if staged else None,
        total_ms=1e3 * float(np.median(times['total'][0])),
        decoder_ratio=_ratio(times['decoder']) if staged else None,
        total_ratio=_ratio(times['total']),
    )


def _ratio(times: np.ndarray) -> float:
    return float(np.median(times[1] / times[0]))


def work_table(points: Sequence[Point]) -> str:
    """Every setting on a line."""
    lines = [
        f'{"cams":>4} {"patches":>7} {"tokens":>6} {"alpha":>6} {"kept %":>6} {"FLOPs":>6} '
        f'{"decoder ms":>10} {"dense/this":>10} {"total ms":>9} {"dense/this":>10}'
    ]
    for p in points:
        alpha = 'dense' if p.alpha is None else f'{p.alpha:g}'
        decoder = '' if p.decoder_ms is None else f'{p.decoder_ms:.2f}'
        ratio = '' if p.decoder_ratio is None else f'{p.decoder_ratio:.2f}x'
        lines.append(
            f'{p.cameras:>4} {p.patches:>7} {p.tokens:>6} {alpha:>6} {100 * p.kept_final:>6.1f} '
            f'{100 * p.flops_share:>5.1f}% {decoder:>10} {ratio:>10} {p.total_ms:>9.2f} '
            f'{p.total_ratio:>9.2f}x'
        )
    return '\n'.join(lines)
