"""Success in closed loop: tasks x methods x seeds, paired, parallel, interrupted and gone on with.

Every method meets the same episodes. A method is `NAME` or `NAME:FIELD=VALUE,...`, fields of
PruneConfig; a condition changes what the policy is given, to find out what it needs.

    <folder>/evaluation.json     what all episodes share: `Plan`
    <folder>/episodes.csv        one line per episode: `Result`
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import yaml

from specprune_ros.ablation.task import Driven
from specprune_ros.config import PolicyConfig, PruneConfig
from specprune_ros.config_files import load_config
from specprune_ros.errors import ConfigError, RecordingError
from specprune_ros.images import CameraImage
from specprune_ros.recall import kept_recall
from specprune_ros.shipped import PARAMS, PREFIX, find_checkpoint
from specprune_ros.sim.closed_loop import LiberoTask, check_robot
from specprune_ros.sim.conditions import CONDITIONS
from specprune_ros.sim.film import Filmed
from specprune_ros.sim.found import share_left
from specprune_ros.sim.libero import LiberoEnv
from specprune_ros.sim.tasks import SKILLS, find_task
from specprune_ros.sim.workers import in_workers
from specprune_ros.types import ExecutedAction, Mode, Observation, PolicyResult, PruneReport

PLAN, EPISODES = 'evaluation.json', 'episodes.csv'
DENSE = 'dense'
RULER = 'specprune:dense_every=1'  # dense as well, and says what it finds important


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all episodes of a folder share.

    Attributes:
        params: parameter files; one of a shipped checkpoint by its name.
        overrides: flat names -> values, over the files.
        weights: SHA-256 of the checkpoint's files: another training is another evaluation.
        size: height and width of the rendered images, px.
        condition: a key of CONDITIONS.
        open_loop_steps: see LiberoTask.
    """

    params: tuple[str, ...]
    overrides: Mapping[str, object]
    size: int
    condition: str = 'normal'
    open_loop_steps: int = 0
    weights: str = ''

    def policy_config(self) -> PolicyConfig:
        """The configuration that methods change the pruning of.

        Raises:
            ConfigError: a file, name or value is bad.
        """
        return load_config(
            [find_checkpoint(n) if n.startswith(PREFIX) else n for n in self.params],
            self.overrides,
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """One episode.

    Attributes:
        task, method: names.
        seed: of the initial state.
        success: LIBERO's check.
        steps: control steps until success or the end.
        queries: of the policy.
        latency_ms: median of them, end to end but for the simulator's rendering; the first one
            left out where there are more.
        kept: share of the visual tokens after the last layer; this and what follows are means over
            all queries but the first, which is dense with a method that compares queries, where
            there are more.
        static: the same after static pruning.
        fine: share of the queries in fine mode.
        action_error: mean absolute difference from what a dense inference on the same observation
            gives, in the units of the actions (-1..1 in LIBERO).
        object_static, object_kept: share left of the patches around the object to pick, after
            static pruning and at the end, of the queries in which a camera has it in its view,
            hidden or not; NaN for a task that the expert does not know.
        flops: of the decoder, as a share of the dense one's (A.3).
        recall_static, recall_kept: share left of the patches that a dense inference on the same
            observation finds important, after static pruning and at the end, see
            `recall.kept_recall`.
        fallback: share of the queries that ran dense because pruning failed: they are not the
            method's, and should be none.
    """

    task: str
    method: str
    seed: int
    success: bool
    steps: int
    queries: int
    latency_ms: float
    kept: float
    static: float
    fine: float
    action_error: float
    object_static: float
    object_kept: float
    flops: float = math.nan
    recall_static: float = math.nan
    recall_kept: float = math.nan
    fallback: float = math.nan


# Fields that a ledger of before does not have.
LATER = ('object_static', 'object_kept', 'flops', 'recall_static', 'recall_kept', 'fallback')

Job = tuple[str, str, int]  # task, method, seed


def pruning_of(method: str, base: PruneConfig) -> PruneConfig:
    """The pruning that a method's name stands for.

    Args:
        method: 'dense', a method's name, or one with fields: 'specprune:alpha=0.6,budget=fixed'.
        base: what the fields change.

    Raises:
        ConfigError: no such method or field, or a bad value.
    """
    from specprune_ros.pruning import make_method

    name, _, text = method.partition(':')
    changes: dict[str, object] = {'method': 'none' if name == DENSE else name, 'guard_every': 0}
    for part in filter(None, text.split(',')):
        field, equals, value = part.partition('=')
        known = {f.name for f in dataclasses.fields(PruneConfig)}
        if not equals or field not in known:
            raise ConfigError('--method', method, f'{part!r} is no field of pruning=value')
        changes[field] = yaml.safe_load(value)
        if isinstance(getattr(base, field), float) and type(changes[field]) is int:
            changes[field] = float(changes[field])
    pruning = dataclasses.replace(base, **changes)
    make_method(pruning)
    return pruning


@dataclass(frozen=True, eq=False)
class Query:
    """One inference of an episode.

    Attributes:
        report: its report.
        seconds: end to end, without what was rendered while it looked at images.
        error: mean absolute difference of its actions from the dense ones; 0 where nobody asked.
        left: share of the object's patches after static pruning and at the end, or NaN.
        recall: likewise of the patches that the dense model finds important; 1 where nobody asked.
    """

    report: PruneReport
    seconds: float
    error: float
    left: tuple[float, float]
    recall: tuple[float, float]


class Conditioned:
    """A policy that is given something else than what there is, and whose queries are noted.

    Args:
        policy: that acts.
        condition: a key of CONDITIONS.
        task: its name.
        dense: is asked the same, to compare, and says what is important; None: nobody is.
        rendering_s: how long the simulator has rendered so far.
        found: of a query's report, what `found.share_left` says.

    Attributes:
        queries: since the reset.
    """

    def __init__(
        self,
        policy: Driven,
        condition: str,
        task: str,
        dense: Driven | None = None,
        rendering_s: Callable[[], float] = lambda: 0.0,
        found: Callable[[PruneReport], tuple[float, float]] = lambda report: (np.nan, np.nan),
    ):
        self._policy, self._dense = policy, dense
        self._rendering_s, self._found = rendering_s, found
        self._condition = CONDITIONS[condition]
        self._task = task
        self.queries: list[Query] = []

    @property
    def config(self) -> PolicyConfig:
        """The policy's."""
        return self._policy.config

    def reset(self) -> None:
        """A new episode begins."""
        self._policy.reset()
        self.queries.clear()

    def infer(self, observation: Observation) -> PolicyResult:
        """One query."""
        given = self._condition.given(observation, self._task)
        before_s = self._rendering_s()
        result = self._policy.infer(given)
        seconds = result.report.latency_total_s - (self._rendering_s() - before_s)
        error, recall = 0.0, (1.0, 1.0)
        if self._dense is not None:
            dense = self._dense.infer(given)
            error = float(np.abs(result.chunk.data - dense.chunk.data).mean())
            recall = kept_recall(result.report, dense.report.important)
        left = self._found(result.report)
        self.queries.append(Query(result.report, seconds, error, left, recall))
        return result

    def observe_executed(
        self,
        action: ExecutedAction | None,
        images: Mapping[str, np.ndarray | CameraImage] | None = None,
    ) -> bool:
        """One control step was executed."""
        seen = None if images is None else self._condition.seen(images)
        return self._policy.observe_executed(action, seen)


# Episodes ---------------------------------------------------------------------------------------


def run_episode(plan: Plan, job: Job, film: Path | None = None) -> Result:
    """One episode of one method.

    Args:
        plan: what all share.
        job: which one.
        film: video to write of it.

    Raises:
        ConfigError, MissingDependencyError, CheckpointError: see LiberoEnv and Policy.load.
        ObservationError, ActionError: see Policy.infer.
    """
    task, method, seed = job
    config = plan.policy_config()
    env = _environment(task, config.robot.camera_names, plan.size)
    env.disturb(CONDITIONS[plan.condition].scene, seed)
    episode = LiberoTask(env, config.robot, plan.open_loop_steps)
    dense = None if method == DENSE else _policy(_Frozen(plan), RULER)
    policy = Conditioned(
        _policy(_Frozen(plan), method),
        plan.condition,
        task,
        dense,
        rendering_s=lambda: env.rendering_s,
        found=functools.partial(_found, episode),
    )
    with contextlib.ExitStack() as stack:
        driven = stack.enter_context(Filmed(policy, film)) if film else policy
        (end,) = episode.run(driven, seed)
    return result_of(job, end, policy)


def _found(episode: LiberoTask, report: PruneReport) -> tuple[float, float]:
    """What is left of the object to pick, in the state that the query saw."""
    task = episode.env.task.name
    if task not in SKILLS:
        return np.nan, np.nan
    return share_left(report, episode.centres(SKILLS[task].pick), episode.env.size)


def result_of(job: Job, end: Mapping[str, float], policy: Conditioned) -> Result:
    """The line of an episode.

    Args:
        job: which one.
        end: 'success' and 'steps'.
        policy: with its queries, at least one.
    """
    task, method, seed = job
    later = policy.queries[1:] or policy.queries
    reports = [query.report for query in later]
    total = [report.tokens_total.sum() for report in reports]
    object_static, object_kept = _mean_shares([query.left for query in later])
    recall_static, recall_kept = _mean_shares([query.recall for query in later])
    return Result(
        task=task,
        method=method,
        seed=seed,
        success=bool(end['success']),
        steps=int(end['steps']),
        queries=len(policy.queries),
        latency_ms=round(1e3 * float(np.median([query.seconds for query in later])), 3),
        kept=_mean([r.tokens_kept.sum() / n for r, n in zip(reports, total, strict=True)]),
        static=_mean([r.tokens_static.sum() / n for r, n in zip(reports, total, strict=True)]),
        fine=_mean([r.mode == Mode.FINE for r in reports]),
        action_error=_mean([query.error for query in later]),
        object_static=object_static,
        object_kept=object_kept,
        flops=_mean([report.flops_share for report in reports]),
        recall_static=recall_static,
        recall_kept=recall_kept,
        fallback=_mean([report.mode == Mode.FALLBACK for report in reports]),
    )


def _mean_shares(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of the pairs that are known; NaN without any."""
    known = [pair for pair in pairs if np.isfinite(pair).all()]
    if not known:
        return math.nan, math.nan
    first, second = (_mean(values) for values in zip(*known, strict=True))
    return first, second


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), 5)


@dataclass(frozen=True, eq=False)
class _Frozen:
    """A plan as a key of a cache: overrides are a dict."""

    plan: Plan

    def _key(self) -> str:
        return json.dumps(dataclasses.asdict(self.plan), sort_keys=True)

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self._key() == other._key()


@functools.lru_cache(maxsize=1)
def _model(frozen: _Frozen):
    from specprune_ros.models import load

    return load(frozen.plan.policy_config())


@functools.lru_cache(maxsize=2)  # the method's and the dense one
def _policy(frozen: _Frozen, method: str) -> Driven:
    from specprune_ros.policy import Policy

    config = frozen.plan.policy_config()
    pruning = pruning_of(method, config.pruning)
    policy = Policy(_model(frozen), dataclasses.replace(config, pruning=pruning))
    policy.warm_up()
    return policy


@functools.lru_cache(maxsize=1)  # building one takes seconds; jobs come ordered by task
def _environment(task: str, cameras: tuple[str, ...], size: int) -> LiberoEnv:
    return LiberoEnv(task, cameras=cameras, size=size)


def jobs_of(tasks: Sequence[str], methods: Sequence[str], seeds: int) -> list[Job]:
    """Every method on every task with seeds 0..seeds-1.

    Raises:
        ConfigError: no such task, or it has fewer seeds.
    """
    tasks, methods = dict.fromkeys(tasks), dict.fromkeys(methods)
    for name in tasks:
        if seeds > find_task(name).seeds:
            raise ConfigError('--seeds', seeds, f'{name} has only {find_task(name).seeds}')
    return [(task, method, seed) for task in tasks for method in methods for seed in range(seeds)]


def evaluate(
    folder: Path, plan: Plan, jobs: Sequence[Job], *, workers: int, films: int = 0
) -> Iterator[Result]:
    """Run the episodes that a folder lacks.

    Args:
        folder: made if it is not there.
        plan: of the folder.
        jobs: what it is to have.
        workers: processes; 0 works in this one.
        films: of seeds below this, a video goes to <folder>/videos.

    Yields:
        every result when it is written: those of earlier runs first.

    Raises:
        ConfigError: the folder holds another evaluation; see also `run_episode`.
        RecordingError: its ledger is damaged.
    """
    config = plan.policy_config()
    check_robot(config.robot)
    for method in dict.fromkeys(method for _, method, _ in jobs):
        pruning_of(method, config.pruning)
    before = open_folder(folder, plan)
    wanted = set(jobs)
    yield from (one for one in before if (one.task, one.method, one.seed) in wanted)
    done = {(one.task, one.method, one.seed) for one in before}
    todo = [job for job in jobs if job not in done]
    paths = [film_path(folder, job) if job[2] < films else None for job in todo]
    work = functools.partial(run_episode, plan)
    for result in in_workers(work, zip(todo, paths, strict=True), workers):
        append_result(folder, result)
        yield result


def film_path(folder: Path, job: Job) -> Path:
    """Where an episode's video is."""
    task, method, seed = job
    name = re.sub(r'[^\w.=-]+', '_', f'{task} {method} {seed}')
    return folder / 'videos' / f'{name}.mp4'


# On disk ----------------------------------------------------------------------------------------


def open_folder(folder: Path, plan: Plan) -> list[Result]:
    """Make a folder, or go on with one.

    Returns:
        the episodes that were run before.

    Raises:
        ConfigError: it holds another evaluation.
        RecordingError: a line of the ledger is damaged.
    """
    path = folder / PLAN
    text = json.dumps(dataclasses.asdict(plan), indent=2, sort_keys=True, default=list) + '\n'
    if path.exists():
        if _identity(json.loads(path.read_text())) != _identity(json.loads(text)):
            raise ConfigError('--out', str(folder), f'holds another evaluation, see {PLAN}')
        return read_results(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return []


def _identity(plan: dict) -> dict:
    """A plan as JSON without the checkpoint's path: its weights tell which one it is."""
    overrides = dict(plan['overrides'])
    checkpoint = overrides.pop('model.checkpoint', None)
    params = [name for name in plan['params'] if name != f'{checkpoint}/{PARAMS}']
    return {**plan, 'overrides': overrides, 'params': params}


def append_result(folder: Path, result: Result) -> None:
    """Add a line to the ledger."""
    with (folder / EPISODES).open('a', newline='') as file:
        _write(file, [result])


def _rewrite(path: Path, results: Sequence[Result]) -> None:
    """All lines at once or none."""
    partial = path.with_suffix('.partial')
    with partial.open('w', newline='') as file:
        _write(file, results)
    os.replace(partial, path)


def _write(file: TextIO, results: Sequence[Result]) -> None:
    rows = [dataclasses.asdict(one) | {'success': int(one.success)} for one in results]
    writer = csv.DictWriter(file, rows[0], lineterminator='\n')
    if not file.tell():
        writer.writeheader()
    writer.writerows(rows)


def read_results(folder: Path) -> list[Result]:
    """All episodes, in the order in which they ended; half a line at the end is dropped.

    Raises:
        RecordingError: a line is damaged.
    """
    path = folder / EPISODES
    text = path.read_text() if path.exists() else ''
    if text and not text.endswith('\n'):
        text = text[: text.rfind('\n') + 1]
        path.write_text(text)
    rows = csv.DictReader(text.splitlines())
    results = [_result(path, row) for row in rows]
    if results and not set(LATER) <= set(rows.fieldnames or ()):
        _rewrite(path, results)  # lines of now do not fit under a header of before
    return results


def _result(path: Path, row: dict[str, str]) -> Result:
    try:
        whole = {name: int(row[name]) for name in ('seed', 'steps', 'queries')}
        names = ('latency_ms', 'kept', 'static', 'fine', 'action_error')
        real = {name: float(row[name]) for name in names}
        real |= {name: float(row[name]) if name in row else math.nan for name in LATER}
        success = bool(int(row['success']))
        return Result(task=row['task'], method=row['method'], success=success, **whole, **real)
    except (KeyError, TypeError, ValueError) as error:
        raise RecordingError(path, f'has a damaged line {row}: {error}') from error
