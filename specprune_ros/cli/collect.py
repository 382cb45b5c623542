"""Collect demonstrations of a scripted expert in LIBERO's scenes, to train a model on.

Only successful episodes are kept; the ledger counts all. The same command goes on where an
interrupted one stopped. The format is described in specprune_ros/sim/dataset.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specprune_ros.cli.options import at_least
from specprune_ros.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    from specprune_ros.sim.dataset import Attempt, Recipe
    from specprune_ros.sim.layouts import LayoutRecipe

WIDTH = 100  # columns where the output is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        '--task',
        nargs='+',
        action='extend',
        default=[],
        metavar='NAME',
        help='e.g. libero_goal/8 or object_shuffled/0; default: all that the expert knows',
    )
    parser.add_argument(
        '--episodes', type=int, default=50, metavar='N', help='attempts per task: seeds 0..N-1'
    )
    parser.add_argument('--out', type=Path, default=Path('out/demos'), help='dataset folder')
    parser.add_argument('--workers', type=int, default=1, help='processes; 0: this one')
    parser.add_argument('--size', type=int, default=112, help='side of an image, px')
    parser.add_argument(
        '--camera',
        nargs='+',
        default=['wrist', 'side', 'overhead'],
        metavar='NAME',
        help='wrist, side, overhead, front; in the order in which a model will take them',
    )
    parser.add_argument(
        '--every', type=int, default=3, metavar='N', help='control steps from frame to frame'
    )
    parser.add_argument(
        '--noise', type=float, default=0.5, help='of the motion, as a share of its speed'
    )
    parser.add_argument(
        '--layouts',
        type=int,
        default=0,
        metavar='N',
        help='instead of episodes: N still scenes of the shuffled tasks, the hand anywhere',
    )
    parser.add_argument(
        '--split', default='train', help='with --layouts: train, or eval for held-out scenes'
    )
    parser.add_argument(
        '--rollouts',
        metavar='CHECKPOINT',
        help='instead: still scenes from episodes of this policy, until an object is lifted',
    )
    parser.add_argument(
        '--noisy-share', type=float, default=0.7, help='share of the episodes that have noise'
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as TimeLeft

    from specprune_ros.sim.collect import collect, jobs_of
    from specprune_ros.sim.tasks import SKILLS

    workers = at_least('workers', arguments.workers, 0)
    if workers > (cores := os.cpu_count() or 1):
        raise ConfigError('--workers', workers, f'this machine has {cores} cores')
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    columns = (TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeLeft())
    if arguments.layouts:
        if arguments.rollouts:
            raise ConfigError('--rollouts', arguments.rollouts, 'is another kind than --layouts')
        return run_layouts(arguments, workers, console, Progress(*columns, console=console))
    episodes = at_least('episodes', arguments.episodes, 1)
    if arguments.rollouts:
        if arguments.split != 'train':
            raise ConfigError('--split', arguments.split, 'a policy learns from its rollouts')
        return run_rollouts(arguments, workers, console, Progress(*columns, console=console))
    jobs = jobs_of(arguments.task or list(SKILLS), episodes)
    recipe = recipe_from(arguments)
    attempts: list[Attempt] = []
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task('episodes', total=len(jobs))
        for attempt in collect(arguments.out, recipe, jobs, workers=workers):
            attempts.append(attempt)
            failed = sum(not one.success for one in attempts)
            progress.update(bar, advance=1, description=f'episodes, {failed} failed')
    console.print(summary_table(attempts))
    console.print(f'written to {arguments.out}')
    return 0


def run_layouts(
    arguments: argparse.Namespace, workers: int, console: Console, progress: Progress
) -> int:
    """Collect still scenes instead of episodes."""
    from specprune_ros.sim.layouts import SHARD, collect_layouts

    recipe = layout_recipe_from(arguments)
    count = at_least('layouts', arguments.layouts, 1)
    with progress:
        bar = progress.add_task('still scenes', total=SHARD * math.ceil(count / SHARD))
        for some in collect_layouts(arguments.out, recipe, count, workers=workers):
            progress.update(bar, advance=some)
    console.print(f'written to {arguments.out}')
    return 0


def run_rollouts(
    arguments: argparse.Namespace, workers: int, console: Console, progress: Progress
) -> int:
    """Collect still scenes from a policy's episodes."""
    from specprune_ros.cli.eval import digest_of
    from specprune_ros.shipped import find_checkpoint
    from specprune_ros.sim.closed_loop import check_robot
    from specprune_ros.sim.rollouts import collect_rollouts, policy_config
    from specprune_ros.sim.tasks import SHUFFLED, WANTED

    tasks = arguments.task or [f'{SHUFFLED}/{index}' for index in range(len(WANTED))]
    for name in tasks:
        if not name.startswith(f'{SHUFFLED}/'):
            raise ConfigError('--task', name, f'only {SHUFFLED} has still scenes')
    check_robot(policy_config(arguments.rollouts).robot)
    jobs, frames = [(name, seed) for name in tasks for seed in range(arguments.episodes)], 0
    recipe = dataclasses.replace(
        layout_recipe_from(arguments),
        policy=digest_of(find_checkpoint(arguments.rollouts)),
        every=at_least('every', arguments.every, 1),
    )
    with progress:
        bar = progress.add_task('episodes', total=len(jobs))
        work = collect_rollouts(arguments.out, recipe, arguments.rollouts, jobs, workers=workers)
        for some in work:
            frames += some
            progress.update(bar, advance=1, description=f'episodes, {frames} new frames')
    console.print(f'written to {arguments.out}')
    return 0


