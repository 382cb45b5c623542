"""Compare a checkpoint with stored outputs of its reference implementation, tensor by tensor.

The golden folder holds inputs.npz (images_uint8, input_ids, proprio_raw) and outputs.npz.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from specprune_ros.cli.options import add_config_arguments, config_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument('folder', type=Path, help='checkpoint folder')
    parser.add_argument(
        '--golden', type=Path, required=True, metavar='DIR', help='folder of reference vectors'
    )
    add_config_arguments(parser)
    parser.set_defaults(params_default=['robots/libero_franka', 'models/openvla_oft'])


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0; 1 when a tensor is off by more than its tolerance.
    """
    from specprune_ros.errors import ConfigError
    from specprune_ros.models import pick_device
    from specprune_ros.models.openvla_checkpoint import load
    from specprune_ros.verify import StoredPrompt, compare, read_vectors

    inputs, outputs = read_vectors(arguments.golden)
    if 'input_ids' not in inputs:
        raise ConfigError('--golden', str(arguments.golden), 'inputs.npz lacks input_ids')
    config = config_from(arguments)
    model = dataclasses.replace(config.model, checkpoint=str(arguments.folder))
    config = dataclasses.replace(config, model=model)
    loaded = load(config, pick_device(config.model.device), StoredPrompt(inputs['input_ids']))
    print(f'{loaded.info.name}, {loaded.info.parameters / 1e6:.1f} M parameters')
    print(f'{"tensor":<34}{"largest error":>14}{"mean error":>12}{"tolerance":>11}')
    failed = 0
    for error in compare(loaded, config.robot, inputs, outputs):
        failed += not error.within
        mark = '' if error.within else '  OFF'
        print(
            f'{error.name:<34}{error.worst:>14.2e}{error.mean:>12.2e}{error.tolerance:>11.0e}{mark}'
        )
    print(f'{failed} tensors off' if failed else 'all within tolerance (float32)')
    return 1 if failed else 0
