"""Still scenes to learn from: objects drawn anew, the hand anywhere, no physics.

Some 25 of them cost what one frame of a demonstration costs, and no two show the same layout:
from them a network learns what the instruction's object looks like and where it is.

    <folder>/layouts.json                    what all shards share: `LayoutRecipe`
    <folder>/<first seed>.npz                `Layouts` of SHARD seeds, an array per field

With N scenes, V cameras, O places and P proprioceptive values:

    images      [N, V, Y, X, 3] uint8   RGB, upright
    proprio     [N, P] float32
    turn        [N, 3] float32          rad, rotation that is left until the hand points down
    place_names [O] str
    places      [N, O, 3] float32       m
    pixels      [N, V, O, 2] float32    px to the right and down, where a place appears
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from specprune_ros.errors import ConfigError, RecordingError
from specprune_ros.sim.expert import straightening
from specprune_ros.sim.libero import LiberoEnv
from specprune_ros.sim.tasks import BASKET, SHUFFLE, SHUFFLED, SKILLS, WANTED, Skill
from specprune_ros.sim.workers import in_workers

FORMAT = 1
DRAWING = 2  # how a seed becomes a scene: a folder is gone on with by the same one only
RECIPE = 'layouts.json'
SHARD = 200  # scenes of one file
# Hands above an object that can be named, as at the end of a reach; and beside its grasp along x,
# as at the end of a bad one: open fingers pass an object at its sides.
NEAR_SHARE, NEAR_M = 0.3, 0.03
LOW_SHARE, LOW_M = 0.3, (0.035, 0.005, 0.06)  # along x at most, along y, above the grasp at most
WORK_LOW, WORK_HIGH = (-0.27, -0.32, 0.12), (0.17, 0.28, 0.30)  # of the other hands, m
TURN_RAD = 0.03
FINGERS_M = (0.036, 0.0405)
STRADDLE_M = (0.04, 0.016)  # from a low hand to the object between its fingers, along x and y
CLEAR_M, TALL_M = 0.075, 0.17  # of a low hand to the objects around it; above this it is not low


@dataclass(frozen=True, kw_only=True)
class LayoutRecipe:
    """What all shards of a folder share; see dataset.Recipe.

    Attributes:
        policy: digest of the one in whose episodes the scenes are, '' where they are drawn.
        every: control steps of it from one scene to the next, 0 likewise.
    """

    cameras: tuple[str, ...]
    size: int
    split: str
    detail_m: float
    proprio_names: tuple[str, ...]
    policy: str = ''
    every: int = 0
    drawing: int = DRAWING
    format: int = FORMAT


@dataclass(frozen=True, eq=False, kw_only=True)
class Layouts:
    """Still scenes; the arrays are described above."""

    images: np.ndarray
    proprio: np.ndarray
    turn: np.ndarray
    place_names: np.ndarray
    places: np.ndarray
    pixels: np.ndarray


def draw_hand(
    places: Mapping[str, np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Where the hand is: over the workspace, or near an object on the way down to it.

    Returns:
        [3] m; [3] rad, its turn from straight down.
    """
    while True:
        hand, kind = rng.uniform(WORK_LOW, WORK_HIGH), rng.random()
        if kind < NEAR_SHARE + LOW_SHARE:
            skill = SKILLS[f'{SHUFFLED}/{rng.integers(len(WANTED))}']
            hand = (_near if kind < NEAR_SHARE else _low)(places, skill, rng)
        if _fits(hand, places):
            return hand, rng.normal(0.0, TURN_RAD, 3)


def _near(places: Mapping[str, np.ndarray], skill: Skill, rng: np.random.Generator) -> np.ndarray:
    grasp = places[skill.pick] + np.array(skill.grasp)
    height = rng.uniform(grasp[2], skill.travel_z + 0.03)
    # The lower, the nearer, as the expert comes down.
    spread = NEAR_M * (0.1 + 0.9 * (height - grasp[2]) / (skill.travel_z - grasp[2]))
    return np.array([*(grasp[:2] + rng.normal(0.0, spread, 2)), height])


def _low(places: Mapping[str, np.ndarray], skill: Skill, rng: np.random.Generator) -> np.ndarray:
    grasp = places[skill.pick] + np.array(skill.grasp)
    aside, across, above = LOW_M
    offset = rng.uniform(-aside, aside), rng.normal(0.0, across), rng.uniform(0.0, above)
    return grasp + np.array(offset)


def _fits(hand: np.ndarray, places: Mapping[str, np.ndarray]) -> bool:
    """Whether a low hand stands over one object, and beside all others."""
    if hand[2] > TALL_M:
        return True
    offsets = np.array([places[name][:2] - hand[:2] for name in SHUFFLE.objects])
    near = np.linalg.norm(offsets, axis=1) < CLEAR_M
    if any(near[i] for i, name in enumerate(SHUFFLE.objects) if name not in WANTED):
        return False
    over = (np.abs(offsets) < STRADDLE_M).all(axis=1)
    return bool((over | ~near).all() or hand[2] > 0.11)