def layout_recipe_from(arguments: argparse.Namespace) -> LayoutRecipe:
    """The recipe of still scenes that the arguments name.

    Raises:
        ConfigError: a value is bad.
    """
    from specprune_ros.sim.layouts import LayoutRecipe
    from specprune_ros.sim.libero import DETAIL_M, SPLITS, check_cameras
    from specprune_ros.sim.state import PROPRIO_NAMES

    check_cameras(arguments.camera)
    if arguments.split not in SPLITS:
        raise ConfigError('--split', arguments.split, f'must be one of {", ".join(SPLITS)}')
    return LayoutRecipe(
        cameras=tuple(arguments.camera),
        size=at_least('size', arguments.size, 14),
        split=arguments.split,
        detail_m=DETAIL_M,
        proprio_names=PROPRIO_NAMES,
    )


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the arguments name.

    Raises:
        ConfigError: a value is bad.
    """
    from specprune_ros.sim.dataset import Recipe
    from specprune_ros.sim.libero import DETAIL_M, check_cameras
    from specprune_ros.sim.state import ACTION_NAMES, PROPRIO_NAMES, STEP_NS

    check_cameras(arguments.camera)
    for name, high in (('noise', 2.0), ('noisy_share', 1.0)):
        value = getattr(arguments, name)
        if not 0.0 <= value <= high:
            raise ConfigError(f'--{name.replace("_", "-")}', value, f'must be 0 to {high:g}')
    return Recipe(
        cameras=tuple(arguments.camera),
        size=at_least('size', arguments.size, 14),
        every=at_least('every', arguments.every, 1),
        noise=arguments.noise,
        noisy_share=arguments.noisy_share,
        split='train',
        detail_m=DETAIL_M,
        proprio_names=PROPRIO_NAMES,
        action_names=ACTION_NAMES,
        step_dt_s=STEP_NS / 1e9,
    )


def summary_table(attempts: Sequence[Attempt]) -> Table:
    """Successes per task, with their 95 % interval, and what an episode costs."""
    from rich.table import Table

    from specprune_ros.sim.summary import summarize, wilson_interval

    table = Table(title='expert')
    for name in ('task', 'kept', '95 %', 'without noise', 'steps', 'frames/s', 'MB'):
        table.add_column(name, justify='left' if name == 'task' else 'right')
    for row in summarize(attempts):
        low, high = wilson_interval(row.successes, row.attempts)
        table.add_row(
            row.task,
            f'{row.successes}/{row.attempts}',
            f'{low:.0%} to {high:.0%}',
            f'{row.clean_successes}/{row.clean}',
            f'{row.steps:.0f}',
            f'{row.frames_per_s:.1f}',
            f'{row.megabytes:.2f}',
        )
    return table
