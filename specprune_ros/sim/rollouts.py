"""Still scenes where a policy went: what it does not know yet is what it meets there.

The frames of its own episodes, until an object is lifted or falls over, in the format of
`sim.layouts`: training labels them with what the expert would do from there. Errors that add up
over an episode are seen in no demonstration, because the expert never makes them.

Source: DAgger (Ross et al. 2011), with the labels of `sim.labels` for the expert.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from specprune_ros.ablation.task import Driven
from specprune_ros.config import PolicyConfig
from specprune_ros.config_files import load_config
from specprune_ros.sim.closed_loop import LiberoTask
from specprune_ros.sim.collect import Environment
from specprune_ros.sim.expert import straightening
from specprune_ros.sim.layouts import LayoutRecipe, Layouts, open_layouts, write_shard
from specprune_ros.sim.libero import LiberoEnv
from specprune_ros.sim.state import SimState
from specprune_ros.sim.tasks import BASKET, SHUFFLE, WANTED
from specprune_ros.sim.workers import in_workers

UPRIGHT_M = 0.005  # an object whose height changed by more is lifted, or fell over


class Recorder:
    """An environment that keeps frames of what happens in it, until an object leaves the floor.

    Args:
        env: a shuffled task.
        recipe: what to keep, and how often.
    """

    def __init__(self, env: Environment, recipe: LayoutRecipe):
        self._env, self._recipe = env, recipe
        self._rows: dict[str, list] = {}
        self._heights: dict[str, float] = {}
        self._over = False

    def __getattr__(self, name: str) -> object:
        return getattr(self._env, name)

    def reset(self, seed: int, split: str = 'eval') -> SimState:
        """Begin an episode, always of the training split: what is kept is learnt from."""
        state = self._env.reset(seed, 'train')
        self._rows = {name: [] for name in ('images', 'proprio', 'turn', 'places', 'pixels')}
        self._heights, self._over = self._heights_of(state), False
        self._keep(state)
        return state

    def step(self, action: np.ndarray) -> SimState:
        """One control step."""
        state = self._env.step(action)
        changes = [abs(z - self._heights[name]) for name, z in self._heights_of(state).items()]
        self._over |= max(changes) > UPRIGHT_M
        if not self._over and state.step % self._recipe.every == 0:
            self._keep(state)
        return state

    @property
    def success(self) -> bool:
        """Whether there is nothing more to learn from this episode."""
        return self._over or self._env.success

    def frames(self) -> Layouts:
        """Of the episode so far."""
        arrays = {name: np.stack(values) for name, values in self._rows.items()}
        floats = {name: a.astype(np.float32) for name, a in arrays.items() if name != 'images'}
        return Layouts(
            images=arrays['images'], place_names=np.array([*SHUFFLE.objects, BASKET]), **floats
        )

    @staticmethod
    def _heights_of(state: SimState) -> dict[str, float]:
        return {name: float(state.places[name][2]) for name in WANTED}

    def _keep(self, state: SimState) -> None:
        names, images = [*SHUFFLE.objects, BASKET], self._env.images()
        self._rows['images'].append(np.stack([images[name] for name in self._recipe.cameras]))
        self._rows['proprio'].append(state.proprio(self._recipe.proprio_names))
        self._rows['turn'].append(straightening(state.hand_xyzw))
        self._rows['places'].append([state.places[name] for name in names])
        self._rows['pixels'].append(self._env.pixels(names))


def roll_out(env: Environment, policy: Driven, recipe: LayoutRecipe, seed: int) -> Layouts:
    """Frames of one episode of a policy.

    Raises:
        ConfigError: see LiberoTask.
        ObservationError, ActionError: see Policy.infer.
    """
    recorder = Recorder(env, recipe)
    list(LiberoTask(recorder, policy.config.robot).run(policy, seed))
    return recorder.frames()


def collect_rollouts(
    folder: Path,
    recipe: LayoutRecipe,
    checkpoint: str,
    jobs: Sequence[tuple[str, int]],
    *,
    workers: int,
) -> Iterator[int]:
    """Make the episodes that a folder lacks.

    Args:
        folder: made if it is not there.
        recipe: of the folder.
        checkpoint: of the policy, with its params.yaml; it runs dense.
        jobs: task and seed of every episode that the folder is to have.
        workers: processes; 0 works in this one.

    Yields:
        the number of new frames of every episode when it is written; first 0 for each that was
        there before.

    Raises:
        ConfigError: the folder holds something else; see also `roll_out`.
    """
    open_layouts(folder, recipe)
    todo = [job for job in jobs if not _path(folder, job).exists()]
    yield from [0] * (len(jobs) - len(todo))
    work = functools.partial(_write_episode, folder, recipe, checkpoint)
    yield from in_workers(work, [(job,) for job in todo], workers)


def _path(folder: Path, job: tuple[str, int]) -> Path:
    task, seed = job
    return folder / f'{task.replace("/", "_")}_{seed:07d}.npz'


def _write_episode(
    folder: Path, recipe: LayoutRecipe, checkpoint: str, job: tuple[str, int]
) -> int:
    task, seed = job
    policy = _policy(checkpoint)
    env = _environment(task, recipe.cameras, recipe.size, recipe.detail_m)
    frames = roll_out(env, policy, recipe, seed)
    write_shard(_path(folder, job), frames)
    return len(frames.images)


@functools.lru_cache(maxsize=1)
def _policy(checkpoint: str) -> Driven:
    from specprune_ros.policy import Policy

    return Policy.load(policy_config(checkpoint))


def policy_config(checkpoint: str) -> PolicyConfig:
    """Of a checkpoint with its params.yaml, dense, one thread: workers share the machine.

    Raises:
        ConfigError: it has none, or a bad one.
        CheckpointError: nothing of that name is shipped.
    """
    from specprune_ros.shipped import PARAMS, find_checkpoint

    fixed = {'model.checkpoint': checkpoint, 'model.threads': 1, 'pruning.method': 'none'}
    return load_config([find_checkpoint(checkpoint) / PARAMS], fixed)


@functools.lru_cache(maxsize=1)  # building one takes seconds; jobs come ordered by task
def _environment(task: str, cameras: tuple[str, ...], size: int, detail_m: float) -> LiberoEnv:
    return LiberoEnv(task, cameras=cameras, size=size, detail_m=detail_m)
