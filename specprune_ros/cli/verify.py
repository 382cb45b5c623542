"""Compare a checkpoint with stored outputs of its reference implementation, tensor by tensor.

The golden folder holds inputs.npz (images_uint8, input_ids, proprio_raw) and outputs.npz; or it is
one inside of such a folder, with outputs.npz alone (FiLM, diffusion) or io.npz (ALOHA). The model
is loaded as float32 unless --set model.dtype says otherwise, and with robots/libero_franka and
models/openvla_oft unless --params says otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from specprune_ros.cli.info import counted
from specprune_ros.cli.options import add_config_arguments, config_from
from specprune_ros.errors import ConfigError

EXAMPLE = """
example, a checkpoint with FiLM against the vectors of one:
  specprune verify ~/my_film_checkpoint --golden test/data/golden/openvla_oft/film

errors and tolerances are in the unit of the tensor that they belong to; exit status 1 when one
is off, 2 when nothing could be compared
"""

if TYPE_CHECKING:
    from specprune_ros.verify import TensorError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    parser.add_argument('folder', type=Path, help='checkpoint folder')
    parser.add_argument(
        '--golden', type=Path, required=True, metavar='DIR',
        help='required: folder of reference vectors, or one inside of it, such as film',
    )  # fmt: skip
    add_config_arguments(parser)
    parser.set_defaults(params_default=['robots/libero_franka', 'models/openvla_oft'])


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0; 1 when a tensor is off by more than its tolerance.
    """
    from specprune_ros.models import pick_device
    from specprune_ros.models.openvla_checkpoint import load
    from specprune_ros.verify import (
        StoredPrompt,
        compare,
        for_reference,
        read_vectors,
        without_tf32,
    )

    inputs, outputs = read_vectors(arguments.golden)
    if 'input_ids' not in inputs:
        raise ConfigError('--golden', str(arguments.golden), 'the inputs lack input_ids')
    given = {text.partition('=')[0].strip() for text in arguments.set}
    config = for_reference(config_from(arguments), outputs, given)
    model = dataclasses.replace(config.model, checkpoint=str(arguments.folder))
    config = dataclasses.replace(config, model=model)
    with without_tf32():
        loaded = load(config, pick_device(model.device), StoredPrompt(inputs['input_ids']))
        errors = list(compare(loaded, config.robot, inputs, outputs))
    print(f'{loaded.info.name}, {counted(loaded.info.parameters)} parameters, {model.dtype}')
    return show(errors, sorted(set(outputs) - {error.name for error in errors}))


def show(errors: list[TensorError], passed_over: list[str]) -> int:
    """Print what was compared and what was not.

    Returns:
        0; 1 when a tensor is off.
    """
    print(f'{"tensor":<38}{"largest error":>14}{"mean error":>12}{"tolerance":>11}')
    failed = 0
    for error in errors:
        failed += not error.within
        mark = '' if error.within else f'  OFF {error.note}'.rstrip()
        print(
            f'{error.name:<38}{error.worst:>14.2e}{error.mean:>12.2e}{error.tolerance:>11.0e}{mark}'
        )
    print(f'passed over: {", ".join(passed_over) or "nothing"}')
    count = len(errors)
    print(
        f'{failed} of {count} tensors off'
        if failed
        else f'all within tolerance (float32): {count} tensors'
    )
    return 1 if failed else 0
