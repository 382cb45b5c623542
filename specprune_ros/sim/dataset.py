"""Demonstrations on disk: one npz file per episode, a description beside them, and a ledger.

    <folder>/dataset.json                    what all episodes share: `Recipe`
    <folder>/ledger.csv                      one line per attempt, failed ones too: `Attempt`
    <folder>/<suite>_<index>/<seed>.npz      one successful episode: `Episode`, an array per field

With T control steps, F frames, V cameras, P proprioceptive values and O places:

    frame_steps      [F] int32               the control step at which each frame was taken
    images           [F, V, Y, X, 3] uint8   RGB, upright, cameras in the order of dataset.json
    proprio          [T, P] float32          before the action; names in dataset.json
    actions          [T, 7] float32          the expert's, in -1..1: what a model is to learn
    executed         [T, 7] float32          what moved the robot: `actions` and the noise
    place_names      [O] str                 objects, and regions that goals name
    places           [T, O, 3] float32       where they were, m: for auxiliary losses, not a policy
    pixels           [F, V, O, 2] float32    px to the right and down, where a place appears
    instruction      str
    task             str
    seed             int
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specprune_ros.errors import ConfigError, RecordingError

FORMAT = 2
RECIPE, LEDGER = 'dataset.json', 'ledger.csv'


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all episodes of a dataset share.

    Attributes:
        cameras: in the order of the images.
        size: height and width of the images, px.
        every: control steps from one frame to the next.
        noise: standard deviation of what is added to each element of the translation command, as
            a share of that command's length.
        noisy_share: of the episodes have noise; the others are clean.
        split: of the environment's seeds.
        detail_m: see LiberoEnv.
        proprio_names: in the order of `proprio`.
        action_names: in the order of `actions`.
        step_dt_s: control period.
        format: of the files.
    """

    cameras: tuple[str, ...]
    size: int
    every: int
    noise: float
    noisy_share: float
    split: str
    detail_m: float
    proprio_names: tuple[str, ...]
    action_names: tuple[str, ...]
    step_dt_s: float
    format: int = FORMAT


@dataclass(frozen=True, eq=False, kw_only=True)
class Episode:
    """One demonstration; the arrays are described above."""

    task: str
    seed: int
    instruction: str
    frame_steps: np.ndarray
    images: np.ndarray
    proprio: np.ndarray
    actions: np.ndarray
    executed: np.ndarray
    place_names: np.ndarray
    places: np.ndarray
    pixels: np.ndarray

    def __post_init__(self) -> None:
        steps, frames = len(self.actions), len(self.frame_steps)
        wanted = {
            'proprio': steps, 'actions': steps, 'executed': steps, 'places': steps,
            'images': frames,
        }  # fmt: skip
        for name, count in wanted.items():
            if len(getattr(self, name)) != count:
                got = getattr(self, name).shape
                raise ValueError(f'{name} has shape {got}, but there are {count} of it')
        wanted = (frames, self.images.shape[1], len(self.place_names), 2)
        if self.pixels.shape != wanted:
            raise ValueError(f'pixels have shape {self.pixels.shape}, not {wanted}')
        if self.images.dtype != np.uint8:
            raise ValueError(f'images are {self.images.dtype}, not uint8')
        if frames and not 0 <= self.frame_steps.min() <= self.frame_steps.max() < steps:
            raise ValueError(f'frame_steps do not lie in the {steps} steps of the episode')

    def chunk(self, step: int, horizon: int) -> tuple[np.ndarray, np.ndarray]:
        """What a model is to answer at a control step.

        Args:
            step: 0..T-1.
            horizon: L.

        Returns:
            [L, 7] actions, the last one repeated beyond the end; [L] bool, False where it is.
        """
        wanted = step + np.arange(horizon)
        last = len(self.actions) - 1
        return self.actions[np.minimum(wanted, last)], wanted <= last


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One line of the ledger.

    Attributes:
        task: its name.
        seed: of the episode.
        success: LIBERO's check after the expert's last action; no file is kept without.
        steps: control steps.
        frames: that were rendered.
        retries: see Expert.
        noisy: whether noise was added.
        seconds: wall time, rendering included.
        bytes: of the file; 0 without one.
    """

    task: str
    seed: int
    success: bool
    steps: int
    frames: int
    retries: int
    noisy: bool
    seconds: float
    bytes: int


def episode_path(folder: Path, task: str, seed: int) -> Path:
    """Where an episode belongs."""
    return folder / task.replace('/', '_') / f'{seed:06d}.npz'


def write_episode(path: Path, episode: Episode) -> int:
    """Write a file at once or not at all, so that an interrupted run leaves no half of one.

    Returns:
        its size, bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix('.partial')
    arrays = {field.name: getattr(episode, field.name) for field in dataclasses.fields(episode)}
    with partial.open('wb') as file:
        np.savez_compressed(file, **arrays)
    os.replace(partial, path)
    return path.stat().st_size


