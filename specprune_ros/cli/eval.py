"""Measure success in simulation: tasks x methods x seeds, the same episodes for every method.

The same command goes on where an interrupted one stopped. Writes episodes.csv, evaluation.json and
success.png; table and picture are of all episodes asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from specprune_ros.cli.options import (
    add_config_arguments,
    at_least,
    check_output,
    overrides_from,
)
from specprune_ros.config_files import read_parameter_files
from specprune_ros.errors import ConfigError
from specprune_ros.outputs import plain
from specprune_ros.shipped import PARAMS, find_checkpoint

if TYPE_CHECKING:
    from rich.table import Table

    from specprune_ros.sim.comparison import Cell
    from specprune_ros.sim.evaluate import Plan

CARD = 'README.md'
WIDTH = 170  # columns where the output is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        'checkpoint',
        help='folder that `specprune train` wrote, with its params.yaml, or shipped/NAME',
    )
    parser.add_argument(
        '--task',
        nargs='+',
        action='extend',
        default=[],
        metavar='NAME',
        help='e.g. object_shuffled/0; default: object_shuffled/0 to 3',
    )
    parser.add_argument(
        '--method',
        nargs='+',
        action='extend',
        default=[],
        metavar='NAME[:FIELD=VALUE,...]',
        help='dense, or a pruning method; the first one is what others are compared with',
    )
    parser.add_argument('--seeds', type=int, default=20, metavar='N', help='held-out seeds 0..N-1')
    parser.add_argument(
        '--condition',
        default='normal',
        help='normal; grey: images tell nothing; withheld, wrong: the instruction does not; '
        'noise, blur, dark, bright, camera: what robustness is measured with',
    )
    parser.add_argument(
        '--open-loop-steps',
        type=int,
        default=0,
        metavar='N',
        help='steps of a chunk that are executed before the next query; 0: all',
    )
    parser.add_argument(
        '--videos', type=int, default=0, metavar='N', help='films of seeds 0..N-1, with overlays'
    )
    parser.add_argument('--out', type=Path, default=Path('out/eval'), help='output folder')
    parser.add_argument('--workers', type=int, default=1, help='processes; 0: this one')
    parser.add_argument('--size', type=int, default=112, help='side of an image, px')
    parser.add_argument('--json', type=Path, help='write the table here as well')
    add_config_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console
    from rich.progress import Progress

    from specprune_ros.sim.comparison import compare
    from specprune_ros.sim.evaluate import DENSE, evaluate, film_path, jobs_of, read_results
    from specprune_ros.sim.plots import plot_cells
    from specprune_ros.sim.tasks import SHUFFLED, WANTED

    tasks = arguments.task or [f'{SHUFFLED}/{index}' for index in range(len(WANTED))]
    methods = arguments.method or [DENSE, 'specprune']
    jobs = jobs_of(tasks, methods, at_least('seeds', arguments.seeds, 1))
    workers = at_least('workers', arguments.workers, 0)
    if workers > (cores := os.cpu_count() or 1):
        raise ConfigError('--workers', workers, f'this machine has {cores} cores')
    plan = plan_from(arguments)
    if arguments.json:
        check_output('json', arguments.json)
    films = at_least('videos', arguments.videos, 0)
    missing = [
        job for job in jobs if job[2] < films and not film_path(arguments.out, job).exists()
    ]
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    results, before = [], len(read_results(arguments.out))
    with Progress(console=console) as progress:
        bar = progress.add_task('episodes', total=len(jobs))
        for result in evaluate(arguments.out, plan, jobs, workers=workers, films=films):
            results.append(result)
            good = sum(one.success for one in results)
            progress.update(bar, advance=1, description=f'episodes, {good} solved')
    unfilmed = sum(not film_path(arguments.out, job).exists() for job in missing)
    if unfilmed:
        console.print(
            f'{unfilmed} episodes were run before without a video; another --out films them'
        )
    order = {method: index for index, method in enumerate(methods)}
    cells = compare(sorted(results, key=lambda one: order[one.method]), methods[0])
    console.print(cell_table(cells, plan.condition))
    for cell in cells:
        if cell.fallback > 0 and not cell.task:
            why = f'{cell.fallback:.1%} of the queries ran dense because pruning failed'
            console.print(f'{cell.method}: {why}', style='yellow')
    plot_cells(cells, arguments.out / 'success.png')
    if arguments.json:
        is_new = len(read_results(arguments.out)) > before
        content = {
            'plan': dataclasses.asdict(plan),
            'cells': plain(cells),
            'environment': machine(plan) if is_new else machine_told(arguments.json),
        }
        arguments.json.write_text(json.dumps(content, indent=2, allow_nan=False) + '\n')
    console.print(f'written to {arguments.out}')
    return 0


def plan_from(arguments: argparse.Namespace) -> Plan:
    """What all episodes share.

    Raises:
        ConfigError: a value is bad, or the folder is none of `specprune train`.
    """
    from specprune_ros.sim.conditions import CONDITIONS
    from specprune_ros.sim.evaluate import Plan

    folder, name = find_checkpoint(arguments.checkpoint), f'{arguments.checkpoint}/{PARAMS}'
    if not (folder / PARAMS).is_file():
        raise ConfigError('checkpoint', arguments.checkpoint, f'holds no {PARAMS}')
    if arguments.condition not in CONDITIONS:
        why = f'must be one of {", ".join(CONDITIONS)}'
        raise ConfigError('--condition', arguments.condition, why)
    given = read_parameter_files(arguments.params)
    # One thread: workers share the machine, and a latency means something beside others.
    fixed = {'model.checkpoint': arguments.checkpoint, 'model.threads': 1}
    return Plan(
        params=(name,),  # the other files may change, and then it is another evaluation
        weights=digest_of(folder),
        overrides={**given, **fixed, **overrides_from(arguments)},
        size=at_least('size', arguments.size, 14),
        condition=arguments.condition,
        open_loop_steps=at_least('open_loop_steps', arguments.open_loop_steps, 0),
    )


def machine_told(path: Path) -> dict[str, str]:
    """What a file says of the machine that ran the latest episodes; empty where nobody knows."""
    if not path.exists():
        return {}
    return json.loads(path.read_text()).get('environment', {})


def machine(plan: Plan) -> dict[str, str]:
    """Hardware and versions of this machine."""
    from specprune_ros.bench.latency import environment
    from specprune_ros.models import pick_device

    model = plan.policy_config().model
    found = {**environment(pick_device(model.device)), 'threads': str(model.threads)}
    with contextlib.suppress(PackageNotFoundError):
        found['mujoco'] = version('mujoco')
    return found


def digest_of(folder: Path) -> str:
    """SHA-256 of a folder's files, names and contents; what its card says does not matter."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and path.name != CARD):
        digest.update(f'{path.name}\0{path.stat().st_size}\0'.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def cell_table(cells: Sequence[Cell], condition: str) -> Table:
    """Success, its interval and paired test, and what it took."""
    from rich.table import Table

    table = Table(title='success' if condition == 'normal' else f'success, {condition}')
    for name in (
        'task', 'method', 'success', '95 %', 'won, lost', 'p', 'steps', 'ms', 'static', 'kept',
        'FLOPs', 'object', 'recall', 'fine', 'error',
    ):  # fmt: skip
        table.add_column(name, justify='left' if name in ('task', 'method') else 'right')
    for cell in cells:
        table.add_row(
            cell.task or 'all',
            cell.method,
            f'{cell.successes}/{cell.episodes}',
            f'{cell.low:.0%} to {cell.high:.0%}',
            '' if cell.won is None else f'{cell.won}, {cell.lost}',
            '' if cell.p_value is None else f'{cell.p_value:.3f}',
            '' if math.isnan(cell.steps) else f'{cell.steps:.0f}',
            f'{cell.latency_ms:.1f}',
            f'{cell.static:.0%}',
            f'{cell.kept:.0%}',
            '' if math.isnan(cell.flops) else f'{cell.flops:.0%}',
            _shares(cell.object_static, cell.object_kept),
            _shares(cell.recall_static, cell.recall_kept),
            f'{cell.fine:.0%}',
            f'{cell.action_error:.3f}',
        )
    return table


def _shares(static: float, kept: float) -> str:
    return '' if math.isnan(static) else f'{static:.0%}, {kept:.0%}'
