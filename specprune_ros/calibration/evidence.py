"""Pictures of what a calibration rests on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from specprune_ros.calibration.budget import KSearch
from specprune_ros.calibration.layers import LayerSearch
from specprune_ros.calibration.noise import CameraNoise
from specprune_ros.calibration.thresholds import SpeedValley
from specprune_ros.outputs import new_figure

NOW, PROPOSED = '#d55e00', '#0072b2'
PAPER = {'coarse': ((12, 15), (24, 20), (36, 30)), 'fine': ((40, 10),)}
LEAST_GAP = 1e-6  # 1 - similarity that a picture shows as 0


def plot_speeds(valleys: Mapping[str, SpeedValley], now: Mapping[str, float], path: Path) -> None:
    """Histogram of the executed speeds, both modes, the threshold between and its interval.

    Args:
        valleys: name of the speed -> what was found.
        now: name of the speed -> configured threshold.
        path: the picture.
    """
    figure, axes = _figure(1, len(valleys), 'executed speeds, 1 = full command')
    for axis, (name, valley) in zip(axes.flat, valleys.items(), strict=True):
        if len(valley.speeds):
            bars, _, _ = axis.hist(valley.speeds, 60, density=True, color='#cccccc')
            # A mode of one exact speed has a density beyond any bar.
            axis.set_ylim(0, 1.3 * bars.max())
        if valley.density is not None:
            for density, style in zip(valley.density, ('-', '--'), strict=True):
                axis.plot(valley.grid, density, style, color='k', lw=1)
        axis.axvline(now[name], color=NOW, label=f'now {now[name]:g}')
        if valley.bimodal:
            axis.axvspan(*valley.interval, color=PROPOSED, alpha=0.2, lw=0)
            axis.axvline(valley.valley, color=PROPOSED, label=f'between {valley.valley:.3g}')
        axis.set(xlabel=name, ylabel='density', title=valley.why_not[:60])
        axis.title.set_fontsize(8)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_noise(
    cameras: Mapping[str, CameraNoise], now: float, tau: float | None, path: Path
) -> None:
    """1 - similarity of all patches and of the still ones, per camera."""
    figure, axes = _figure(len(cameras), 1, 'consecutive pictures: 1 - similarity of patches')
    edges = np.geomspace(LEAST_GAP, 1.0, 80)
    for axis, (name, noise) in zip(axes.flat, cameras.items(), strict=True):
        for gaps, color, label in (
            (noise.all_pairs, '#cccccc', 'all'), (noise.static, '#009e73', 'still'),
        ):  # fmt: skip
            axis.hist(np.maximum(gaps, LEAST_GAP), edges, color=color, label=label)
        axis.axvline(max(1.0 - now, LEAST_GAP), color=NOW, label=f'tau now {now:g}')
        if tau is not None:
            axis.axvline(1.0 - tau, color=PROPOSED, label=f'tau proposed {tau:.5g}')
        axis.set(xscale='log', yscale='log', ylabel=name, title=noise.why_not)
        axis.title.set_fontsize(8)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_grid(search: KSearch, note: str, path: Path) -> None:
    """Recall over tokens of every point of the K grid, per mode."""
    grid = search.grid
    columns = {'coarse': ~grid.fine, 'fine': grid.fine}
    figure, axes = _figure(1, len(columns), f'recall of V_t by V_retain\n{note}'.strip())
    for axis, (mode, shown) in zip(axes.flat, columns.items(), strict=True):
        shown = shown if shown.any() else np.ones_like(shown)
        tables = (grid.kept, grid.recall)
        kept, recall = (100 * table[..., shown].mean(axis=-1) for table in tables)
        for index, k_global in enumerate(grid.k_global):
            axis.plot(kept[index], recall[index], '.', ms=4, label=f'K_global {k_global}')
        papers = [i for i, pair in enumerate(grid.pairs) if pair in PAPER[mode]]
        if 30 in grid.k_global:
            row = grid.k_global.index(30)
            axis.plot(kept[row, papers], recall[row, papers], 'ks', mfc='none', label="paper's")
        now = (100 * table[shown].mean() for table in (grid.now_kept, grid.now_recall))
        axis.plot(*now, '*', ms=14, color=NOW, label='now')
        if search.choice is not None:
            at = (search.choice.k_global, getattr(search.choice, mode))
            axis.plot(kept[at], recall[at], '*', ms=14, color=PROPOSED, label='best')
        axis.axvline(100 * search.budget[mode], color='k', lw=1, ls=':')
        unseen = ', not recorded' if mode in search.unseen else ''
        axis.set(xlabel='patches kept, %', ylabel='recall, %', title=f'{mode}{unseen}')
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def plot_layers(search: LayerSearch, now: tuple[int, ...], note: str, path: Path) -> None:
    """Recall of every pair of layers as a map."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(1, 1, f'recall of the next important patches, %\n{note}'.strip())
    axis, last = axes.flat[0], int(search.pairs.max())
    table = np.full((last, last), np.nan)
    table[search.pairs[:, 0] - 1, search.pairs[:, 1] - 1] = 100 * search.recall
    shown = axis.imshow(table, origin='lower', extent=(0.5, last + 0.5, 0.5, last + 0.5))
    figure.colorbar(shown)
    low, high = search.pairs[search.best]
    named = ', '.join(map(str, search.names[search.best]))
    axis.plot(high, low, '*', ms=14, color=PROPOSED, mec='w', label=f'best: global_layers {named}')
    if len(search.configured) == 2:
        low, high = search.configured
        label = f'now: global_layers {", ".join(map(str, now))}'
        axis.plot(high, low, '*', ms=14, color=NOW, mec='w', label=label)
    axis.set(xlabel='deeper layer of this decoder', ylabel='shallower layer')
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_locator(MaxNLocator(integer=True))
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _figure(rows: int, cols: int, title: str):
    """A figure and its [rows, cols] axes, drawn without a display."""
    figure = new_figure(5.0 * cols + 1.0, 2.4 * rows + 2.0)
    figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(rows, cols, squeeze=False)
