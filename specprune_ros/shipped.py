"""Checkpoints that are part of this package: `shipped/NAME` wherever a folder may be named."""

from __future__ import annotations

from pathlib import Path

from specprune_ros.errors import CheckpointError

PREFIX = 'shipped/'
EMBEDDED = 'libero_small'  # what runs where no other model is named; so are its files of config/
PARAMS = 'params.yaml'  # in a folder: all that a launch needs but the folder's own path
FOLDER = Path(__file__).parent / 'checkpoints'


def shipped_names() -> list[str]:
    """What may stand after PREFIX."""
    return sorted(path.parent.name for path in FOLDER.glob('*/config.json'))


def is_shipped(name: str | Path) -> bool:
    """Whether a folder is one of this package, by its name or by its path."""
    return find_checkpoint(name).resolve().is_relative_to(FOLDER.resolve())


def own_params(name: str | Path) -> Path | None:
    """The parameter file that `specprune train` left in a folder; None where there is none.

    Raises:
        CheckpointError: nothing of that name is shipped.
    """
    path = find_checkpoint(name).resolve() / PARAMS
    return path if path.is_file() and b'ros__parameters' in path.read_bytes() else None


def find_checkpoint(name: str | Path) -> Path:
    """The folder that a name stands for: a path, or PREFIX and the name of a shipped one.

    A file in a shipped folder may follow its name.

    Raises:
        CheckpointError: nothing of that name is shipped.
    """
    text = str(name)
    if not text.startswith(PREFIX):
        return Path(name).expanduser()
    folder, _, file = text.removeprefix(PREFIX).partition('/')
    if folder not in shipped_names() or '..' in file:
        known = ', '.join(PREFIX + one for one in shipped_names()) or 'nothing'
        raise CheckpointError(f'checkpoint {text}: this package ships {known}')
    return FOLDER / folder / file
