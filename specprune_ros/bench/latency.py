"""Dense against pruned in several forms, interleaved in one run, on the same inputs and weights.

A query is timed end to end: from uint8 camera images on the host to un-normalised actions on the
host. Coarse and fine mode are mixed 1:1. Figures are ratios within one run; absolute times speak
of the machine named beside them only.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from specprune_ros import __version__
from specprune_ros.bench.ceilings import Ceilings, floors_s, measure_ceilings
from specprune_ros.bench.variants import DENSE, Lineup, Variant, execute_chunk, scene
from specprune_ros.form_error import FormError, form_error
from specprune_ros.policy import Policy
from specprune_ros.timing import PRUNING
from specprune_ros.types import PruneReport

LEFT_OUT = 3  # first queries of the episode: dense, then one of either mode, which graphs record
# Stage -> what the clock tells apart (timing). Scores and selection are parts of the decoder's
# time, the comparison of images is one of preprocessing's, the record of what went of the head's.
LAPS = {
    'preprocess': ('preprocess', 'similarity'),
    'vision': ('vision',),
    'projector': ('projector', 'embed'),
    'decoder': ('decode', 'score', 'select', 'gather'),
    'scores': ('score',),
    'selection': ('select', 'gather'),
    'head': ('act', 'trace'),
    'graph': ('graph',),
}
TOTAL = 'total'
OF_PRUNING = ('scores', 'selection')  # a dense model has none
IN_GRAPH = ('vision', 'projector', 'decoder')  # what a replayed query does in one piece
# Forms whose actions are compared with the plain form's, whatever a method does.
COMPARED = ('graph', 'compile', 'int8', 'fp8')
PLAIN = 'fused'
PLAIN_SETTINGS = {
    'attention': 'sdpa', 'fused': True, 'compile': False, 'quantization': 'none',
    'cuda_graph': 'off',
}  # fmt: skip
COMPARED_QUERIES = 6


@dataclass(frozen=True)
class Row:
    """One line of the result; times in milliseconds. None: unknown, or it means nothing there.

    Attributes:
        method, form, cameras, stage: what was timed; a pruned variant's form names its budget.
        median_ms, p95_ms: over the queries.
        ratio_to_dense_sdpa: median of dense / this over paired queries; 0 where the dense model
            has no such stage.
        ratio_low, ratio_high: quartiles of the same.
        kept_static, kept_final: share of visual tokens left by static and by all pruning.
        flops_share: of the decoder, by the model of A.3, against the dense decoder.
        against_flops: this decoder's time / (dense time in the same form x flops_share); None
            where the dense decoder's is not known, for a graph was replayed.
        floor_ms: least time by the measured ceilings.
        time_to_floor: median / floor.
        action_error_mean, action_error_max: absolute difference of normalised actions to the plain
            form with the same pruning.
    """

    method: str
    form: str
    cameras: int
    stage: str
    median_ms: float
    p95_ms: float
    ratio_to_dense_sdpa: float
    ratio_low: float
    ratio_high: float
    kept_static: float
    kept_final: float
    flops_share: float
    against_flops: float | None
    floor_ms: float | None
    time_to_floor: float | None
    action_error_mean: float | None
    action_error_max: float | None


@dataclass(frozen=True, eq=False)
class Sample:
    """One query of one variant.

    Attributes:
        report: what it did.
        laps_s: stage or part of it -> seconds.
        controller_s: seconds spent on the executed actions of its chunk.
    """

    report: PruneReport
    laps_s: dict[str, float]
    controller_s: float

    def seconds(self, stage: str) -> float:
        """Of a stage, or of the whole query."""
        if stage == TOTAL:
            return self.report.latency_total_s
        return sum(self.laps_s[lap] for lap in LAPS[stage])

    def dense_seconds(self, stage: str) -> float:
        """Of an unrecorded dense query: what another one's stage is compared with."""
        if stage == 'graph':  # all between the model's images and its actions
            return sum(map(self.seconds, IN_GRAPH))
        return 0.0 if stage in OF_PRUNING else self.seconds(stage)


