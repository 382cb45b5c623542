"""Time dense and pruned inference, interleaved in one run.

End to end from uint8 images on the host to actions on the host, coarse and fine mode mixed 1:1.
Times are in ms; dense/this is dense time over this variant's, so 2 is twice as fast. The model is
the stand-in models/tiny unless --params says otherwise.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path

from specprune_ros.cli.options import add_config_arguments, at_least, config_from
from specprune_ros.config import PolicyConfig
from specprune_ros.errors import ConfigError, SpecPruneError

EXAMPLE = """
example, two cameras, with every row in a file:
  specprune bench --params models/shrunk_7b --cameras 2 --repeats 60 --json rows.json
"""
MODEL_SIDE = 224
CAMERAS, REPEATS = (1, 2, 3), 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    add_config_arguments(parser)
    parser.add_argument(
        '--cameras', type=int, nargs='+', default=CAMERAS, choices=range(1, 5), metavar='N',
        help='numbers of cameras, 1 to 4; one table row each per variant and stage '
        f'(default {" ".join(map(str, CAMERAS))})',
    )  # fmt: skip
    parser.add_argument(
        '--repeats', type=int, default=REPEATS, metavar='N',
        help='queries per variant (default %(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--breakdown', action='store_true',
        help='also what every part of pruning costs, in ms and %% of dense (default: no)',
    )  # fmt: skip
    parser.add_argument(
        '--preprocessing', metavar='RECORDING',
        help='instead: exact against fast preprocessing, ms and difference, on a recording '
        '(default: no)',
    )  # fmt: skip
    parser.add_argument(
        '--csv', type=Path, metavar='FILE', help='write all rows here (default: nowhere)'
    )
    parser.add_argument(
        '--json', type=Path, metavar='FILE', help='likewise, as a list (default: nowhere)'
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from specprune_ros.bench import latency
    from specprune_ros.models import pick_device

    config = config_from(arguments)
    if arguments.preprocessing:
        return compare_preprocessing(config, arguments.preprocessing)
    repeats = at_least('repeats', arguments.repeats, 1)
    for path in filter(None, (arguments.json, arguments.csv)):
        check_writable(path)  # before the measurement, not after it
    rows, parts = [], []
    for cameras in arguments.cameras:
        variants = latency.make_variants(config, cameras)
        runs = list(latency.measure(variants, repeats))
        rows += latency.rows_of(variants, runs)
        parts += latency.breakdown(variants, runs)
    environment = latency.environment(pick_device(config.model.device))
    print(', '.join(f'{key} {value}' for key, value in environment.items()))
    print(f'model {variants[0].policy.model.info.name}')
    print(f'alpha {config.pruning.alpha:g}, {repeats} queries each, coarse:fine 1:1')
    print(table(rows))
    if arguments.breakdown:
        print(breakdown_table(parts))
    records = [{**dataclasses.asdict(row), **environment} for row in rows]
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + '\n')
    if arguments.csv:
        with arguments.csv.open('w', newline='') as file:
            writer = csv.DictWriter(file, fieldnames=records[0])
            writer.writeheader()
            writer.writerows(records)
    return 0


def compare_preprocessing(config: PolicyConfig, path: str) -> int:
    """Print how far fast preprocessing is from exact on a recording."""
    from specprune_ros.bench import latency
    from specprune_ros.bench.preprocessing import compare
    from specprune_ros.images import as_rgb
    from specprune_ros.models import pick_device
    from specprune_ros.offline import fit_robot, run_recording, skipped_words
    from specprune_ros.policy import Policy
    from specprune_ros.recordings import open_recording

    recording = open_recording(path)
    config = fit_robot(config, recording)
    steps = list(run_recording(Policy.load(config), recording))
    observations = [step[0] for step in steps if isinstance(step, tuple)]
    skipped = skipped_words(step for step in steps if isinstance(step, SpecPruneError))
    if len(observations) < 2:
        raise ConfigError('--preprocessing', path, f'needs at least two queries; {skipped}')
    decoded = [
        dataclasses.replace(
            observation, images={name: as_rgb(image) for name, image in observation.images.items()}
        )
        for observation in observations
    ]
    result = compare(config, decoded)
    environment = latency.environment(pick_device(config.model.device))
    print(', '.join(f'{key} {value}' for key, value in environment.items()))
    shapes = {image.shape[:2] for image in decoded[0].images.values()}
    if shapes == {(MODEL_SIDE, MODEL_SIDE)}:
        print("NOTE: the images have the model's size: no JPEG and no resize, little to compare")
    print(f'{len(decoded)} queries, {len(config.robot.camera_names)} cameras of {sorted(shapes)}')
    if skipped:
        print(skipped)
    print(f'time:    exact {result.exact_ms:.2f} ms, fast {result.fast_ms:.2f} ms, all cameras')
    print(f'pixels:  differ by {result.pixel_mean:.3f} on average, {result.pixel_max:.0f} at most')
    print(
        f'actions: differ by {result.action_mean:.5f} on average, {result.action_max:.5f} at most '
        f'(normalised, dense; from query to query they change by {result.action_step:.5f})'
    )
    return 0


def check_writable(path: Path) -> None:
    """See that a file can be written.

    Raises:
        ConfigError: it cannot.
    """
    try:
        path.open('a').close()
    except OSError as error:
        raise ConfigError('--json or --csv', str(path), f'cannot be written: {error}') from error


def table(rows: list) -> str:
    """The rows as text; without a dependency, so that a bare PyTorch machine prints it too."""
    lines = [
        f'{"cameras":>7} {"method":<10} {"form":<11} {"stage":<10} {"median ms":>9} {"p95 ms":>8} '
        f'{"dense/this":>10} {"quartiles":>11} {"kept %":>9}'
    ]
    for row in rows:
        kept = f'{100 * row.kept_static:.0f} > {100 * row.kept_final:.0f}'
        quartiles = f'{row.ratio_low:.2f}-{row.ratio_high:.2f}'
        lines.append(
            f'{row.cameras:>7} {row.method:<10} {row.form:<11} {row.stage:<10} '
            f'{row.median_ms:>9.2f} {row.p95_ms:>8.2f} {row.ratio_to_dense_sdpa:>9.2f}x '
            f'{quartiles:>11} {kept:>9}'
        )
    return '\n'.join(lines)


def breakdown_table(parts: list) -> str:
    """What pruning adds, as text."""
    lines = [
        f'{"cameras":>7} {"form":<11} {"part of pruning":<16} {"median ms":>9} {"of dense":>9}'
    ]
    for part in parts:
        lines.append(
            f'{part.cameras:>7} {part.form:<11} {part.name:<16} {part.median_ms:>9.3f} '
            f'{100 * part.share_of_dense:>8.2f}%'
        )
    return '\n'.join(lines)
