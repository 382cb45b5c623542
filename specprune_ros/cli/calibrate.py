"""Propose pruning parameters from a recording of one's own robot, with the evidence.

Writes pruning.yaml (a parameter file), calibration.json (all figures) and pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from specprune_ros.cli.options import at_least, config_from, recording_from
from specprune_ros.cli.queries import add_query_arguments
from specprune_ros.errors import ConfigError

EXAMPLE = """
example, the parameters of one's own robot and checkpoint, then the node with them:
  specprune calibrate my_bag --params robots/libero_franka --params models/openvla_oft \\
    --set model.checkpoint=my_checkpoint --out out/calibrate
  ros2 launch specprune_ros vla.launch.py robot:=libero_franka checkpoint:=my_checkpoint \\
    pruning:=out/calibrate/pruning.yaml
"""

if TYPE_CHECKING:
    from rich.table import Table

    from specprune_ros.calibration.proposal import Proposal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_query_arguments(parser)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    parser.add_argument(
        '--out', type=Path, default=Path('out/calibrate'),
        help='output folder (default %(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--false-changes', type=float, default=0.01, metavar='SHARE',
        help='share of still patches, 0 to 1, that may count as changed (default %(default)g)',
    )  # fmt: skip
    parser.add_argument(
        '--budget', type=float, default=None, metavar='SHARE',
        help='share of the patches, 0 to 1, that V_retain may keep on average (default: what the '
        'configured K keep on this recording)',
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console
    from rich.progress import track

    from specprune_ros.calibration.study import calibrate, write_study

    every = at_least('every', arguments.every, 0)
    rate = _share('false-changes', arguments.false_changes)
    budget = None if arguments.budget is None else _share('budget', arguments.budget)
    console = Console()
    config = config_from(arguments)
    recording = recording_from(arguments, config.robot)
    out = _made(arguments.out)

    def steps(outcomes):
        bar = track(outcomes, 'queries', total=recording.control_steps, console=console)
        for error in bar:
            if error is not None:
                console.print(f'skipped: {error}', style='yellow')

    study = calibrate(config, recording, every=every, rate=rate, budget=budget, watch=steps)
    file = write_study(study, out)
    console.print(proposal_table(study.proposals, study.notes))
    console.print(f'evidence in {out}')
    console.print(f'your line of `ros2 launch`, and pruning:={file}', soft_wrap=True)
    return 0


def proposal_table(proposals: list[Proposal], notes: list[str]) -> Table:
    """What is proposed, as a table for a terminal."""
    from rich.table import Table

    table = Table(title='pruning parameters', caption='\n'.join(notes) or None)
    for column in ('parameter', 'now', 'proposed', 'confidence'):
        table.add_column(column, no_wrap=True)
    table.add_column('evidence')
    evidence = ''
    for each in proposals:
        proposed = 'kept' if each.proposed is None else _words(each.proposed)
        proposed = proposed if each.usable else f'({proposed})'
        told = '"' if each.evidence == evidence else each.evidence
        evidence = each.evidence
        table.add_row(each.parameter, _words(each.now), proposed, each.confidence, told)
    return table


def _words(value: object) -> str:
    return ', '.join(map(str, value)) if isinstance(value, tuple) else f'{value:.6g}'


def _share(name: str, value: float) -> float:
    if not 0.0 < value < 1.0:
        raise ConfigError(f'--{name}', value, 'must lie between 0 and 1')
    return value


def _made(out: Path) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError('--out', str(out), f'cannot be written: {error}') from error
    return out.resolve()
