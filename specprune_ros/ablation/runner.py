"""Run studies on a task: every distinct configuration once per seed, whatever studies share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from specprune_ros.ablation.panel import Panel, QueryFigures
from specprune_ros.ablation.studies import DENSE, Study
from specprune_ros.ablation.task import Task
from specprune_ros.bench.latency import environment
from specprune_ros.config import PolicyConfig, PruneConfig
from specprune_ros.errors import ConfigError
from specprune_ros.models import load, pick_device
from specprune_ros.models.base import ModelInfo, VLAModel
from specprune_ros.policy import Policy


@dataclass(frozen=True, eq=False, kw_only=True)
class Ablation:
    """What was run, and all that was measured.

    Attributes:
        studies: what was varied.
        base: the configuration that the variants change.
        task: its name.
        closed_loop: whether the variants' own actions were executed.
        model: which answered.
        seeds: that were run.
        seed_meaning: what they changed.
        environment: hardware and versions.
        figures: configuration -> QueryFigures of all seeds, one after another.
        outcomes: configuration -> what the task says of every episode, with its seed.
    """

    studies: tuple[Study, ...]
    base: PruneConfig
    task: str
    closed_loop: bool
    model: ModelInfo
    seeds: tuple[int, ...]
    seed_meaning: str
    environment: Mapping[str, str]
    figures: Mapping[PruneConfig, list[QueryFigures]]
    outcomes: Mapping[PruneConfig, list[Mapping[str, float]]]


def base_of(pruning: PruneConfig) -> PruneConfig:
    """What the variants change: the configuration without a guard.

    The guard's checks answer with dense actions, which would hide what pruning does.

    Raises:
        ConfigError: not SpecPrune-VLA, which is what the studies vary.
    """
    if pruning.method != 'specprune':
        raise ConfigError('pruning.method', pruning.method, "the studies vary 'specprune'")
    return dataclasses.replace(pruning, guard_every=0)


def configurations(studies: Sequence[Study], base: PruneConfig) -> list[PruneConfig]:
    """The dense model, then every distinct variant.

    Raises:
        ConfigError: a variant does not fit the base.
    """
    dense = dataclasses.replace(base, **DENSE)
    variants = [variant.configured(base) for study in studies for variant in study.variants]
    return list(dict.fromkeys([dense, *variants]))


def run_ablation(
    model: VLAModel,
    config: PolicyConfig,
    task: Task,
    studies: Sequence[Study],
    *,
    seeds: int,
    tick: Callable[[], None] = lambda: None,
) -> Ablation:
    """Run every variant with every seed.

    With stand-in weights a seed draws the weights (model.seed and the following ones), with a
    checkpoint it is the task's.

    Args:
        model: as the configuration names it.
        config: all axes; pruning is the base of the variants.
        task: what to go through.
        studies: what to vary.
        seeds: how many.
        tick: called after every observation, see `ticks`.

    Raises:
        ConfigError: bad parameters, CUDA graphs asked for, or the task has fewer seeds.
        RecordingError: see RecordingTask.run.
    """
    if config.model.cuda_graph == 'on':
        raise ConfigError('model.cuda_graph', 'on', 'a replayed query has no stages to compare')
    config = _with_model(config, cuda_graph='off')
    base = base_of(config.pruning)
    keys = configurations(studies, base)
    figures = {key: [] for key in keys}
    outcomes = {key: [] for key in keys}
    info = model.info
    if not info.stand_in and seeds > task.seeds:
        raise ConfigError('--seeds', seeds, f'{task.name} has only {task.seeds} different ones')
    used = [index + (config.model.seed if info.stand_in else 0) for index in range(seeds)]
    for seed in used:
        if info.stand_in and seed != config.model.seed:
            model = load(_with_model(config, seed=seed))
        panels = _panels(
            model, config, base, keys, closed_loop=task.closed_loop, seed=seed, tick=tick
        )
        for measured, panel in panels:
            ends = list(task.run(panel, 0 if info.stand_in else seed))
            for key in measured:
                figures[key] += panel.figures[key]
                outcomes[key] += [{'seed': seed, **end} for end in ends]
    return Ablation(
        studies=tuple(studies),
        base=base,
        task=task.name,
        closed_loop=task.closed_loop,
        model=info,
        seeds=tuple(used),
        seed_meaning='draws the random weights' if info.stand_in else task.seed_meaning,
        environment=environment(pick_device(config.model.device)),
        figures=figures,
        outcomes=outcomes,
    )


def ticks(task: Task, studies: Sequence[Study], base: PruneConfig, seeds: int) -> int:
    """How often `run_ablation` will tick, an estimate."""
    runs = len(configurations(studies, base)) if task.closed_loop else 1
    return task.queries * seeds * runs


def _with_model(config: PolicyConfig, **values: object) -> PolicyConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **values))


def _warm_policy(model: VLAModel, config: PolicyConfig, pruning: PruneConfig) -> Policy:
    policy = Policy(model, dataclasses.replace(config, pruning=pruning))
    policy.warm_up()
    return policy


def _panels(
    model: VLAModel,
    config: PolicyConfig,
    base: PruneConfig,
    keys: Sequence[PruneConfig],
    *,
    closed_loop: bool,
    seed: int,
    tick: Callable[[], None],
) -> Iterator[tuple[list[PruneConfig], Panel]]:
    """Configurations to measure and their panel: all in one, or each alone beside dense."""
    dense = keys[0]
    for measured in [[key] for key in keys] if closed_loop else [list(keys)]:
        members = dict.fromkeys([dense, *measured])
        panel = Panel(
            {key: _warm_policy(model, config, key) for key in members},
            dense=dense,
            ruler=_warm_policy(model, config, dataclasses.replace(base, dense_every=1)),
            lead=measured[0],
            seed=seed,
            tick=tick,
        )
        yield measured, panel
