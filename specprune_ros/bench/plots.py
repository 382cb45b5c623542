"""Pictures of benchmarks; these need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specprune_ros.bench.latency import TOTAL, Row
from specprune_ros.bench.variants import DENSE
from specprune_ros.errors import MissingDependencyError
from specprune_ros.outputs import new_figure

if TYPE_CHECKING:
    from specprune_ros.bench.work import Point

STAGES = ('preprocess', 'vision', 'projector', 'decoder', 'graph', 'head')  # that add up
COLORS = ('#9e9e9e', '#4c78a8', '#72b7b2', '#e45756', '#b279a2', '#f2cf5b')
DENSE_COLOR, ALPHA_COLORS = '#333333', ('#1a9850', '#91bfdb', '#fc8d59', '#d73027', '#762a83')


def require_matplotlib() -> None:
    """See that pictures can be made.

    Raises:
        MissingDependencyError: they cannot.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            'matplotlib', '--plot', 'pip install matplotlib', error
        ) from error


def plot_rows(rows: Sequence[Row], title: str, path: Path) -> None:
    """Stacked stages of every variant beside its floor, one panel per number of cameras."""
    cameras = sorted({row.cameras for row in rows})
    figure = new_figure(4.6 * len(cameras) + 1.5, 5.0)
    panels = figure.subplots(1, len(cameras), squeeze=False)[0]
    for axis, count in zip(panels, cameras, strict=True):
        _stack(axis, [row for row in rows if row.cameras == count])
        axis.set(title=f'{count} camera{"s" * (count > 1)}', ylabel='ms, median')
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc='outside lower center', ncol=len(names), fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100)


def _stack(axis, rows: Sequence[Row]) -> None:
    labels = list(dict.fromkeys((row.method, row.form) for row in rows))
    value = {(row.method, row.form, row.stage): row for row in rows}
    bottom = [0.0] * len(labels)
    for stage, color in zip(STAGES, COLORS, strict=True):
        found = [value.get((*label, stage)) for label in labels]
        heights = [row.median_ms if row else 0.0 for row in found]
        if any(heights):
            axis.bar(range(len(labels)), heights, bottom=bottom, color=color, label=stage)
            bottom = [base + height for base, height in zip(bottom, heights, strict=True)]
    totals = [value[(*label, TOTAL)] for label in labels]
    floors = [row.floor_ms for row in totals]
    if None not in floors:
        axis.plot(range(len(labels)), floors, 'k_', ms=16, mew=2, label='floor')
    for at, row in enumerate(totals):
        text = f'{row.ratio_to_dense_sdpa:.2f}x'
        axis.annotate(text, (at, bottom[at]), ha='center', va='bottom', fontsize=7)
    names = [('dense' if method == DENSE else method) + f'\n{form}' for method, form in labels]
    axis.set_xticks(range(len(labels)), names, rotation=60, ha='right', fontsize=7)


def plot_work(points: Sequence[Point], title: str, path: Path) -> None:
    """Decoder and whole query, dense and pruned, over the visual tokens of the unpruned query."""
    fields = ('decoder_ms', 'total_ms')
    if any(point.decoder_ms is None for point in points):  # recorded in one piece
        fields = ('total_ms',)
    figure = new_figure(5 * len(fields), 4.4)
    panels = figure.subplots(1, len(fields), squeeze=False)[0]
    for axis, field in zip(panels, fields, strict=True):
        for index, alpha in enumerate(sorted({p.alpha for p in points}, key=lambda a: a or 0)):
            mine = sorted((p for p in points if p.alpha == alpha), key=lambda p: p.tokens)
            color = DENSE_COLOR if alpha is None else ALPHA_COLORS[(index - 1) % len(ALPHA_COLORS)]
            axis.plot(
                [point.tokens for point in mine],
                [getattr(point, field) for point in mine],
                'o-', ms=3, lw=1.2, color=color,
                label='dense' if alpha is None else f'alpha {alpha:g}',
            )  # fmt: skip
        axis.set(xlabel='visual tokens before pruning', ylabel='ms, median', xlim=0, ylim=0)
        axis.set_title({'decoder_ms': 'decoder', 'total_ms': 'images to actions'}[field])
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=100)
