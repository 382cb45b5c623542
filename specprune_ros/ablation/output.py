"""What an ablation leaves behind: tables for a terminal and for documents, JSON, CSV, plots."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rich.table import Table

from specprune_ros.ablation.panel import QueryFigures
from specprune_ros.ablation.runner import Ablation
from specprune_ros.ablation.studies import Study
from specprune_ros.ablation.summary import FIGURES, INTERVAL, Figure, VariantSummary
from specprune_ros.outputs import new_figure, plain
from specprune_ros.runlog import MODE_COLORS
from specprune_ros.types import Mode

PAPER = 'paper, LIBERO closed loop'
QUERIES = 'queries.csv'
WIDTH = 120  # columns that a terminal table needs
STAND_IN_WARNING = (
    'STAND-IN WEIGHTS: recall and action error are meaningless as evidence about a trained model.'
)
# latency -> its ratio to dense, which a terminal shows under it
RATIOS = {'decode_ms': 'decode_ratio', 'total_ms': 'total_ratio'}
NOT_ON_TERMINAL = ('recall_supplemented', *RATIOS.values())
Summaries = Mapping[str, Sequence[VariantSummary]]  # study -> its rows


def evidence(ablation: Ablation) -> str:
    """What the figures are evidence of, in two or three sentences."""
    seeds = ', '.join(map(str, ablation.seeds))
    which = f'Seeds: {seeds}; seed s {ablation.seed_meaning}.'
    if not ablation.closed_loop:
        which += ' Open loop: every variant sees the same observations, whatever it answers.'
    if ablation.model.stand_in:
        which += f' {STAND_IN_WARNING}'
    return which


def hardware(ablation: Ablation) -> str:
    """Where it ran, in one line."""
    machine = dict(ablation.environment)
    versions = [f'{key} {value}' for key, value in machine.items() if key != 'hardware']
    return ', '.join([machine['hardware'], *versions])


def cell(figure: Figure, summary: VariantSummary) -> tuple[str, str]:
    """Estimate and its spread: half the interval of a mean, the quartiles of a median."""
    found = summary.estimates[figure.name]
    if not math.isfinite(found.value):
        return '-', ''
    value, low, high = (
        f'{figure.scale * x:.{figure.digits}f}' for x in (found.value, found.low, found.high)
    )
    half = figure.scale * (found.high - found.low) / 2
    return value, f'({low}-{high})' if figure.median else f'±{half:.{figure.digits}f}'


def modes_text(summary: VariantSummary) -> list[str]:
    """Every mode that occurred, with its share of the queries."""
    return [f'{mode} {100 * share:.0f}' for mode, share in summary.modes.items()]


def outcome_text(summary: VariantSummary) -> str:
    """Mean over episodes of what a closed-loop task says of them."""
    names = [name for name in summary.outcomes[0] if name != 'seed']
    means = {name: fmean(end[name] for end in summary.outcomes) for name in names}
    return ', '.join(f'{name} {mean:.3g}' for name, mean in means.items())


def terminal_table(study: Study, summaries: Sequence[VariantSummary], ablation: Ablation) -> Table:
    """One study for a terminal; the second line of a cell is the spread, or dense / variant."""
    caption = ' '.join(filter(None, (study.note, ablation.model.stand_in and STAND_IN_WARNING)))
    table = Table(title=heading(study), caption=caption, caption_justify='left', padding=(0, 0))
    table.add_column('variant')
    figures = [figure for figure in FIGURES if figure.name not in NOT_ON_TERMINAL]
    for name in ('modes %', *(figure.heading.replace(', ', '\n') for figure in figures)):
        table.add_column(name, justify='right')
    for name in _last_columns(ablation):
        table.add_column(name)
    for summary in summaries:
        cells = ['\n'.join(_terminal_cell(figure, summary)) for figure in figures]
        modes = '\n'.join(modes_text(summary))
        table.add_row(summary.variant.name, modes, *cells, *_last_cells(ablation, summary))
    return table


def _terminal_cell(figure: Figure, summary: VariantSummary) -> tuple[str, str]:
    value, spread = cell(figure, summary)
    if figure.name in RATIOS:
        return value, f'{summary.estimates[RATIOS[figure.name]].value:.2f}x'
    return value, spread


def _last_columns(ablation: Ablation) -> list[str]:
    return [*(['outcome'] if ablation.closed_loop else []), PAPER]


def _last_cells(ablation: Ablation, summary: VariantSummary) -> list[str]:
    outcome = [outcome_text(summary)] if ablation.closed_loop else []
    return [*outcome, summary.variant.paper.text() or '-']


def heading(study: Study) -> str:
    """A study's name, what it varies, and where the paper has it."""
    return f'{study.name}: {study.title} ({study.source or "no study of the paper"})'