@dataclass(frozen=True)
class Part:
    """What one part of pruning costs: median time, and its share of the dense inference."""

    method: str
    name: str
    cameras: int
    form: str
    median_ms: float
    share_of_dense: float


@dataclass(frozen=True, eq=False)
class Result:
    """One number of cameras, measured.

    Attributes:
        lineup: what was compared.
        samples: [variants][repeats].
        ceilings: of the machine, the best of before and after.
        floors_s: [variants] stage -> least seconds; see ceilings.floors_s.
        errors: index of variant -> of its actions, for the forms that are compared.
    """

    lineup: Lineup
    samples: list[list[Sample]]
    ceilings: Ceilings
    floors_s: list[dict[str, float]]
    errors: dict[int, FormError]


def run(lineup: Lineup, repeats: int) -> Result:
    """Measure all variants of a lineup, interleaved."""
    variants = lineup.variants
    # A fused decoder multiplies in the largest pieces, which is the fairer ceiling.
    fused = next((v for v in variants if v.form == PLAIN), variants[0])
    tokens = sequence_tokens(fused)
    ceilings = measure_ceilings(fused, tokens)
    samples = [list(column) for column in zip(*measure(variants, repeats), strict=True)]
    ceilings = ceilings.best_of(measure_ceilings(fused, tokens))
    floors = [
        floors_s(variant, [sample.report for sample in mine], ceilings)
        for variant, mine in zip(variants, samples, strict=True)
    ]
    errors = {i: error_of(v) for i, v in enumerate(variants) if v.form in COMPARED}
    return Result(lineup, samples, ceilings, floors, errors)


def sequence_tokens(variant: Variant) -> int:
    """Length of the decoder's unpruned sequence."""
    policy, info = variant.policy, variant.policy.model.info
    policy.reset()
    return policy.infer(scene(info.cameras, 0, info.proprio_dim)).report.sequence_tokens


def measure(variants: Sequence[Variant], repeats: int) -> Iterator[list[Sample]]:
    """Query all variants in turn, again and again, beginning with another one each time.

    Yields:
        Per repeat one sample per variant. The first queries of the episode are left out.
    """
    info = variants[0].policy.model.info
    for variant in variants:
        variant.policy.reset()
    for step in range(repeats + LEFT_OUT):
        observation = scene(info.cameras, step, info.proprio_dim)
        samples: list[Sample | None] = [None] * len(variants)
        for turn in range(len(variants)):
            index = (turn + step) % len(variants)
            policy = variants[index].policy
            report = policy.infer(observation).report
            laps = policy.last_laps_s
            start = time.perf_counter()
            execute_chunk(policy, observation, step)
            samples[index] = Sample(report, laps, time.perf_counter() - start)
        if step >= LEFT_OUT:
            yield samples


def error_of(variant: Variant) -> FormError:
    """How far a variant's actions are from the plain form's, along an episode in both modes."""
    policy, info = variant.policy, variant.policy.model.info
    model = dataclasses.replace(policy.config.model, **PLAIN_SETTINGS)
    plain = Policy(policy.model, dataclasses.replace(policy.config, model=model))
    observations = [
        scene(info.cameras, step, info.proprio_dim) for step in range(COMPARED_QUERIES)
    ]
    return form_error(policy, plain, observations, after=execute_chunk)


# What came of it -------------------------------------------------------------------------------


def rows_of(result: Result) -> list[Row]:
    """Medians, percentiles, paired ratios and floors of every stage that a variant has."""
    return [
        _row(result, index, stage)
        for index, variant in enumerate(result.lineup.variants)
        for stage in (*LAPS, TOTAL)
        if not (variant.method == DENSE and stage in OF_PRUNING)
        and all(sample.seconds(stage) > 0 for sample in result.samples[index])
    ]


