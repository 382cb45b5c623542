"""Run the paper's ablation studies, and our own, on a recording or in simulation.

Every variant answers every query of the recording beside the dense model; in simulation, where its
actions decide what comes next, it has episodes of its own. Writes ablation.md (all tables),
ablation.json, queries.csv (every variant, seed and query) and one plot per study.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from specprune_ros.cli.options import (
    add_config_arguments,
    add_recording_arguments,
    at_least,
    check_output,
    config_from,
    recording_from,
)

if TYPE_CHECKING:
    from specprune_ros.ablation.task import Task
    from specprune_ros.config import PolicyConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_recording_arguments(parser)
    parser.add_argument(
        '--task',
        action='store_true',
        help='the name is no recording but a task in simulation, e.g. --task libero_goal/8',
    )
    add_config_arguments(parser)
    parser.add_argument(
        '--study',
        nargs='+',
        action='extend',
        default=[],
        metavar='NAME',
        help='run only these; a wrong name lists them all',
    )
    parser.add_argument(
        '--seeds',
        type=int,
        default=3,
        metavar='N',
        help='stand-in: that many random weights; checkpoint: that many phases of the queries',
    )
    parser.add_argument('--out', type=Path, default=Path('out/ablate'), help='output folder')
    parser.add_argument('--json', type=Path, help='instead of OUT/ablation.json')


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console
    from rich.progress import Progress

    from specprune_ros.ablation import output
    from specprune_ros.ablation.runner import base_of, run_ablation, ticks
    from specprune_ros.ablation.studies import select
    from specprune_ros.ablation.summary import INTERVAL, summarize
    from specprune_ros.models import load

    studies = select(arguments.study)
    seeds = at_least('seeds', arguments.seeds, 1)
    task, config = _task_from(arguments)
    total = ticks(task, studies, base_of(config.pruning), seeds)
    json_path = arguments.json or arguments.out / 'ablation.json'
    model = load(config)
    check_output('out', arguments.out / output.QUERIES)
    check_output('json', json_path)
    console = Console(width=None if sys.stdout.isatty() else output.WIDTH)
    with Progress(console=console) as progress:
        bar = progress.add_task('queries', total=total)
        ablation = run_ablation(
            model, config, task, studies, seeds=seeds, tick=lambda: progress.advance(bar)
        )
    summaries = {study.name: summarize(ablation, study) for study in studies}
    output.write_all(ablation, summaries, arguments.out, json_path)
    console.print(f'{output.hardware(ablation)}\n{output.evidence(ablation)}\n{INTERVAL}')
    for study in studies:
        console.print(output.terminal_table(study, summaries[study.name], ablation))
    console.print(f'written to {arguments.out}')
    return 0


def _task_from(arguments: argparse.Namespace) -> tuple[Task, PolicyConfig]:
    """What to go through, and the configuration fitted to it."""
    config = config_from(arguments)
    if arguments.task:
        from specprune_ros.sim.closed_loop import LiberoTask, check_robot
        from specprune_ros.sim.libero import LiberoEnv

        check_robot(config.robot)
        env = LiberoEnv(arguments.recording, cameras=config.robot.camera_names)
        return LiberoTask(env, config.robot), config
    from specprune_ros.ablation.task import RecordingTask
    from specprune_ros.offline import fit_robot

    recording = recording_from(arguments, config.robot)
    config = fit_robot(config, recording)
    return RecordingTask(recording, config.robot), config