def write_all(ablation: Ablation, summaries: Summaries, out: Path, json_path: Path) -> None:
    """Write ablation.json, queries.csv, ablation.md and one plot per study.

    Args:
        ablation: what was run.
        summaries: of its studies.
        out: folder, which exists.
        json_path: where the JSON goes.
    """
    tree = plain(as_tree(ablation, summaries))
    json_path.write_text(json.dumps(tree, indent=1, allow_nan=False) + '\n')
    write_csv(ablation, out / QUERIES)
    (out / 'ablation.md').write_text(markdown(ablation, summaries))
    for study in ablation.studies:
        plot(study, summaries[study.name], ablation, out / f'{study.name}.png')


def as_tree(ablation: Ablation, summaries: Summaries) -> dict[str, object]:
    """Everything but the single queries, as JSON knows it."""
    return {
        'task': ablation.task,
        'closed_loop': ablation.closed_loop,
        'model': dataclasses.asdict(ablation.model),
        'evidence': evidence(ablation),
        'seeds': {'values': ablation.seeds, 'a_seed': ablation.seed_meaning},
        'interval': INTERVAL,
        'environment': dict(ablation.environment),
        'figures': {figure.name: figure.meaning for figure in FIGURES},
        'base': dataclasses.asdict(ablation.base),
        'studies': [_study_tree(study, summaries[study.name]) for study in ablation.studies],
    }


def _study_tree(study: Study, summaries: Sequence[VariantSummary]) -> dict[str, object]:
    variants = [
        {
            'name': summary.variant.name,
            'overrides': dict(summary.variant.overrides),
            'paper': dataclasses.asdict(summary.variant.paper),
            'modes': dict(summary.modes),
            'budgets': summary.budgets,
            'estimates': {
                figure.name: {
                    'statistic': 'median' if figure.median else 'mean',
                    **dataclasses.asdict(summary.estimates[figure.name]),
                }
                for figure in FIGURES
            },
            'by_seed': {str(seed): dict(values) for seed, values in summary.by_seed.items()},
            'outcomes': [dict(outcome) for outcome in summary.outcomes],
        }
        for summary in summaries
    ]
    return {
        'name': study.name,
        'title': study.title,
        'source': study.source,
        'note': study.note,
        'variants': variants,
    }


def write_csv(ablation: Ablation, path: Path) -> None:
    """One line per study, variant, seed and query; an empty cell is unknown."""
    names = [spec.name for spec in dataclasses.fields(QueryFigures)]
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['study', 'variant', *names])
        for study in ablation.studies:
            for variant in study.variants:
                for row in ablation.figures[variant.configured(ablation.base)]:
                    values = (plain(getattr(row, name)) for name in names)
                    writer.writerow([study.name, variant.name, *values])


def markdown(ablation: Ablation, summaries: Summaries) -> str:
    """All tables with what is needed to read them."""
    lines = [
        '# Ablation studies',
        '',
        evidence(ablation),
        '',
        f'- task: `{ablation.task}`, cameras {", ".join(ablation.model.cameras)}',
        f'- model: {ablation.model.name}',
        f'- ran on: {hardware(ablation)}',
        f'- {INTERVAL}',
        *(f'- `{figure.heading}`: {figure.meaning}' for figure in FIGURES),
        f'- `{PAPER}`: other weights, hardware and observations; SR is the success rate',
    ]
    for study in ablation.studies:
        lines += [
            '',
            f'## {heading(study)}',
            '',
            *_markdown_table(summaries[study.name], ablation),
        ]
        lines += ['', study.note] if study.note else []
        lines += ['', f'![{study.name}]({study.name}.png)']
    return '\n'.join(lines) + '\n'


