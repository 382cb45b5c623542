"""The curves of a run as one picture."""

from __future__ import annotations

import csv
from pathlib import Path

from specprune_ros.outputs import new_figure
from specprune_ros.train.trainer import CURVES

PANELS = {
    'losses': ('action', 'target', 'flag', 'patch', 'words'),
    'named object is the nearest (share)': ('nearest',),
    'place of the named object (mm)': ('error_mm',),
    'heading (degrees)': ('heading_deg',),
}


def draw_curves(folder: Path) -> None:
    """Write `curves.png` beside `curves.csv`.

    Args:
        folder: of the run.
    """
    with (folder / CURVES).open(newline='') as file:
        rows = list(csv.DictReader(file))
    figure = new_figure(10, 6)
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for name in names:
            points = [(int(row['step']), float(row[name])) for row in rows if row[name]]
            axes.plot(*zip(*points, strict=True), label=name) if points else None
        axes.set_title(title)
        axes.set_xlabel('step')
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if len(names) > 1:
            axes.legend()
    figure.savefig(folder / 'curves.png', dpi=100)
