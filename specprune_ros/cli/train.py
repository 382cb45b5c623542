"""Train a small VLA on demonstrations and still scenes, and write its checkpoint folder.

The same command goes on where an interrupted one stopped; Ctrl-C and SIGTERM leave a checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from specprune_ros.cli.options import add_config_arguments, overrides_from

if TYPE_CHECKING:
    from specprune_ros.train.gate import Gate
    from specprune_ros.train.trainer import Trainer

UNFINISHED = 1  # exit status of a run that a signal ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add_config_arguments(parser)
    parser.add_argument('--out', type=Path, default=Path('out/train'), help='folder of the run')
    parser.add_argument(
        '--export-only', action='store_true', help='write the checkpoint folder and do not train'
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from rich.console import Console

    from specprune_ros.config_files import load_config
    from specprune_ros.train.config import TrainConfig
    from specprune_ros.train.curves import draw_curves
    from specprune_ros.train.data import load_training_set
    from specprune_ros.train.export import export
    from specprune_ros.train.trainer import Trainer

    files = arguments.params or ['train/libero']
    config = load_config(files, overrides_from(arguments), TrainConfig())
    console = Console()
    trainer = Trainer(config, load_training_set(config.data), arguments.out)
    console.print(describe(trainer), soft_wrap=True)

    def report(trainer: Trainer, gate: Gate) -> None:
        console.print(line(trainer, gate), soft_wrap=True)
        draw_curves(arguments.out)
        if trainer.step in config.fit.keep:
            export(trainer, arguments.out / f'step_{trainer.step}', gate)

    if not arguments.export_only:
        trainer.run(report)
    folder = export(trainer, arguments.out / 'checkpoint')
    console.print(f'step {trainer.step} of {config.fit.steps}; written to {folder}')
    return 0 if arguments.export_only or trainer.step >= config.fit.steps else UNFINISHED


def describe(trainer: Trainer) -> str:
    """One line on what is trained on what."""
    data, count = trainer.data, sum(p.numel() for p in trainer.network.parameters())
    return (
        f'{count / 1e6:.2f} M parameters; {data.episodes} episodes, {len(data.demos)} frames, '
        f'{len(data.layouts)} still scenes; from step {trainer.step}'
    )


def line(trainer: Trainer, gate: Gate) -> str:
    """One line on a measurement."""
    losses = ' '.join(f'{name} {value:.3f}' for name, value in trainer.smooth.items())
    return (
        f'step {trainer.step}, {trainer.seconds / 60:.0f} min: {losses} | held-out scenes: '
        f'{gate.nearest:.0%} go for the named object, {gate.error_mm:.0f} mm, heading '
        f'{gate.heading_deg:.0f} deg, action {gate.action_error:.3f}'
    )