def render_layouts(env: LiberoEnv, recipe: LayoutRecipe, seeds: Sequence[int]) -> Layouts:
    """The scenes of some seeds.

    Raises:
        ConfigError: see LiberoEnv.
    """
    names = [*SHUFFLE.objects, BASKET]
    rows: dict[str, list] = {
        name: [] for name in ('images', 'proprio', 'turn', 'places', 'pixels')
    }
    for seed in seeds:
        fingers = np.random.default_rng(seed).uniform(*FINGERS_M)
        state = env.arrange(seed, draw_hand, recipe.split, float(fingers))
        images = env.images()
        rows['images'].append(np.stack([images[name] for name in recipe.cameras]))
        rows['proprio'].append(state.proprio(recipe.proprio_names))
        rows['turn'].append(straightening(state.hand_xyzw))
        rows['places'].append([state.places[name] for name in names])
        rows['pixels'].append(env.pixels(names))
    arrays = {name: np.stack(values) for name, values in rows.items()}
    floats = {name: a.astype(np.float32) for name, a in arrays.items() if name != 'images'}
    return Layouts(images=arrays['images'], place_names=np.array(names), **floats)


def collect_layouts(
    folder: Path, recipe: LayoutRecipe, count: int, *, workers: int
) -> Iterator[int]:
    """Make the shards that a folder lacks.

    Args:
        folder: made if it is not there.
        recipe: of the folder.
        count: scenes that it is to have, rounded up to whole shards.
        workers: processes; 0 works in this one.

    Yields:
        scenes of every shard when it is written; those of earlier runs first, together.

    Raises:
        ConfigError: the folder holds something else; see also LiberoEnv.
    """
    open_layouts(folder, recipe)
    firsts = range(0, count, SHARD)
    todo = [first for first in firsts if not _shard_path(folder, first).exists()]
    yield SHARD * (len(firsts) - len(todo))
    work = functools.partial(_write_shard, folder, recipe)
    yield from in_workers(work, [(first,) for first in todo], workers)


def read_layouts(folder: Path) -> Iterator[Layouts]:
    """All shards of a folder, in the order of their seeds.

    Raises:
        RecordingError: a file cannot be read.
    """
    for path in sorted(folder.glob('*.npz')):
        try:
            with np.load(path, allow_pickle=False) as file:
                names = [field.name for field in dataclasses.fields(Layouts)]
                yield Layouts(**{name: file[name] for name in names})
        except Exception as error:  # zip, inflate and the array header raise their own
            raise RecordingError(path, f'cannot be read as layouts: {error}') from error


def read_layout_recipe(folder: Path) -> LayoutRecipe:
    """What a folder's shards share.

    Raises:
        RecordingError: it is no such folder, or of another format.
    """
    try:
        values = json.loads((folder / RECIPE).read_text())
        if values['format'] != FORMAT:
            raise ValueError(f'its format is {values["format"]}, this version reads {FORMAT}')
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return LayoutRecipe(**{'drawing': 1, **values, **lists})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RecordingError(folder, f'holds no layouts: {error}') from error


def open_layouts(folder: Path, recipe: LayoutRecipe) -> None:
    """Make a folder, or see that it is of this recipe.

    Raises:
        ConfigError: it is of another one.
        RecordingError: it is broken.
    """
    path = folder / RECIPE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(recipe), indent=2) + '\n')
    elif (before := read_layout_recipe(folder)) != recipe:
        raise ConfigError('--out', str(folder), f'holds layouts of {before}; take another folder')


def _shard_path(folder: Path, first: int) -> Path:
    return folder / f'{first:07d}.npz'


def _write_shard(folder: Path, recipe: LayoutRecipe, first: int) -> int:
    env = _environment(recipe.cameras, recipe.size, recipe.detail_m)
    layouts = render_layouts(env, recipe, range(first, first + SHARD))
    write_shard(_shard_path(folder, first), layouts)
    return SHARD


def write_shard(path: Path, layouts: Layouts) -> None:
    """Write scenes at once or not at all."""
    partial = path.with_suffix('.partial')
    with partial.open('wb') as file:
        # Not compressed: it would save 40 %, and reading would take as long as many steps.
        np.savez(file, **{f.name: getattr(layouts, f.name) for f in dataclasses.fields(Layouts)})
    os.replace(partial, path)


@functools.lru_cache(maxsize=1)
def _environment(cameras: tuple[str, ...], size: int, detail_m: float) -> LiberoEnv:
    return LiberoEnv(f'{SHUFFLED}/0', cameras=cameras, size=size, detail_m=detail_m)
