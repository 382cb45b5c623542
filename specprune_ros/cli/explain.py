"""Run a recording through the policy and write one HTML page on what was pruned, and why.

The page needs no network and no other file.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from specprune_ros.cli.options import at_least
from specprune_ros.cli.queries import Queries, add_query_arguments
from specprune_ros.errors import ConfigError

if TYPE_CHECKING:  # at run time this would bring OpenCV, which bench runs without
    from specprune_ros.explain import About


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_query_arguments(parser)
    parser.add_argument('--out', type=Path, default=Path('out/explain.html'), help='the page')
    parser.add_argument(
        '--max-queries', type=int, default=200, help='stop after so many; 0: all of them'
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console

    from specprune_ros.explain import Explanation

    console = Console()
    most = at_least('max-queries', arguments.max_queries, 0)
    queries = Queries(arguments, console)
    write(arguments.out, '', 'a')  # a bad path shows before the work, not after it
    explanation = Explanation(about(queries))
    try:
        for observation, result in islice(queries, most or None):
            explanation.add(result.report, observation)
    finally:  # also what an interrupted run has so far
        if len(explanation):
            skipped = queries.skipped_words()
            write(arguments.out, explanation.html(skipped))
            size = arguments.out.stat().st_size / 1e6
            console.print(f'{len(explanation)} queries, {size:.1f} MB: {arguments.out}')
            console.print(skipped, style='yellow')
        elif not arguments.out.stat().st_size:
            arguments.out.unlink()
    if most and len(explanation) == most:
        console.print(f'stopped after {most} queries, as --max-queries says', style='yellow')
    return 0


def about(queries: Queries) -> About:
    """What the page says of the run as a whole."""
    from specprune_ros.bench.latency import environment
    from specprune_ros.explain import About
    from specprune_ros.models import pick_device

    policy = queries.policy
    info, device = policy.model.info, pick_device(policy.config.model.device)
    return About(
        config=policy.config,
        model=f'{info.name}, {info.parameters / 1e6:,.1f} M weights',
        recording=Path(queries.recording.path).name,
        environment={'device': str(device), **environment(device)},
    )


def write(path: Path, text: str, mode: str = 'w') -> None:
    """Write or append to a file, its folder made if absent.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding='utf-8') as file:
            file.write(text)
    except OSError as error:
        raise ConfigError('--out', str(path), f'cannot be written: {error}') from error
