"""Say what a checkpoint folder holds, what is missing or broken, and how to launch it.

Reads headers and small files only; the node refuses nothing that is found right here, but weights
that hold NaN or do not fit the device.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from specprune_ros.config import PolicyConfig, RobotConfig
from specprune_ros.config_files import load_config
from specprune_ros.errors import SpecPruneError
from specprune_ros.shipped import PARAMS, own_params

if TYPE_CHECKING:
    from specprune_ros.models.openvla_folder import Folder

HEADS = {
    'l1': 'L1 regression, continuous actions in one pass',
    'diffusion': 'diffusion, continuous actions in one pass per denoising step',
    'latent': 'latent-action tokens and a decoder, continuous actions in four passes',
    'discrete': 'no file: discrete tokens, of plain OpenVLA (launch it with model:=openvla) or of '
    'OpenVLA-OFT (model:=openvla_oft); nothing in the files tells which',
}
PARALLEL = 'no file: discrete tokens in one pass'
EXAMPLE = """
example:
  specprune info ~/my_checkpoint

exit status 0 when the folder can be launched, 1 when something is missing or broken
"""
OWN_ROBOT = '/path/to/my_robot.yaml'
# (word in a dataset's name, action elements) -> robot files to start from, for models of several
# cameras and for those of one
ROBOTS = {
    ('aloha', 14): ('aloha', None),
    ('bridge', 7): ('bridge_widowx', None),
    ('libero', 7): ('libero_franka', 'libero_franka_1cam'),
}


@dataclass(frozen=True)
class Launch:
    """One way to launch the folder.

    Attributes:
        config: under which its files are checked: the robot file's, with what it needs put in.
        robot: the robot file, shipped or OWN_ROBOT.
        needs: what OWN_ROBOT must be; empty for a shipped one.
        params: whether the folder's own parameter file says what the robot must be.
    """

    config: PolicyConfig
    robot: str
    needs: str = ''
    params: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLE
    parser.add_argument('folder', type=Path, help='checkpoint folder, as it was downloaded')


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
    launches = ways_to_launch(folder)
    problems += missing(folder, launches)
    print('missing/broken:' if problems else 'missing/broken: nothing')
    for problem in dict.fromkeys(problems):
        print(f'  - {problem}')
    show_launches(launches, broken=bool(problems))
    return 1 if problems else 0


def show_launches(launches: list[Launch], *, broken: bool) -> None:
    """Print how to launch the folder, and whether that must wait for a repair."""
    if broken:
        waits = 'launch once the above is fixed:'
        print(waits if launches else f'{waits} how, can only be told then')
    for launch in launches:
        print(f'{"launch:":<16}{launch_line(launch)}')
        if launch.needs:
            print(f'{"":<16}{Path(OWN_ROBOT).name}: {launch.needs}')


def models(folder: Folder) -> list[str]:
    """Which models the folder may be, keys of VARIANTS; nothing in it tells some apart."""
    from specprune_ros.models.openvla_folder import VARIANTS

    if folder.head == 'latent':
        return ['univla']
    parts = [name for name in VARIANTS['openvla_oft'].files if folder.component(name)]
    return ['openvla_oft'] if parts else ['openvla', 'openvla_oft']


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
    return f'{counted(count)} parameters, {total / 1e9:.3f} GB in {len(files)} file(s)'


def counted(count: int) -> str:
    """A number as one reads it and, behind it, to the last digit."""
    size, unit = (1e9, 'B') if count >= 1e9 else (1e6, 'M')
    return f'{count / size:.4g} {unit} ({count:,})'


def head(folder: Folder) -> str:
    """Kind of action head and its width."""
    width = folder.action_dim
    is_parallel = folder.head == 'discrete' and models(folder) == ['openvla_oft']
    text = PARALLEL if is_parallel else HEADS[folder.head]
    return text + (f', {width} action elements' if width else '')


def proprio(folder: Folder) -> str:
    """Width of the proprioceptive state."""
    width = folder.proprio_dim
    return f'{width} elements' if width else 'none'


def own_config(params: Path) -> PolicyConfig:
    """What the folder's parameter file says.

    Raises:
        ConfigError: it is no parameter file, or a value is bad.
    """
    return load_config([params], {'model.checkpoint': str(params.parent)})


def cameras(folder: Folder) -> str:
    """What can be said of the cameras."""
    pixels = folder.towers[0].image_size
    if params := own_params(folder.path):
        names = own_config(params).robot.camera_names
        return f'{", ".join(names)}, {pixels} x {pixels} ({PARAMS})'
    if folder.head == 'latent':
        return f'exactly 1, {pixels} x {pixels}'
    most = 'exactly 1 as plain OpenVLA, ' if 'openvla' in models(folder) else ''
    return (
        f'{most}1 to 4, {pixels} x {pixels}; the files do not say how many: give the robot file '
        'as many as the training had, in its order'
    )


def chunk(folder: Folder) -> str:
    """What can be said of the chunk length."""
    if params := own_params(folder.path):
        return f'{own_config(params).robot.horizon} steps ({PARAMS})'
    if folder.horizon is not None:
        return f'{folder.horizon} steps, which robot.horizon must be'
    single = '1 step as plain OpenVLA, else ' if 'openvla' in models(folder) else ''
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


def missing(folder: Folder, launches: list[Launch]) -> list[str]:
    """What the folder lacks to run, or why it would not load."""
    from specprune_ros.models.openvla_checkpoint import check

    lacks = []
    for launch in launches:
        try:
            check(launch.config)
        except SpecPruneError as error:
            lacks.append(str(error))
    if not any((folder.path / name).is_file() for name in ('tokenizer.json', 'tokenizer.model')):
        lacks = [text for text in lacks if 'tokenizer.json' not in text]
        lacks.append('tokenizer.json (or tokenizer.model)')
    return lacks


def ways_to_launch(folder: Folder) -> list[Launch]:
    """One for each model that the folder may be; none where its files do not even tell that."""
    try:
        if params := own_params(folder.path):
            return [Launch(own_config(params), robot='', params=True)]
        return [way_to_launch(folder, model) for model in models(folder)]
    except SpecPruneError:
        return []  # reported where it is described


def way_to_launch(folder: Folder, model: str) -> Launch:
    """With the shipped robot file that fits, else with one of the user's own.

    Raises:
        CheckpointError: a component of the folder is broken.
    """
    names = dataset_names(folder)
    key = names[0] if len(names) > 1 else ''
    sizes = needed_sizes(folder, model)
    name = robot_file(model, names[:1], sizes.get('action_names'))
    files = ([f'robots/{name}'] if name else []) + [f'models/{model}']
    values = {'model.checkpoint': str(folder.path.resolve()), 'model.unnorm_key': key}
    config = load_config(files, values)
    changes = {
        field: size for field, size in sizes.items() if size_of(config.robot, field) != size
    }
    fitting = replace(config, robot=with_sizes(config.robot, changes))
    if name and not changes:
        return Launch(fitting, name)
    start = f'a copy of {name} with ' if name else 'needs '
    told = changes if name else sizes
    return Launch(fitting, OWN_ROBOT, start + ', '.join(map(shown_size, told, told.values())))


def needed_sizes(folder: Folder, model: str) -> dict[str, int]:
    """What a robot file must have, as far as folder and model tie it down.

    Returns:
        horizon, and how many names other fields of RobotConfig must hold.
    """
    from specprune_ros.models.openvla_folder import VARIANTS

    variant = VARIANTS[model]
    sizes = {
        'camera_names': 1 if variant.cameras == 1 else None,
        'joint_names': folder.proprio_dim or 0,
        'action_names': action_width(folder),
        'horizon': variant.horizon or folder.horizon,
    }
    return {field: size for field, size in sizes.items() if size is not None}


def size_of(robot: RobotConfig, field: str) -> int:
    """A field's number, or how many names it holds."""
    value = getattr(robot, field)
    return len(value) if isinstance(value, tuple) else value


