"""What a benchmark found, as text and files; needs no package beside Python's own."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from specprune_ros.bench.ceilings import Ceilings
from specprune_ros.bench.latency import TOTAL, Part, Result, Row


def records_of(rows: Sequence[object], environment: Mapping[str, str]) -> list[dict]:
    """Rows as dictionaries, each with hardware and versions."""
    return [{**dataclasses.asdict(row), **environment} for row in rows]


def write_json(path: Path, records: Sequence[dict]) -> None:
    """A list of records."""
    path.write_text(json.dumps(records, indent=1) + '\n')


def write_csv(path: Path, records: Sequence[dict]) -> None:
    """One line per record; what is unknown stays empty."""
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=records[0])
        writer.writeheader()
        writer.writerows(records)


def rows_table(rows: Sequence[Row]) -> str:
    """Every row on a line."""
    lines = [
        f'{"cams":>4} {"method":<10} {"form":<13} {"stage":<10} {"median ms":>9} {"p95 ms":>9} '
        f'{"dense/this":>10} {"quartiles":>12} {"floor ms":>9} {"x floor":>7}'
    ]
    for row in rows:
        quartiles = f'{row.ratio_low:.2f}-{row.ratio_high:.2f}'
        lines.append(
            f'{row.cameras:>4} {row.method:<10} {row.form:<13} {row.stage:<10} '
            f'{row.median_ms:>9.2f} {row.p95_ms:>9.2f} {row.ratio_to_dense_sdpa:>9.2f}x '
            f'{quartiles:>12} {known(row.floor_ms, ".2f"):>9} {known(row.time_to_floor, ".2f"):>7}'
        )
    return '\n'.join(lines)


def pruning_table(rows: Sequence[Row]) -> str:
    """Per variant: what it keeps, its decoder's FLOPs, and its time against them."""
    lines = [
        f'{"cams":>4} {"method":<10} {"form":<13} {"kept %":>8} {"decoder FLOPs":>13} '
        f'{"time/(dense x FLOPs)":>20} {"action error mean":>17} {"max":>8}'
    ]
    decoders = {(r.cameras, r.method, r.form): r for r in rows if r.stage == 'decoder'}
    for row in (row for row in rows if row.stage == TOTAL):
        decoder = decoders.get((row.cameras, row.method, row.form))
        kept = f'{100 * row.kept_static:.0f} > {100 * row.kept_final:.0f}'
        against = known(decoder.against_flops if decoder else None, '.3f')
        lines.append(
            f'{row.cameras:>4} {row.method:<10} {row.form:<13} {kept:>8} '
            f'{100 * row.flops_share:>12.1f}% {against:>20} '
            f'{known(row.action_error_mean, ".5f"):>17} {known(row.action_error_max, ".5f"):>8}'
        )
    return '\n'.join(lines)


def breakdown_table(parts: Sequence[Part]) -> str:
    """What pruning adds."""
    lines = [
        f'{"cams":>4} {"method":<10} {"form":<13} {"part of pruning":<16} {"median ms":>9} '
        f'{"of dense":>9}'
    ]
    for part in parts:
        lines.append(
            f'{part.cameras:>4} {part.method:<10} {part.form:<13} {part.name:<16} '
            f'{part.median_ms:>9.3f} {100 * part.share_of_dense:>8.2f}%'
        )
    return '\n'.join(lines)


def notes(result: Result) -> list[str]:
    """What was left out, what did not run as its name says, and the ceilings."""
    lines = [f'form {form}: skipped: {why}' for form, why in result.lineup.skipped.items()]
    for variant in result.lineup.variants:
        graphs = variant.policy.graphs
        if variant.form == 'graph' and (graphs is None or not graphs.replays):
            lines.append(
                f'{variant.method} {variant.label}: no query was replayed, all ran eagerly'
            )
    cameras = result.lineup.variants[0].cameras
    return [*lines, f'ceilings at {cameras} cameras: {ceilings_text(result.ceilings)}']


def ceilings_text(ceilings: Ceilings) -> str:
    """The rates in usual units."""
    return (
        f'matrix products {ceilings.matmul_flops / 1e9:.4g} GFLOP/s, '
        f'memory {ceilings.memory_bytes / 1e9:.3g} GB/s, '
        f'upload {ceilings.upload_bytes / 1e9:.3g} GB/s'
    )


def known(value: float | None, form: str) -> str:
    """A number in a format; empty where there is none."""
    return '' if value is None else format(value, form)
