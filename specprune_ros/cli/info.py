"""Say what a checkpoint folder holds, what is missing, and how to launch it.

Reads headers and small files only.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from specprune_ros.errors import SpecPruneError

if TYPE_CHECKING:
    from specprune_ros.models.openvla_folder import Folder

HEADS = {
    'l1': 'L1 regression, continuous actions in one pass',
    'diffusion': 'diffusion, continuous actions in one pass per denoising step',
    'latent': 'latent-action tokens and a decoder, continuous actions in four passes',
    'discrete': 'no file: discrete tokens, of plain OpenVLA (launch it with model:=openvla) or of '
    'OpenVLA-OFT (model:=openvla_oft); nothing in the files tells which',
}
OWN_ROBOT = '/path/to/my_robot.yaml'
# (does the action's width and dataset name look like it) -> robot file to start from
ROBOTS = (('aloha', 14), ('bridge', 7), ('libero', 7))
ROBOT_FILES = {'aloha': 'aloha', 'bridge': 'bridge_widowx', 'libero': 'libero_franka'}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument('folder', type=Path, help='checkpoint folder')


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        0; 1 when something is missing or broken.
    """
    from specprune_ros.models.openvla_folder import Folder

    folder = Folder.open(arguments.folder)
    problems: list[str] = []
    for label, describe in DESCRIPTIONS.items():
        try:
            text = describe(folder)
        except SpecPruneError as error:
            problems.append(str(error))
            text = 'broken, see below'
        print(f'{label + ":":<16}{text}')
    problems += missing(folder)
    print('missing:' if problems else 'missing:        nothing')
    for problem in dict.fromkeys(problems):
        print(f'  - {problem}')
    for line in launch_lines(folder):
        print(f'launch:         {line}')
    return 1 if problems else 0


def models(folder: Folder) -> list[str]:
    """Which models the folder may be, keys of VARIANTS; nothing in it tells some apart."""
    by_head = {'latent': ['univla'], 'discrete': ['openvla', 'openvla_oft']}
    return by_head.get(folder.head, ['openvla_oft'])


def architecture(folder: Folder) -> str:
    """Name, and sizes of the language model and the vision towers."""
    from specprune_ros.models.openvla_folder import VARIANTS

    title = ' or '.join(VARIANTS[model].title for model in models(folder))
    llama = folder.llama
    towers = ' + '.join(
        f'{name} {tower.depth} x {tower.width}'
        for name, tower in zip(('DINOv2', 'SigLIP'), folder.towers, strict=True)
    )
    return (
        f'{title} (Llama {llama["num_hidden_layers"]} layers x {llama["hidden_size"]}; {towers}'
        f'{"; FiLM" if folder.film else ""})'
    )


def size(folder: Folder) -> str:
    """Parameters and bytes on disk."""
    weights = folder.checkpoint.weights()
    count = sum(math.prod(weight.shape) for weight in weights.values())
    files = {weight.file for weight in weights.values()}
    total = sum(file.stat().st_size for file in files)
    return f'{count / 1e6:,.1f} M parameters, {total / 1e9:.3f} GB in {len(files)} file(s)'


def head(folder: Folder) -> str:
    """Kind of action head and its width."""
    width = folder.action_dim
    return HEADS[folder.head] + (f', {width} action elements' if width else '')


def proprio(folder: Folder) -> str:
    """Width of the proprioceptive state."""
    width = folder.proprio_dim
    return f'{width} elements' if width else 'none'


def cameras(folder: Folder) -> str:
    """What can be said of the cameras."""
    pixels = folder.towers[0].image_size
    if folder.head == 'latent':
        return f'exactly 1, {pixels} x {pixels}'
    most = 'exactly 1 as plain OpenVLA, ' if folder.head == 'discrete' else ''
    return (
        f'{most}1 to 4, {pixels} x {pixels}; the files do not say how many: give the robot file '
        'as many as the training had, in its order'
    )


def chunk(folder: Folder) -> str:
    """What can be said of the chunk length."""
    if folder.horizon is not None:
        return f'{folder.horizon} steps, which robot.horizon must be'
    single = '1 step as plain OpenVLA, else ' if folder.head == 'discrete' else ''
    return f'{single}not in the files: robot.horizon must be what the training had'


def statistics(folder: Folder) -> str:
    """Datasets whose statistics the folder holds."""
    return ', '.join(folder.checkpoint.statistics())


DESCRIPTIONS: dict[str, Callable[[Folder], str]] = {
    'architecture': architecture,
    'size': size,
    'action head': head,
    'proprioception': proprio,
    'cameras': cameras,
    'chunk': chunk,
    'statistics': statistics,
}


def missing(folder: Folder) -> list[str]:
    """What the folder lacks to run."""
    lacks = []
    if not any((folder.path / name).is_file() for name in ('tokenizer.json', 'tokenizer.model')):
        lacks.append('tokenizer.json (or tokenizer.model)')
    try:
        if folder.head == 'diffusion' and folder.noisy_action_projector is None:
            lacks.append('noisy_action_projector--*_checkpoint.pt, which a diffusion head needs')
    except SpecPruneError:
        pass  # a broken head is reported where it is described
    return lacks


def launch_lines(folder: Folder) -> list[str]:
    """A command for each model that the folder may be, with the robot file that fits best."""
    try:
        names = list(folder.checkpoint.statistics())
    except SpecPruneError:
        names = []
    try:
        candidates, width = models(folder), folder.action_dim
    except SpecPruneError:
        candidates, width = ['openvla_oft'], None
    key = f' unnorm_key:={names[0]}' if len(names) > 1 else ''
    return [
        f'ros2 launch specprune_ros vla.launch.py model:={model} '
        f'checkpoint:={folder.path.resolve()} robot:={robot_file(model, names, width)}{key}'
        for model in candidates
    ]


def robot_file(model: str, datasets: list[str], width: int | None) -> str:
    """The shipped robot file that fits best; all of them are made for OpenVLA-OFT."""
    if model != 'openvla_oft':
        return OWN_ROBOT
    robot = OWN_ROBOT
    for word, needed in ROBOTS:
        if any(word in name for name in datasets) and width in (None, needed):
            robot = ROBOT_FILES[word]
    return robot
