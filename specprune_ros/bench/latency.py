"""Dense against pruned, interleaved in one run, on the same inputs and weights.

A query is timed end to end: from uint8 camera images on the host to un-normalised actions on the
host. Coarse and fine mode are mixed 1:1. Figures are ratios within one run; absolute times speak
of the machine named beside them only.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from specprune_ros.config import PolicyConfig
from specprune_ros.models import load
from specprune_ros.policy import Policy
from specprune_ros.timing import PRUNING, STAGES
from specprune_ros.types import ExecutedAction, Observation, PruneReport

DENSE = 'none'
FAST, SLOW = 0.9, 0.1  # executed translation per step: coarse and fine
STEP_NS = 50_000_000
IMAGE_SHAPE = (480, 640, 3)
CAMERAS = ('wrist', 'side', 'overhead', 'front')


@dataclass(frozen=True)
class Variant:
    """One thing to time: a method in a form."""

    method: str
    form: str
    policy: Policy


@dataclass(frozen=True)
class Row:
    """One line of the result; times in milliseconds, ratios dense / this."""

    method: str
    form: str
    cameras: int
    stage: str
    median_ms: float
    p95_ms: float
    ratio_to_dense_sdpa: float
    ratio_low: float  # 25th percentile of the paired ratios
    ratio_high: float  # 75th
    kept_static: float  # share of visual tokens
    kept_final: float


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


@dataclass(frozen=True)
class Part:
    """What one part of pruning costs: median time, and its share of the dense inference."""

    name: str
    cameras: int
    form: str
    median_ms: float
    share_of_dense: float


def make_variants(config: PolicyConfig, cameras: int) -> list[Variant]:
    """Dense, and SpecPrune with both budgets, all over one model."""
    robot = dataclasses.replace(
        config.robot,
        camera_names=CAMERAS[:cameras],
        camera_topics=(),
        camera_transports=config.robot.camera_transports[:1],
    )
    config = dataclasses.replace(config, robot=robot)
    model = load(config)

    def variant(method: str, budget: str) -> Variant:
        pruning = dataclasses.replace(config.pruning, method=method, budget=budget)
        policy = Policy(model, dataclasses.replace(config, pruning=pruning))
        policy.warm_up()
        return Variant(method, f'sdpa {budget}' if method != DENSE else 'sdpa', policy)

    pruned = config.pruning.method
    budgets = () if pruned == DENSE else ('union', 'fixed')
    return [variant(DENSE, 'union'), *(variant(pruned, budget) for budget in budgets)]


def scene(cameras: tuple[str, ...], step: int, proprio: int) -> Observation:
    """A seeded synthetic scene in which a square moves."""
    images = {}
    for index, name in enumerate(cameras):
        coarse = np.random.default_rng(index).integers(0, 255, (12, 16, 3), np.uint8)
        image = coarse.repeat(IMAGE_SHAPE[0] // 12, axis=0).repeat(IMAGE_SHAPE[1] // 16, axis=1)
        left = (20 * step) % (IMAGE_SHAPE[1] - 80)
        image[200:280, left : left + 80] = (240, 20, 20)
        images[name] = image
    return Observation(
        images=images,
        proprio=np.zeros(proprio) if proprio else None,
        instruction='put the black bowl on the plate',
        stamp_ns=step * STEP_NS,
    )


def executed(policy: Policy, speed: float) -> ExecutedAction:
    """One executed action downwards at a speed, in the robot's own elements."""
    robot = policy.config.robot
    data = np.zeros(len(robot.action_names))
    if robot.translation_names[2] in robot.action_names:
        data[robot.action_names.index(robot.translation_names[2])] = -speed
    return ExecutedAction(
        stamp_ns=0, names=robot.action_names, units=robot.per_action('action_units'), data=data
    )


def measure(variants: list[Variant], repeats: int) -> Iterator[dict[str, Sample]]:
    """Query all variants in turn, again and again.

    Yields:
        Per repeat: form -> sample. The first query of the episode, dense for all, is left out.
    """
    info = variants[0].policy.model.info
    for variant in variants:
        variant.policy.reset()
    for step in range(repeats + 1):
        observation = scene(info.cameras, step, info.proprio_dim)
        samples = {}
        for variant in variants:
            policy = variant.policy
            report = policy.infer(observation).report
            laps = policy.last_laps_s
            action = executed(policy, FAST if step % 2 else SLOW)
            start = time.perf_counter()
            for _ in range(policy.config.robot.horizon):
                policy.observe_executed(action, observation.images)
            samples[variant.form] = Sample(report, laps, time.perf_counter() - start)
        if step:
            yield samples


def breakdown(variants: list[Variant], runs: list[dict[str, Sample]]) -> list[Part]:
    """What every part of pruning costs, of each pruned variant.

    The reference frame is what preprocessing takes longer than the dense model's.
    """
    dense = [run[variants[0].form] for run in runs]
    total_ms = 1e3 * float(np.median([sample.report.latency_total_s for sample in dense]))
    parts = []
    for variant in variants[1:]:
        mine = [run[variant.form] for run in runs]
        spent = {
            'reference frame': [
                ours.laps_s['preprocess'] - base.laps_s['preprocess']
                for ours, base in zip(mine, dense, strict=True)
            ],
            **{name: [sample.laps_s[name] for sample in mine] for name in PRUNING},
            'controller': [sample.controller_s for sample in mine],
        }
        spent['all'] = list(np.sum([values for values in spent.values()], axis=0))
        for name, seconds in spent.items():
            median = 1e3 * float(np.median(seconds))
            cameras = len(variant.policy.model.info.cameras)
            parts.append(Part(name, cameras, variant.form, median, median / total_ms))
    return parts


def rows_of(variants: list[Variant], runs: list[dict[str, Sample]]) -> list[Row]:
    """Medians, percentiles and paired ratios of every stage."""
    rows = []
    for variant in variants:
        reports = [run[variant.form].report for run in runs]
        dense = [run[variants[0].form].report for run in runs]
        total = sum(int(report.tokens_total.sum()) for report in reports)
        kept = [
            sum(int(getattr(report, name).sum()) for report in reports) / total
            for name in ('tokens_static', 'tokens_kept')
        ]
        for stage in (*STAGES, 'total'):
            mine, base = (
                np.array([getattr(report, f'latency_{stage}_s') for report in those]) * 1e3
                for those in (reports, dense)
            )
            ratios = base / mine
            rows.append(
                Row(
                    method=variant.method,
                    form=variant.form,
                    cameras=len(variant.policy.model.info.cameras),
                    stage=stage,
                    median_ms=float(np.median(mine)),
                    p95_ms=float(np.percentile(mine, 95)),
                    ratio_to_dense_sdpa=float(np.median(ratios)),
                    ratio_low=float(np.percentile(ratios, 25)),
                    ratio_high=float(np.percentile(ratios, 75)),
                    kept_static=kept[0],
                    kept_final=kept[1],
                )
            )
    return rows


def environment(device: torch.device) -> dict[str, str]:
    """Hardware and versions."""
    import transformers

    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name()
    return {
        'hardware': name,
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
