"""Run a recording through the policy, without ROS.

Writes chunks.npz, reports.jsonl (one line per query), overlays, queries.png and summary.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from specprune_ros.cli.options import (
    add_config_arguments,
    add_recording_arguments,
    at_least,
    config_from,
    recording_from,
)
from specprune_ros.errors import SpecPruneError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_recording_arguments(parser)
    add_config_arguments(parser)
    parser.add_argument('--out', type=Path, default=Path('out/run'), help='output folder')
    parser.add_argument(
        '--every', type=int, default=0, help='control steps between queries; 0: the horizon'
    )
    parser.add_argument('--video', action='store_true', help='overlays as videos, not pictures')


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console
    from rich.progress import track

    from specprune_ros.images import as_rgb
    from specprune_ros.loading import load_policy
    from specprune_ros.offline import fit_robot, run_recording
    from specprune_ros.overlay import draw_overlay
    from specprune_ros.runlog import RunLog

    every = at_least('every', arguments.every, 0)
    console = Console()
    recording = recording_from(arguments)
    config = fit_robot(config_from(arguments), recording)
    left_out = [name for name in recording.cameras if name not in config.robot.camera_names]
    if left_out:
        console.print(f'cameras left out: {", ".join(left_out)}')
    policy = load_policy(config)
    policy.warm_up()
    log = RunLog(arguments.out, video=arguments.video)
    steps = run_recording(policy, recording, every=every)
    bar = track(steps, 'queries', total=recording.control_steps, console=console)
    try:
        for outcome in bar:
            if isinstance(outcome, SpecPruneError):
                log.skipped.append(str(outcome))
                console.print(f'skipped: {outcome}', style='yellow')
            elif outcome is not None:
                observation, result = outcome
                log.add(result.chunk, result.report)
                for name in policy.model.info.cameras:
                    image = as_rgb(observation.images[name])
                    opacity = config.runtime.overlay_opacity
                    overlay = draw_overlay(image, result.report, name, opacity)
                    log.add_overlay(name, len(log.reports) - 1, overlay)
    finally:  # also what an interrupted run has so far
        console.print(log.finish())
        console.print(f'written to {arguments.out}')
    return 0
