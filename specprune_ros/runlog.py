"""What a run leaves behind: chunks, report lines, overlays, a plot, and a summary table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
from rich.table import Table

from specprune_ros.errors import ConfigError
from specprune_ros.outputs import new_figure, plain
from specprune_ros.types import ActionChunk, Mode, PruneReport

MASKS = ('reason', 'pruned_after_layer', 'important')
MODE_COLORS = {
    Mode.DENSE: '#888888',
    Mode.COARSE: '#d55e00',
    Mode.FINE: '#0072b2',
    Mode.FALLBACK: '#cc0000',
}
CAMERA_COLORS = ('#000000', '#009e73', '#cc79a7', '#56b4e9')  # unlike the modes'
STAND_IN_NOTE = 'stand-in model with random weights: its actions mean nothing'


class RunLog:
    """Collects a run's results and writes them to a folder.

    Args:
        out: the folder; made if absent. Pictures of an earlier run in it go.
        video: overlays as one video per camera instead of pictures.
        fps: of the videos.

    Raises:
        ConfigError: the folder cannot be made or written.
    """

    def __init__(self, out: Path, *, video: bool = False, fps: float = 5.0):
        self.out = Path(out)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._lines = (self.out / 'reports.jsonl').open('w')
            if not video:
                (self.out / 'overlays').mkdir(exist_ok=True)
            for picture in (self.out / 'overlays').glob('*_[0-9][0-9][0-9][0-9].png'):
                picture.unlink()  # an earlier run's
        except OSError as error:
            raise ConfigError('--out', str(out), f'cannot be written: {error}') from error
        self.chunks: list[ActionChunk] = []
        self.reports: list[PruneReport] = []
        self.skipped: list[str] = []
        self._video = video
        self._fps = fps
        self._writers: dict[str, cv2.VideoWriter] = {}

    def add(self, chunk: ActionChunk, report: PruneReport) -> None:
        """One query."""
        self.chunks.append(chunk)
        self.reports.append(report)
        self._lines.write(report_line(report) + '\n')

    def add_overlay(self, camera: str, query: int, image: np.ndarray) -> None:
        """One overlay picture, [rows, cols, 3] uint8 RGB."""
        bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        if not self._video:
            file = self.out / 'overlays' / f'{camera}_{query:04d}.png'
            if not cv2.imwrite(str(file), bgr):
                raise ConfigError('--out', str(file), 'cannot be written')
            return
        if camera not in self._writers:
            size = (bgr.shape[1], bgr.shape[0])
            self._writers[camera] = cv2.VideoWriter(
                str(self.out / f'overlay_{camera}.mp4'),
                cv2.VideoWriter_fourcc(*'mp4v'),
                self._fps,
                size,
            )
        self._writers[camera].write(bgr)

    def finish(self) -> Table:
        """Write what is left to write.

        Returns:
            The summary table; `summary.json` holds its figures.
        """
        self._lines.close()
        for writer in self._writers.values():
            writer.release()
        if not self.reports:
            return Table(title='no query was made')
        np.savez_compressed(
            self.out / 'chunks.npz',
            data=np.stack([chunk.data for chunk in self.chunks]),
            normalized=np.stack([chunk.normalized for chunk in self.chunks]),
            stamp_ns=np.array([chunk.stamp_ns for chunk in self.chunks]),
            chunk_id=np.array([chunk.chunk_id for chunk in self.chunks]),
            names=np.array(self.chunks[0].names),
        )
        plot_queries(self.reports, self.out / 'queries.png')
        figures = summary(self.reports)
        figures['skipped'] = len(self.skipped)
        (self.out / 'summary.json').write_text(json.dumps(plain(figures), indent=2) + '\n')
        return summary_table(figures)


def report_line(report: PruneReport) -> str:
    """One report as one line of JSON; the masks are left out, NaN is null."""
    values = {}
    for spec in dataclasses.fields(report):
        if spec.name not in MASKS:
            values[spec.name] = plain(getattr(report, spec.name))
    return json.dumps(values, allow_nan=False)


def summary(reports: list[PruneReport]) -> dict[str, object]:
    """Figures of a run: per mode the queries, tokens kept, recall and latency."""
    modes = {}
    for mode in Mode:
        of_mode = [report for report in reports if report.mode == mode]
        if of_mode:
            modes[mode.name.lower()] = _mode_figures(of_mode)
    first = reports[0]
    return {
        'queries': len(reports),
        'method': first.method,
        'alpha': first.alpha,
        'budget': first.budget,
        'cameras': list(first.cameras),
        'stand_in': first.stand_in,
        'modes': modes,
    }


def _mode_figures(reports: list[PruneReport]) -> dict[str, object]:
    total = np.stack([report.tokens_total for report in reports]).astype(float)
    static = np.stack([report.tokens_static for report in reports])
    kept = np.stack([report.tokens_kept for report in reports])
    recalls = np.stack([report.recall for report in reports])
    total_ms = 1e3 * np.array([report.latency_total_s for report in reports])
    decode_ms = 1e3 * np.array([report.latency_decode_s for report in reports])
    known = np.isfinite(recalls).any()
    return {
        'queries': len(reports),
        'static_share_per_camera': (static / total).mean(axis=0).tolist(),
        'static_share_range': [float((static / total).min()), float((static / total).max())],
        'kept_share_per_camera': (kept / total).mean(axis=0).tolist(),
        'kept_of_static_max': float((kept.sum(axis=1) / static.sum(axis=1)).max()),
        'recall': float(np.nanmean(recalls)) if known else None,
        'decode_ms_median': float(np.median(decode_ms)),
        'total_ms_median': float(np.median(total_ms)),
        'total_ms_p95': float(np.percentile(total_ms, 95)),
    }


def summary_table(figures: dict[str, object]) -> Table:
    """The summary as a table for a terminal."""
    title = (
        f'{figures["queries"]} queries, {figures["method"]} alpha {figures["alpha"]:g}, '
        f'cameras {", ".join(figures["cameras"])}'
    )
    note = STAND_IN_NOTE if figures['stand_in'] else None
    table = Table(title=title, caption=note)
    for column in ('mode', 'queries', 'after static %', 'after layers %', 'recall %',
                   'decode ms', 'total ms', 'p95 ms'):  # fmt: skip
        table.add_column(column, justify='left' if column == 'mode' else 'right')
    for mode, row in figures['modes'].items():
        recall = row['recall']
        table.add_row(
            mode,
            str(row['queries']),
            _percent(row['static_share_per_camera']),
            _percent(row['kept_share_per_camera']),
            '-' if recall is None else f'{100 * recall:.0f}',
            f'{row["decode_ms_median"]:.1f}',
            f'{row["total_ms_median"]:.1f}',
            f'{row["total_ms_p95"]:.1f}',
        )
    return table


def _percent(shares: list[float]) -> str:
    return ' '.join(f'{100 * share:.0f}' for share in shares)


def plot_queries(reports: list[PruneReport], path: Path) -> None:
    """Kept tokens, mode and latency per query, as a picture."""
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(9, 6.5)
    heights = {'height_ratios': (3, 2, 2)}
    tokens, speed, latency = figure.subplots(3, sharex=True, gridspec_kw=heights)
    query = np.arange(len(reports))
    for index, camera in enumerate(reports[0].cameras):
        share = [100 * r.tokens_static[index] / r.tokens_total[index] for r in reports]
        kept = [100 * r.tokens_kept[index] / r.tokens_total[index] for r in reports]
        color = CAMERA_COLORS[index % len(CAMERA_COLORS)]
        tokens.plot(query, share, color=color, label=f'{camera} after static')
        tokens.plot(query, kept, '--', color=color, label=f'{camera} after layers')
    tokens.set(ylabel='patches kept, %', ylim=(0, 105))
    tokens.legend(fontsize=8, ncol=max(len(reports[0].cameras), 1))
    speed.plot(query, [r.translation_speed for r in reports], 'k.-', label='v_t')
    speed.plot(query, [r.rotation_speed for r in reports], '.-', color='#999999', label='v_r')
    speed.set(ylabel='executed speed,\n1 = full command')
    modes = [Mode(report.mode) for report in reports]
    for axis in (tokens, speed):
        for at, mode in enumerate(modes):
            axis.axvspan(at - 0.5, at + 0.5, color=MODE_COLORS[mode], alpha=0.12, lw=0)
    handles = [Patch(color=MODE_COLORS[m], alpha=0.3, label=m.name.lower()) for m in set(modes)]
    speed.legend(
        handles=[*speed.get_lines(), *handles],
        fontsize=8,
        loc='center left',
        bbox_to_anchor=(1, 0.5),
    )
    latency.bar(query, [1e3 * r.latency_total_s for r in reports], color='#cccccc', label='total')
    latency.bar(
        query, [1e3 * r.latency_decode_s for r in reports], color='#444444', label='decode'
    )
    latency.set(ylabel='latency, ms', xlabel='query')
    latency.xaxis.set_major_locator(MaxNLocator(integer=True))
    latency.legend(fontsize=8)
    title = f'{reports[0].method}, alpha {reports[0].alpha:g}, budget {reports[-1].budget}'
    figure.suptitle(f'{title}\n{STAND_IN_NOTE}' if reports[0].stand_in else title, fontsize=10)
    figure.savefig(path, dpi=110)