def read_episode(path: Path) -> Episode:
    """Read a file.

    Raises:
        RecordingError: it is no episode.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            values = {field.name: file[field.name] for field in dataclasses.fields(Episode)}
        scalars = {name: values[name].item() for name in ('task', 'seed', 'instruction')}
        return Episode(**{**values, **scalars})
    except Exception as error:  # zip, inflate, the array header and our checks raise their own
        raise RecordingError(path, f'cannot be read as a demonstration: {error}') from error


def open_dataset(folder: Path, recipe: Recipe) -> list[Attempt]:
    """Make a dataset, or go on with one.

    Returns:
        the attempts that were made before.

    Raises:
        ConfigError: the folder holds a dataset of another recipe.
    """
    path = folder / RECIPE
    if path.exists():
        before = read_recipe(folder)
        changed = {
            field.name: getattr(before, field.name)
            for field in dataclasses.fields(Recipe)
            if getattr(before, field.name) != getattr(recipe, field.name)
        }
        if changed:
            why = f'holds a dataset with {changed}; take another folder'
            raise ConfigError('--out', str(folder), why)
        _drop_half_line(folder / LEDGER)
        return read_ledger(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dataclasses.asdict(recipe), indent=2) + '\n')
    return []


def read_recipe(folder: Path) -> Recipe:
    """What a dataset's episodes share.

    Raises:
        RecordingError: it is no dataset of this format.
    """
    try:
        values = json.loads((folder / RECIPE).read_text())
        if values['format'] != FORMAT:
            had = values['format']
            why = f'its format is {had}, this version has {FORMAT}: collect it anew'
            raise ValueError(why)
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return Recipe(**{**values, **lists})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RecordingError(folder, f'is no dataset: {error}') from error


def read_ledger(folder: Path) -> list[Attempt]:
    """All attempts, successful or not, in the order in which they ended.

    Raises:
        RecordingError: a line is damaged.
    """
    path = folder / LEDGER
    if not path.exists():
        return []
    with path.open(newline='') as file:
        return [_attempt(path, row) for row in csv.DictReader(file)]


def append_attempt(folder: Path, attempt: Attempt) -> None:
    """Add a line to the ledger."""
    path = folder / LEDGER
    names = [field.name for field in dataclasses.fields(Attempt)]
    with path.open('a', newline='') as file:
        writer = csv.DictWriter(file, names, lineterminator='\n')
        if not file.tell():
            writer.writeheader()
        values = dataclasses.asdict(attempt)
        writer.writerow({name: _plain(value) for name, value in values.items()})


def episodes(folder: Path) -> Iterator[Episode]:
    """All demonstrations of a dataset, in the order of their names.

    Raises:
        RecordingError: see `read_episode`.
    """
    for path in sorted(folder.glob('*/*.npz')):
        yield read_episode(path)


def _drop_half_line(path: Path) -> None:
    """The line that was being written when a run was killed; its episode is made again."""
    text = path.read_text() if path.exists() else ''
    if text and not text.endswith('\n'):
        path.write_text(text[: text.rfind('\n') + 1])


def _plain(value: object) -> object:
    return int(value) if isinstance(value, bool) else value


def _attempt(path: Path, row: dict[str, str]) -> Attempt:
    try:
        return Attempt(
            task=row['task'],
            seconds=float(row['seconds']),
            success=bool(int(row['success'])),
            noisy=bool(int(row['noisy'])),
            **{name: int(row[name]) for name in ('seed', 'steps', 'frames', 'retries', 'bytes')},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RecordingError(path, f'has a damaged line {row}: {error}') from error