def _row(result: Result, index: int, stage: str) -> Row:
    variant, samples = result.lineup.variants[index], result.samples[index]
    reports = [sample.report for sample in samples]
    mine = np.array([sample.seconds(stage) for sample in samples])
    dense = [sample.dense_seconds(stage) for sample in result.samples[0]]
    low, middle, high = np.percentile(np.array(dense) / mine, (25, 50, 75))
    floor = result.floors_s[index].get(stage)
    error = result.errors.get(index)
    total = sum(int(report.tokens_total.sum()) for report in reports)
    return Row(
        method=variant.method,
        form=variant.label,
        cameras=variant.cameras,
        stage=stage,
        median_ms=1e3 * float(np.median(mine)),
        p95_ms=1e3 * float(np.percentile(mine, 95)),
        ratio_to_dense_sdpa=float(middle),
        ratio_low=float(low),
        ratio_high=float(high),
        kept_static=sum(int(report.tokens_static.sum()) for report in reports) / total,
        kept_final=sum(int(report.tokens_kept.sum()) for report in reports) / total,
        flops_share=float(np.mean([report.flops_share for report in reports])),
        against_flops=_against_flops(result, index) if stage == 'decoder' else None,
        floor_ms=None if floor is None else 1e3 * floor,
        time_to_floor=None if floor is None else float(np.median(mine)) / floor,
        action_error_mean=None if error is None else error.mean,
        action_error_max=None if error is None else error.largest,
    )


def _against_flops(result: Result, index: int) -> float | None:
    """See `Row.against_flops`."""
    variants = result.lineup.variants
    form = variants[index].form
    dense = next(i for i, v in enumerate(variants) if (v.method, v.form) == (DENSE, form))
    if dense == index or not result.samples[dense][0].seconds('decoder'):
        return None
    pairs = zip(result.samples[index], result.samples[dense], strict=True)
    return float(
        np.median(
            [
                mine.seconds('decoder') / (base.seconds('decoder') * mine.report.flops_share)
                for mine, base in pairs
            ]
        )
    )


def breakdown(result: Result) -> list[Part]:
    """What every part of pruning costs, of each pruned variant whose stages can be told apart.

    The reference frame is what preprocessing takes longer than the dense model's.
    """
    parts = []
    for variant, samples in zip(result.lineup.variants, result.samples, strict=True):
        if variant.method != DENSE and samples[0].seconds('decoder') > 0:
            parts += _parts(variant, samples, result.samples[0])
    return parts


def _parts(variant: Variant, samples: list[Sample], dense: list[Sample]) -> list[Part]:
    total_ms = 1e3 * float(np.median([sample.seconds(TOTAL) for sample in dense]))
    spent = {
        'reference frame': [
            ours.laps_s['preprocess'] - base.laps_s['preprocess']
            for ours, base in zip(samples, dense, strict=True)
        ],
        **{name: [sample.laps_s[name] for sample in samples] for name in PRUNING},
        'controller': [sample.controller_s for sample in samples],
    }
    spent['all'] = list(np.sum([values for values in spent.values()], axis=0))
    parts = []
    for name, seconds in spent.items():
        median = 1e3 * float(np.median(seconds))
        parts.append(
            Part(variant.method, name, variant.cameras, variant.label, median, median / total_ms)
        )
    return parts


def environment(device: torch.device) -> dict[str, str]:
    """Hardware and versions."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name()
    return {
        'hardware': name,
        'specprune': __version__,
        'threads': str(torch.get_num_threads()),
        'python': platform.python_version(),
        'torch': torch.__version__,
        'transformers': transformers.__version__,
    }


def cpu_name() -> str:
    """The processor's model name."""
    try:
        with open('/proc/cpuinfo') as lines:
            for line in lines:
                if line.startswith('model name'):
                    return line.partition(':')[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
