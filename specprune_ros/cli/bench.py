"""Time dense and pruned inference, interleaved in one run.

End to end from uint8 images on the host to actions on the host, coarse and fine mode mixed 1:1.
Times are in ms; dense/this is the time of the dense model with fused attention (form sdpa) over
this one's, so 2 is twice as fast. The floor is the least time by what the machine was seen to do
at best: matrix products at the model's own shapes, and copies. The model is the stand-in
models/tiny unless --params says otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from specprune_ros.cli.options import (
    add_config_arguments,
    at_least,
    check_output,
    config_from,
    refuse_given,
)
from specprune_ros.config import PolicyConfig
from specprune_ros.errors import ConfigError, SpecPruneError

EXAMPLE = """
examples:
  specprune bench --params models/shrunk_7b --cameras 2 --repeats 60 --json rows.json
  specprune bench --params models/shrunk_7b --work --csv work.csv --plot work.png
  specprune bench --forms sdpa fused compile int8      # with what they do to the actions
"""
MODEL_SIDE = 224
REPEATS = 30
CAMERAS, WORK_CAMERAS = (1, 2, 3), (1, 2, 3, 4)
FORMS_SHOWN = ('eager', 'sdpa', 'fused', 'graph')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    add_config_arguments(parser)
    parser.add_argument(
        '--cameras', type=int, nargs='+', choices=range(1, 5), metavar='N',
        help='numbers of cameras, 1 to 4; all variants and stages for each '
        f'(default {" ".join(map(str, CAMERAS))}) (with --work: 1 to 4)',
    )  # fmt: skip
    parser.add_argument(
        '--repeats', type=int, default=REPEATS, metavar='N',
        help='queries per variant (default %(default)s)',
    )  # fmt: skip
    parser.add_argument(
        '--methods', nargs='+', metavar='NAME',
        help='pruning methods beside the dense model (default: the configured one)',
    )  # fmt: skip
    parser.add_argument(
        '--forms', nargs='+', metavar='NAME',
        help='forms of the decoder, of eager, sdpa, fused, graph, compile, int8, fp8; the last '
        'three and graph with their error in the actions; what the machine cannot run is left '
        f'out with a line (default {" ".join(FORMS_SHOWN)}; with --work one, fused)',
    )  # fmt: skip
    parser.add_argument(
        '--breakdown', action='store_true',
        help='also what every part of pruning costs, in ms and %% of dense (default: no)',
    )  # fmt: skip
    parser.add_argument(
        '--profile', action='store_true',
        help='also operators, kernel launches, waits and copies per query, by a profiler '
        '(default: no)',
    )  # fmt: skip
    parser.add_argument(
        '--work', action='store_true',
        help='instead: time against 64 to 576 patches per camera and alpha 0.4 to 1.0, of a '
        'stand-in (default: no)',
    )  # fmt: skip
    parser.add_argument(
        '--patches', type=int, nargs='+', metavar='N',
        help='with --work: patches per camera, squares (default 64 144 256 400 576)',
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
    parser.add_argument(
        '--plot', type=Path, metavar='FILE', help='a picture, png or svg (default: nowhere)'
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    config = config_from(arguments)
    refuse_unused(arguments)
    if arguments.preprocessing:
        return compare_preprocessing(config, arguments.preprocessing)
    at_least('repeats', arguments.repeats, 1)
    check_outputs(arguments)  # before the measurement, not after it
    if arguments.work:
        return run_work(arguments, config)
    return run_variants(arguments, config)


def refuse_unused(arguments: argparse.Namespace) -> None:
    """Refuse what the chosen measurement does not look at.

    Raises:
        ConfigError: that was given.
    """
    of_variants = {'breakdown': False, 'profile': False}
    if arguments.preprocessing:
        others = {'cameras': None, 'methods': None, 'forms': None, 'work': False, 'patches': None}
        files = {'csv': None, 'json': None, 'plot': None, 'repeats': REPEATS}
        why = 'does not go with --preprocessing'
        refuse_given(arguments, why, {**others, **of_variants, **files})
    elif arguments.work:
        refuse_given(arguments, 'does not go with --work', of_variants)
    else:
        refuse_given(arguments, 'needs --work', {'patches': None})


def run_variants(arguments: argparse.Namespace, config: PolicyConfig) -> int:
    """Time methods and forms against the dense model."""
    from specprune_ros.bench import latency, output
    from specprune_ros.bench.launches import launches_of, launches_table
    from specprune_ros.bench.variants import make_lineup

    methods = arguments.methods or [config.pruning.method]
    environment: dict[str, str] = {}
    rows, tables = [], []
    for cameras in arguments.cameras or CAMERAS:
        lineup = result = None  # their weights go before others come
        lineup = make_lineup(config, cameras, methods, arguments.forms or FORMS_SHOWN)
        environment = environment or print_machine(config)  # as the model has set it up
        result = latency.run(lineup, arguments.repeats)
        rows += latency.rows_of(result)
        write(arguments, rows, environment)  # whatever becomes of the rest
        print('\n'.join(output.notes(result)))
        if arguments.breakdown:
            tables.append(output.breakdown_table(latency.breakdown(result)))
        if arguments.profile:
            tables.append(launches_table([launches_of(one) for one in lineup.variants]))
    name = lineup.variants[0].policy.model.info.name
    print(f'model {name}')
    print(f'alpha {config.pruning.alpha:g}, {arguments.repeats} queries each, coarse:fine 1:1')
    print('\n\n'.join([output.rows_table(rows), output.pruning_table(rows), *tables]))
    if arguments.plot:
        from specprune_ros.bench.plots import plot_rows

        plot_rows(rows, f'{name}, {environment["hardware"]}', arguments.plot)
    return 0


def run_work(arguments: argparse.Namespace, config: PolicyConfig) -> int:
    """Time against tokens, pruned and dense."""
    from specprune_ros.bench import work

    if len(arguments.forms or ()) > 1:
        raise ConfigError('--forms', arguments.forms, '--work takes one')
    if len(arguments.methods or ()) > 1:
        raise ConfigError('--methods', arguments.methods, '--work takes one')
    form = (arguments.forms or ['fused'])[0]
    if arguments.methods:
        pruning = dataclasses.replace(config.pruning, method=arguments.methods[0])
        config = dataclasses.replace(config, pruning=pruning)
    cameras, patches = arguments.cameras or WORK_CAMERAS, arguments.patches or work.PATCHES
    points = list(
        work.sweep(config, cameras=cameras, patches=patches, form=form, repeats=arguments.repeats)
    )
    environment = print_machine(config)
    title = f'{config.model.name}, {config.pruning.method}, form {points[-1].form}'
    print(f'{title}, {arguments.repeats} queries each, coarse:fine 1:1')
    print(work.work_table(points))
    write(arguments, points, environment)
    if arguments.plot:
        from specprune_ros.bench.plots import plot_work

        plot_work(points, f'{title}, {environment["hardware"]}', arguments.plot)
    return 0


def print_machine(config: PolicyConfig) -> dict[str, str]:
    """Say hardware and versions, and return them."""
    from specprune_ros.bench.latency import environment
    from specprune_ros.models import pick_device

    found = environment(pick_device(config.model.device))
    print(', '.join(f'{key} {value}' for key, value in found.items()))
    return found


def write(arguments: argparse.Namespace, rows: list, environment: dict[str, str]) -> None:
    """Write the files that were asked for."""
    from specprune_ros.bench import output

    records = output.records_of(rows, environment)
    if arguments.json:
        output.write_json(arguments.json, records)
    if arguments.csv:
        output.write_csv(arguments.csv, records)


def compare_preprocessing(config: PolicyConfig, path: str) -> int:
    """Print how far fast preprocessing is from exact on a recording."""
    from specprune_ros.bench.preprocessing import compare
    from specprune_ros.images import as_rgb
    from specprune_ros.offline import fit_robot, run_recording, skipped_words
    from specprune_ros.policy import Policy
    from specprune_ros.recordings import open_recording

    recording = open_recording(path, robot=config.robot)
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
    print_machine(config)
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


def check_outputs(arguments: argparse.Namespace) -> None:
    """See that all files can be written.

    Raises:
        ConfigError: one cannot.
        MissingDependencyError: a picture is asked for, and matplotlib is missing.
    """
    for name in ('json', 'csv', 'plot'):
        if path := getattr(arguments, name):
            check_output(name, path)
    if arguments.plot:
        from specprune_ros.bench.plots import require_matplotlib

        require_matplotlib()