def with_sizes(robot: RobotConfig, sizes: dict[str, int]) -> RobotConfig:
    """The robot with made-up names, as many as asked for, to check all else by."""
    values = {
        field: tuple(f'{field}_{index}' for index in range(size)) if field != 'horizon' else size
        for field, size in sizes.items()
    }
    return replace(robot, **values)


def shown_size(field: str, size: int) -> str:
    """What a robot file must say."""
    if field == 'horizon':
        return f'robot.horizon: {size}'
    return f'robot.{field}: ' + (f'{size} name{"s" * (size > 1)}' if size else "['']")


def dataset_names(folder: Folder) -> list[str]:
    """Of the statistics; empty where they are missing or broken."""
    try:
        return list(folder.checkpoint.statistics())
    except SpecPruneError:
        return []


def action_width(folder: Folder) -> int | None:
    """A by the action head, else by the statistics; None where neither tells."""
    if folder.action_dim is not None:
        return folder.action_dim
    names = dataset_names(folder)
    try:
        return len(folder.bounds('action', 'bounds_q99', names[0]).mask) if names else None
    except SpecPruneError:
        return None


def robot_file(model: str, datasets: list[str], width: int | None) -> str | None:
    """The shipped robot file that comes nearest; None where none was made for such a dataset."""
    from specprune_ros.models.openvla_folder import VARIANTS

    single = VARIANTS[model].cameras == 1
    for (word, needed), files in ROBOTS.items():
        if width in (None, needed) and any(word in name for name in datasets):
            return files[single]
    return None


def launch_line(launch: Launch) -> str:
    """The command."""
    model = launch.config.model
    key = f' unnorm_key:={model.unnorm_key}' if model.unnorm_key else ''
    if launch.params:
        return f'ros2 launch specprune_ros vla.launch.py checkpoint:={model.checkpoint}'
    return (
        f'ros2 launch specprune_ros vla.launch.py model:={model.name} '
        f'checkpoint:={model.checkpoint} robot:={launch.robot}{key}'
    )
