"""The picture of an evaluation; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from specprune_ros.outputs import new_figure
from specprune_ros.sim.comparison import Cell

COLOR, REFERENCE = '#4c78a8', '#333333'


def plot_cells(cells: Sequence[Cell], path: Path) -> None:
    """Success with its 95 % interval per method, over tokens kept and in a row.

    Args:
        cells: of `compare`; those of all tasks are drawn, and the first is the reference.
        path: of the picture.
    """
    overall = [cell for cell in cells if not cell.task] or list(cells)
    figure = new_figure(11, 1.6 + 0.32 * len(overall))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    rates = [100 * cell.successes / max(cell.episodes, 1) for cell in overall]
    below = [rate - 100 * cell.low for rate, cell in zip(rates, overall, strict=True)]
    above = [100 * cell.high - rate for rate, cell in zip(rates, overall, strict=True)]
    rows = range(len(overall))
    left.errorbar(rates, rows, xerr=(below, above), fmt='o', color=COLOR, capsize=3)
    left.axvline(rates[0], color=REFERENCE, lw=0.8, ls='--')
    left.set(xlim=(-2, 102), xlabel='success, % (95 % interval)')
    left.set_yticks(rows, [f'{c.method} ({c.successes}/{c.episodes})' for c in overall])
    left.invert_yaxis()
    kept = [100 * cell.kept for cell in overall]
    right.errorbar(kept, rates, yerr=(below, above), fmt='o', color=COLOR, capsize=3)
    right.set(xlim=(-2, 102), ylim=(-2, 102), xlabel='visual tokens kept, %', ylabel='success, %')
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
