"""Demonstrations of the expert, by several processes, interrupted and gone on with at will."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from specprune_ros.sim.dataset import (
    Attempt,
    Episode,
    Recipe,
    append_attempt,
    episode_path,
    open_dataset,
    write_episode,
)
from specprune_ros.sim.expert import Expert
from specprune_ros.sim.libero import LiberoEnv
from specprune_ros.sim.placement import seed_stream
from specprune_ros.sim.state import SimState
from specprune_ros.sim.tasks import SimTask, find_task, skill_of
from specprune_ros.sim.workers import in_workers


class Environment(Protocol):
    """What acting and watching need; LiberoEnv has it."""

    task: SimTask
    instruction: str
    success: bool

    def reset(self, seed: int, split: str) -> SimState:
        """Begin an episode."""

    def step(self, action: np.ndarray) -> SimState:
        """One control step."""

    def images(self) -> Mapping[str, np.ndarray]:
        """Render every camera."""


class TaughtEnvironment(Environment, Protocol):
    """What a demonstration needs besides: answers that a network is to learn."""

    def pixels(self, names: Sequence[str]) -> np.ndarray:
        """[V, O, 2] where places appear in these images."""


@dataclass
class _Log:
    """What becomes an episode."""

    images: list[np.ndarray] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)
    frame_steps: list[int] = field(default_factory=list)
    states: list[SimState] = field(default_factory=list)
    actions: list[np.ndarray] = field(default_factory=list)
    executed: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True, eq=False, kw_only=True)
class Demonstration:
    """What one attempt gave.

    Attributes:
        episode: all of it, solved or not.
        success: LIBERO's check after the last action.
        retries: see Expert.
        noisy: whether noise was added.
    """

    episode: Episode
    success: bool
    retries: int
    noisy: bool


def demonstrate(env: TaughtEnvironment, seed: int, recipe: Recipe) -> Demonstration:
    """Let the expert do a task once.

    Noise moves the robot, but not the labels: the expert's next actions show how to get back.
    Source: noise injection, Laskey et al. 2017 (DART), with a fixed level.

    Args:
        env: of a task that the expert knows.
        seed: of the episode; it draws the layout and, apart from that, the noise.
        recipe: what to record.

    Raises:
        ConfigError: the expert does not know the task, or the environment refuses the seed.
    """
    rng = seed_stream(seed, split=f'{recipe.split} noise', task=env.task.name)
    noisy = bool(rng.random() < recipe.noisy_share and recipe.noise > 0)
    expert, log = Expert(skill_of(env.task)), _Log()
    state = env.reset(seed, recipe.split)
    while not expert.done and state.step < env.task.max_steps:
        action = expert.act(state)
        executed = action.copy()
        if noisy:  # little where the expert is slow, as at the grasp
            executed[:3] += rng.normal(0.0, recipe.noise, 3) * np.linalg.norm(action[:3])
        if state.step % recipe.every == 0:
            images = env.images()
            log.frame_steps.append(state.step)
            log.images.append(np.stack([images[name] for name in recipe.cameras]))
            log.pixels.append(env.pixels(sorted(state.places)))
        log.states.append(state)
        log.actions.append(action)
        log.executed.append(np.clip(executed, -1.0, 1.0))
        state = env.step(executed)
    return Demonstration(
        episode=_episode(env, seed, recipe, log),
        success=expert.done and env.success,
        retries=expert.retries,
        noisy=noisy,
    )


def _episode(env: Environment, seed: int, recipe: Recipe, log: _Log) -> Episode:
    names = sorted(log.states[0].places)
    places = [[state.places[name] for name in names] for state in log.states]
    proprio = [state.proprio(recipe.proprio_names) for state in log.states]
    return Episode(
        task=env.task.name,
        seed=seed,
        instruction=env.instruction,
        frame_steps=np.array(log.frame_steps, np.int32),
        images=np.stack(log.images),
        proprio=np.array(proprio, np.float32),
        actions=np.array(log.actions, np.float32),
        executed=np.array(log.executed, np.float32),
        place_names=np.array(names),
        places=np.array(places, np.float32),
        pixels=np.array(log.pixels, np.float32),
    )


def attempt_episode(folder: Path, recipe: Recipe, task: str, seed: int) -> Attempt:
    """Demonstrate once, and keep the episode if it succeeded.

    Raises:
        ConfigError, MissingDependencyError: see LiberoEnv.
    """
    env = _environment(task, recipe.cameras, recipe.size, recipe.detail_m)
    started = time.perf_counter()
    done = demonstrate(env, seed, recipe)
    path = episode_path(folder, task, seed)
    size = write_episode(path, done.episode) if done.success else 0
    return Attempt(
        task=task,
        seed=seed,
        success=done.success,
        steps=len(done.episode.actions),
        frames=len(done.episode.frame_steps),
        retries=done.retries,
        noisy=done.noisy,
        seconds=round(time.perf_counter() - started, 3),
        bytes=size,
    )


@functools.lru_cache(maxsize=1)  # building one takes seconds; jobs come ordered by task
def _environment(task: str, cameras: tuple[str, ...], size: int, detail_m: float) -> LiberoEnv:
    return LiberoEnv(task, cameras=cameras, size=size, detail_m=detail_m)


def jobs_of(tasks: Sequence[str], episodes: int) -> list[tuple[str, int]]:
    """Every task with seeds 0..episodes-1.

    Raises:
        ConfigError: there is no such task, or the expert does not know it.
    """
    for name in tasks:
        skill_of(find_task(name))
    return [(name, seed) for name in tasks for seed in range(episodes)]


def collect(
    folder: Path, recipe: Recipe, jobs: Sequence[tuple[str, int]], *, workers: int
) -> Iterator[Attempt]:
    """Make the attempts that a dataset lacks.

    Args:
        folder: of the dataset; made if it is not there.
        recipe: of the dataset.
        jobs: task and seed of every attempt that it is to have.
        workers: processes; 0 works in this one.

    Yields:
        every attempt when it is written: those of earlier runs first, then new ones as they end.

    Raises:
        ConfigError: the folder holds another dataset; see also LiberoEnv.
    """
    wanted = set(jobs)
    before = open_dataset(folder, recipe)
    yield from (attempt for attempt in before if (attempt.task, attempt.seed) in wanted)
    done = {(attempt.task, attempt.seed) for attempt in before}
    todo = [job for job in jobs if job not in done]
    work = functools.partial(attempt_episode, folder, recipe)
    for attempt in in_workers(work, todo, workers):
        append_attempt(folder, attempt)
        yield attempt