def _markdown_table(summaries: Sequence[VariantSummary], ablation: Ablation) -> list[str]:
    last = _last_columns(ablation)
    lines = [['variant', 'modes %', *(figure.heading for figure in FIGURES), *last]]
    lines.append(['---', '---', *('---:' for _ in FIGURES), *('---' for _ in last)])
    for summary in summaries:
        cells = [' '.join(cell(figure, summary)).strip() for figure in FIGURES]
        modes = ', '.join(modes_text(summary))
        lines.append([summary.variant.name, modes, *cells, *_last_cells(ablation, summary)])
    return [f'| {" | ".join(line)} |' for line in lines]


# heading, figures side by side, factor
PANELS = (
    ('visual tokens and FLOPs, %', ('static_share', 'final_share', 'flops_share'), 100),
    ('important tokens, %', ('kept_static', 'kept_final', 'recall'), 100),
    ('action error, mean and worst element', ('action_error', 'action_error_max'), 1),
    ('latency, dense / variant', ('decode_ratio', 'total_ratio'), 1),
)
COLORS = ('#0072b2', '#56b4e9', '#e69f00')


def plot(
    study: Study, summaries: Sequence[VariantSummary], ablation: Ablation, path: Path
) -> None:
    """Bars per variant with their spread, and the modes, as a picture."""
    picture = new_figure(15, 1.8 + 0.6 * len(summaries))
    axes = picture.subplots(1, len(PANELS) + 1, sharey=True)
    for axis, (title, names, factor) in zip(axes, PANELS, strict=False):
        _bars(axis, summaries, names, factor)
        axis.set_title(title, fontsize=9)
    _mode_bars(axes[-1], summaries)
    axes[0].set_yticks(range(len(summaries)), [s.variant.name for s in summaries])
    axes[0].invert_yaxis()
    warning = ', STAND-IN WEIGHTS: no evidence' if ablation.model.stand_in else ''
    picture.suptitle(f'{heading(study)}{warning}', fontsize=10)
    picture.savefig(path, dpi=100)


def _bars(
    axis, summaries: Sequence[VariantSummary], names: tuple[str, ...], factor: float
) -> None:
    headings = {figure.name: figure.heading for figure in FIGURES}
    height = 0.8 / len(names)
    for index, name in enumerate(names):
        found = [summary.estimates[name] for summary in summaries]
        at = [row - 0.4 + (index + 0.5) * height for row in range(len(found))]
        values = [factor * one.value for one in found]
        spread = [
            [factor * max(one.value - one.low, 0) for one in found],
            [factor * max(one.high - one.value, 0) for one in found],
        ]
        label = headings[name].removesuffix(' %').removesuffix(', e-3')
        axis.barh(at, values, height, color=COLORS[index], label=label)
        axis.errorbar(values, at, xerr=spread, fmt='none', ecolor='black', lw=1)
    _legend(axis)


def _mode_bars(axis, summaries: Sequence[VariantSummary]) -> None:
    left = [0.0] * len(summaries)
    for mode, color in MODE_COLORS.items():
        shares = [100 * summary.modes.get(Mode(mode).name.lower(), 0.0) for summary in summaries]
        if any(shares):
            axis.barh(
                range(len(left)), shares, 0.8, left, color=color, label=Mode(mode).name.lower()
            )
        left = [start + share for start, share in zip(left, shares, strict=True)]
    axis.set_title('modes, % of the queries', fontsize=9)
    _legend(axis)


def _legend(axis) -> None:
    axis.legend(fontsize=7, ncol=3, loc='upper center', bbox_to_anchor=(0.5, -0.08), frameon=False)
