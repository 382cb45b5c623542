"""Parameter files to configuration.

They are ROS parameter files (`/**: ros__parameters:`), so that the library, the command line and
the node read the same ones.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import yaml

from specprune_ros.config import PolicyConfig, axes_of
from specprune_ros.errors import ConfigError
from specprune_ros.shipped import EMBEDDED
from specprune_ros.streaming.config import StreamerConfig

Config = TypeVar('Config', PolicyConfig, StreamerConfig)


def from_mapping(values: Mapping[str, object], base: Config | None = None) -> Config:
    """Build a configuration from flat names such as `pruning.alpha`.

    Args:
        values: parameter name -> value; lists become tuples, and the empty strings in them go
            (a ROS parameter file cannot hold an empty list, `['']` stands for it).
        base: what holds for parameters that `values` leaves out; a default PolicyConfig if None.

    Raises:
        ConfigError: an unknown name (the message proposes the nearest one), or a bad value.
    """
    base = PolicyConfig() if base is None else base
    axes = axes_of(type(base))
    changes: dict[str, dict[str, object]] = {axis: {} for axis in axes}
    known = parameter_names(type(base))
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f', did you mean {near[0]!r}?' if near else ''
            raise ConfigError(name, value, f'unknown parameter{hint}')
        axis, _, key = name.partition('.')
        kind = axes[axis].__dataclass_fields__[key].type
        if isinstance(value, (list, tuple)):
            value = tuple(_plain(element, kind) for element in value if element != '')
        changes[axis][key] = _plain(value, kind)
    return type(base)(
        **{name: dataclasses.replace(getattr(base, name), **changes[name]) for name in axes}
    )


def _plain(value: object, kind: str) -> object:
    """YAML's 1 for a float parameter is 1.0."""
    return float(value) if 'float' in kind and type(value) is int else value


def parameter_names(kind: type = PolicyConfig) -> list[str]:
    """All parameter names of a node, `axis.field`."""
    return [
        f'{axis}.{spec.name}'
        for axis, cls in axes_of(kind).items()
        for spec in dataclasses.fields(cls)
    ]


def other_nodes_axes(kind: type) -> set[str]:
    """Axes that only another node has: one parameter file serves all of them."""
    everyones = {axis for other in (PolicyConfig, StreamerConfig) for axis in axes_of(other)}
    return everyones - set(axes_of(kind))


def load_config(
    files: Iterable[str | Path] = (),
    overrides: Mapping[str, object] | None = None,
    base: Config | None = None,
) -> Config:
    """Read parameter files, later ones first in rank, then apply overrides.

    Args:
        files: paths, or `axis/name` of a file that ships in config/, e.g. `robots/libero_franka`;
            what they say of another node's axes is passed over.
        overrides: flat names -> values.
        base: as for `from_mapping`.

    Raises:
        ConfigError: a file is missing or malformed, a name unknown, a value bad.
    """
    base = PolicyConfig() if base is None else base
    return from_mapping({**read_parameter_files(files, type(base)), **(overrides or {})}, base)


def read_parameter_files(
    files: Iterable[str | Path], kind: type = PolicyConfig
) -> dict[str, object]:
    """Flat name -> value of what files say together, without another node's axes.

    Args:
        files: as for `load_config`.
        kind: the configuration that they are for.

    Raises:
        ConfigError: a file is missing or malformed.
    """
    values: dict[str, object] = {}
    for name in files:
        values.update(read_parameter_file(find_config(name)))
    others = other_nodes_axes(kind)
    return {k: v for k, v in values.items() if k.partition('.')[0] not in others}


def read_parameter_file(path: Path) -> dict[str, object]:
    """Flat names -> values of one ROS parameter file.

    Raises:
        ConfigError: not YAML, or not of the form `/**: ros__parameters: ...`.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = ' '.join(str(error).split())
        raise ConfigError('params_file', str(path), f'cannot be read: {reason}') from error
    try:
        sections = [section['ros__parameters'] for section in tree.values()]
    except (AttributeError, KeyError, TypeError):
        sections = []
    if not sections or not all(isinstance(section, dict) for section in sections):
        raise ConfigError(
            'params_file', str(path), "must look like '/**: {ros__parameters: {...}}'"
        )
    flat: dict[str, object] = {}
    for section in sections:  # '/**' and a node's own, in the file's order
        _flatten('', section, flat)
    return flat


def _flatten(prefix: str, tree: Mapping, flat: dict[str, object]) -> None:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            _flatten(f'{prefix}{key}.', value, flat)
        else:
            flat[f'{prefix}{key}'] = value


def write_parameter_file(path: Path, sections: Mapping[str, Mapping]) -> None:
    """The other way round: node name, or '/**', -> names -> values, or -> names -> ... .

    Strings are quoted: ROS reads YAML 1.1, in which a bare y is a boolean.
    """
    tree = {node: {'ros__parameters': values} for node, values in sections.items()}
    path.write_text(yaml.dump(tree, sort_keys=False, Dumper=_Quoting))


class _Quoting(yaml.SafeDumper):
    """Dumps every string value in quotes."""


_Quoting.add_representer(
    str, lambda dumper, text: dumper.represent_scalar('tag:yaml.org,2002:str', text, style="'")
)


# What says that a robot or a model is one's own; other settings of theirs only tune it.
IDENTITY = (
    'model.name',
    'model.checkpoint',
    'robot.camera_names',
    'robot.joint_names',
    'robot.action_names',
)


def default_config(given: Iterable[str]) -> PolicyConfig:
    """What a node starts from, whose files and command line set these flat names.

    Where they name no robot and no model it is the trained one that ships, in its simulated arm.

    Raises:
        ConfigError: the package's own files are missing or damaged.
    """
    if not set(IDENTITY).isdisjoint(given):
        return PolicyConfig()
    return load_config([f'robots/{EMBEDDED}', f'models/{EMBEDDED}'])


def find_config(name: str | Path) -> Path:
    """The path of a parameter file: as given, or one that ships with the package.

    Raises:
        ConfigError: neither exists; the message lists where it looked.
    """
    path = Path(name)
    if path.is_file():
        return path
    roots = shipped_folders('config')
    for root in roots:
        for candidate in (root / path, root / f'{path}.yaml'):
            if candidate.is_file():
                return candidate
    shipped = {f'{f.parent.name}/{f.stem}' for root in roots for f in root.glob('*/*.yaml')}
    raise ConfigError(
        'params_file',
        str(name),
        f'no such file, nor one that ships: {", ".join(sorted(shipped)) or "none found"} '
        f'(in {", ".join(map(str, roots))})',
    )


def shipped_folders(name: str) -> list[Path]:
    """Folders of this name that ship: the checkout's, then the installed ones.

    What was installed with this package is in a prefix above it, as pip's and colcon's are.
    """
    prefixes = [Path(p) for p in os.environ.get('AMENT_PREFIX_PATH', '').split(os.pathsep) if p]
    here = Path(__file__).resolve()
    checkout = here.parent.parent
    roots = [checkout / name] if (checkout / 'package.xml').is_file() else []
    prefixes = [*here.parents[1:], *prefixes, Path(sys.prefix)]
    roots += [prefix / 'share' / 'specprune_ros' / name for prefix in prefixes]
    return [root for root in dict.fromkeys(roots) if root.is_dir()]
