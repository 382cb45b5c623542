"""Run a recording through the policy, without ROS.

Writes chunks.npz, reports.jsonl (one line per query), overlays, queries.png and summary.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specprune_ros.cli.queries import Queries, add_query_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_query_arguments(parser)
    parser.add_argument('--out', type=Path, default=Path('out/run'), help='output folder')
    parser.add_argument('--video', action='store_true', help='overlays as videos, not pictures')


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console

    from specprune_ros.images import as_rgb
    from specprune_ros.overlay import draw_overlay
    from specprune_ros.runlog import RunLog

    console = Console()
    queries = Queries(arguments, console)
    opacity = queries.policy.config.runtime.overlay_opacity
    log = RunLog(arguments.out, video=arguments.video)
    try:
        for observation, result in queries:
            log.add(result.chunk, result.report)
            for name in queries.policy.model.info.cameras:
                image = as_rgb(observation.images[name])
                overlay = draw_overlay(image, result.report, name, opacity)
                log.add_overlay(name, len(log.reports) - 1, overlay)
    finally:  # also what an interrupted run has so far
        log.skipped = [str(error) for error in queries.skipped]
        console.print(log.finish())
        console.print(queries.skipped_words())
        console.print(f'written to {arguments.out}')
    return 0
