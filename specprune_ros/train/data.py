"""Demonstrations and still scenes as batches, with what is to be answered.

Every frame has an answer for each instruction that makes sense of it: all of them as long as the
hand is empty and on its way, and only the demonstration's own afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specprune_ros.errors import ConfigError
from specprune_ros.models.openvla_oft import Bounds
from specprune_ros.sim.dataset import Episode, episodes, read_recipe
from specprune_ros.sim.expert import straightening
from specprune_ros.sim.labels import before_grasp, grasp_of, reach_chunk
from specprune_ros.sim.layouts import read_layout_recipe, read_layouts
from specprune_ros.sim.tasks import GREY, SHUFFLED, SKILLS, Skill, find_task
from specprune_ros.train.config import DataConfig

TARGET_UNIT_M = 0.1  # of the network's answer where the named object is
MASK = np.array([True] * 6 + [False])  # the gripper stays 0..1, as in LIBERO's data


@dataclass(frozen=True, eq=False, kw_only=True)
class Frames:
    """F frames with answers to K instructions.

    Attributes:
        images: [F, V, Y, X, 3] uint8.
        proprio: [F, P] raw.
        actions: [F, K, L, 7] of the robot, but gripper 0..1 with 1 = open.
        targets: [F, K, 3] m, where the named object is.
        asked: [F, K] bool, whether there is an answer.
        pixels: [F, V, O, 2] px, see Layouts; NaN where unknown.
    """

    images: np.ndarray
    proprio: np.ndarray
    actions: np.ndarray
    targets: np.ndarray
    asked: np.ndarray
    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainingSet:
    """All that a run learns from.

    Attributes:
        tasks: K names.
        instructions: K sentences.
        objects: O names of what `pixels` tells.
        named: [K] index in `objects` of what an instruction names.
        cameras: V names.
        demos, layouts, gate: frames.
        action_bounds: normalisation, from demos.
        proprio_bounds: likewise, from demos and layouts.
        episodes: demonstrations.
        grey: images are withheld: all of them show GREY.
    """

    tasks: tuple[str, ...]
    instructions: tuple[str, ...]
    objects: tuple[str, ...]
    named: np.ndarray
    cameras: tuple[str, ...]
    demos: Frames
    layouts: Frames
    gate: Frames
    action_bounds: Bounds
    proprio_bounds: Bounds
    episodes: int
    grey: bool = False


def load_training_set(config: DataConfig) -> TrainingSet:
    """Read everything into memory.

    Raises:
        ConfigError: folders that do not fit each other, or hold nothing.
        RecordingError: a file cannot be read.
    """
    reader = _Reader(config)
    layouts = _join([reader.layouts(folder) for folder in config.layouts])
    gate = reader.layouts(config.gate)
    demos = [reader.demo(e) for folder in config.demos for e in episodes(Path(folder))]
    demos = [frames for frames in demos if frames is not None]
    if not demos:
        raise ConfigError('data.demos', config.demos, 'hold no episode of the tasks')
    joined = _join(demos)
    raw = joined.actions[joined.asked].reshape(-1, joined.actions.shape[-1])
    proprio = np.concatenate((joined.proprio, layouts.proprio))
    return TrainingSet(
        tasks=config.tasks,
        instructions=reader.instructions,
        objects=reader.objects,
        named=reader.named,
        cameras=reader.cameras,
        demos=joined,
        layouts=layouts,
        gate=gate,
        action_bounds=_bounds(raw, MASK),
        proprio_bounds=_bounds(proprio, np.ones(proprio.shape[1], bool)),
        episodes=len(demos),
        grey=config.withheld == 'images',
    )


class _Reader:
    """Turns what `specprune collect` wrote into frames with answers."""

    def __init__(self, config: DataConfig):
        self.config = config
        self.skills = [_skill(name) for name in config.tasks]
        if not config.layouts:
            raise ConfigError('data.layouts', (), 'names no folder')
        recipe = read_layout_recipe(Path(config.layouts[0]))
        self.cameras, self.size = recipe.cameras, recipe.size
        self.names = recipe.proprio_names
        for folder in config.demos:
            self._check('data.demos', folder, read_recipe(Path(folder)))
        for field, folders in (('layouts', config.layouts), ('gate', (config.gate,))):
            for folder in folders:
                self._check(f'data.{field}', folder, read_layout_recipe(Path(folder)))
        unknown = [name for name in config.proprio if name not in self.names]
        if unknown:
            raise ConfigError('data.proprio', unknown, f'the data have {list(self.names)}')
        self.columns = [self.names.index(name) for name in config.proprio]
        self.objects: tuple[str, ...] = ()
        self.named = np.zeros(len(config.tasks), int)
        self.instructions = tuple(_instruction(name) for name in config.tasks)

    def _check(self, field: str, folder: str, recipe: object) -> None:
        split = 'eval' if field == 'data.gate' else 'train'  # else held-out scenes are learnt
        if recipe.split != split:
            raise ConfigError(field, folder, f'is of the split {recipe.split!r}, not {split!r}')
        for name in ('cameras', 'size', 'proprio_names'):
            wanted = {'cameras': self.cameras, 'size': self.size, 'proprio_names': self.names}
            if getattr(recipe, name) != wanted[name]:
                other = f'the first of data.layouts has {wanted[name]}'
                why = f'has {name} {getattr(recipe, name)}, {other}'
                raise ConfigError(field, folder, why)

    def layouts(self, folder: str) -> Frames:
        """All scenes of a folder, with the answer to every instruction of the shuffled tasks."""
        shards = list(read_layouts(Path(folder)))
        if not shards:
            raise ConfigError('data.layouts', folder, 'holds no scene')
        names = shards[0].place_names.tolist()
        if not self.objects:
            # What other scenes have is asked about in demonstrations alone.
            others = dict.fromkeys(s.pick for s in self.skills if s.pick not in names)
            self.objects = (*names, *others)
            self.named = np.array([self.objects.index(s.pick) for s in self.skills])
        hand = [self.names.index(f'eef_{axis}') for axis in 'xyz']
        done = []
        for shard in shards:
            frames = self._still(shard.proprio[:, hand], shard.turn, shard.places, names)
            done.append(
                Frames(
                    images=shard.images,
                    proprio=shard.proprio[:, self.columns],
                    pixels=self._pixels(shard.pixels, names),
                    **frames,
                )
            )
        return _join(done)

    def _still(
        self, hand: np.ndarray, turn: np.ndarray, places: np.ndarray, names: list[str]
    ) -> dict[str, np.ndarray]:
        """Answers to all instructions of the shuffled tasks, for empty hands anywhere."""
        answers = self._unasked(len(hand))
        for index, (task, skill) in enumerate(zip(self.config.tasks, self.skills, strict=True)):
            if task.startswith(SHUFFLED):
                grasp = grasp_of(skill, places, names)
                chunk = reach_chunk(hand, turn, grasp, skill.travel_z, self.config.horizon)
                answers['actions'][:, index] = to_dataset(chunk)
                answers['targets'][:, index] = places[:, names.index(skill.pick)]
                answers['asked'][:, index] = True
        return answers

    def _pixels(self, seen: np.ndarray, names: list[str]) -> np.ndarray:
        """[F, V, O, 2] of all objects, of [F, V, O', 2] of these."""
        unknown = np.full(seen.shape[-1], np.nan, np.float32)
        columns = [names.index(name) if name in names else -1 for name in self.objects]
        return np.stack(
            [seen[:, :, at] if at >= 0 else np.broadcast_to(unknown, seen[:, :, 0].shape)
             for at in columns], axis=2,
        )  # fmt: skip

    def _unasked(self, count: int) -> dict[str, np.ndarray]:
        shape = (count, len(self.skills))
        return {
            'actions': np.zeros((*shape, self.config.horizon, 7), np.float32),
            'targets': np.zeros((*shape, 3), np.float32),
            'asked': np.zeros(shape, bool),
        }

    def demo(self, episode: Episode) -> Frames | None:
        """An episode's frames; None for a task that is not learnt."""
        if episode.task not in self.config.tasks:
            return None
        return Frames(
            images=episode.images,
            proprio=episode.proprio[episode.frame_steps][:, self.columns],
            pixels=self._pixels(episode.pixels, episode.place_names.tolist()),
            **self._answers(episode),
        )

    def _answers(self, episode: Episode) -> dict[str, np.ndarray]:
        """Every instruction's before the grasp, where objects are shuffled; else its own."""
        own, steps = self.config.tasks.index(episode.task), episode.frame_steps
        places, names = episode.places[steps], episode.place_names.tolist()
        if episode.task.startswith(SHUFFLED):
            proprio = episode.proprio[steps]
            hand = proprio[:, [self.names.index(f'eef_{axis}') for axis in 'xyz']]
            turn = np.stack([_turn(row, self.names) for row in proprio])
            answers = self._still(hand, turn, places, names)
            late = steps >= before_grasp(episode.actions)
        else:
            answers, late = self._unasked(len(steps)), np.ones(len(steps), bool)
        answers['asked'][late] = np.arange(len(self.skills)) == own
        answers['targets'][:, own] = places[:, names.index(self.skills[own].pick)]
        if late.any():
            chunks = [episode.chunk(step, self.config.horizon)[0] for step in steps[late]]
            answers['actions'][late, own] = to_dataset(np.stack(chunks))
        return answers


def to_dataset(actions: np.ndarray) -> np.ndarray:
    """[..., 7] gripper from -1 = open, +1 = close to 1 = open, 0 = close."""
    changed = actions.astype(np.float32)
    changed[..., 6] = 0.5 - 0.5 * changed[..., 6]
    return changed


def _skill(name: str) -> Skill:
    find_task(name)
    if name not in SKILLS:
        raise ConfigError('data.tasks', name, f'the expert knows only {", ".join(SKILLS)}')
    return SKILLS[name]


def _instruction(name: str) -> str:
    return find_task(name).instruction or OFFICIAL[name]


# The sentences of the official tasks that the expert knows, as LIBERO has them.
OFFICIAL = {
    'libero_goal/1': 'put the bowl on the stove',
    'libero_goal/4': 'put the bowl on top of the cabinet',
    'libero_goal/6': 'put the cream cheese in the bowl',
    'libero_goal/8': 'put the bowl on the plate',
}


def _turn(proprio: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """[3] rad that is left until the hand points down."""
    vector = proprio[[names.index(f'eef_a{axis}') for axis in 'xyz']].astype(float)
    angle = np.linalg.norm(vector)
    axis = vector / max(angle, 1e-9)
    return straightening(np.array([*(axis * np.sin(angle / 2)), np.cos(angle / 2)]))


def _join(frames: Sequence[Frames]) -> Frames:
    fields = ('images', 'proprio', 'actions', 'targets', 'asked', 'pixels')
    return Frames(**{n: np.concatenate([getattr(f, n) for f in frames]) for n in fields})


def _bounds(values: np.ndarray, mask: np.ndarray) -> Bounds:
    low, high = np.quantile(values.astype(np.float64), (0.01, 0.99), axis=0)
    return Bounds(low, np.maximum(high, low + 1e-3), mask)


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """B questions about I scenes.

    Attributes:
        images: [I, V, Y, X, 3] float32, 0..255.
        pixels: [I, V, O, 2] px, NaN where unknown.
        scene: [B] which scene each question is about.
        instruction: [B] which one.
        proprio: [B, P] normalised.
        actions: [B, L, 7] normalised answer.
        target: [B, 3] answer in TARGET_UNIT_M.
        named: [B] index of the object that the instruction names.
    """

    images: Tensor
    pixels: Tensor
    scene: Tensor
    instruction: Tensor
    proprio: Tensor
    actions: Tensor
    target: Tensor
    named: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        values = {f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)}
        return Batch(**values)


def make_batch(
    data: TrainingSet,
    picks: Sequence[tuple[Frames, int, Sequence[int]]],
    images: np.ndarray,
    pixels: np.ndarray,
) -> Batch:
    """Questions about frames.

    Args:
        data: what the frames belong to.
        picks: (frames, index, instructions to ask) per scene.
        images: [I, V, Y, X, 3] of these, perhaps augmented.
        pixels: [I, V, O, 2], likewise.
    """
    asked = [(s, f, i, k) for s, (f, i, some) in enumerate(picks) for k in some]
    proprio = np.stack([frames.proprio[i] for _, frames, i, _ in asked])
    actions = np.stack([frames.actions[i, k] for _, frames, i, k in asked])
    targets = np.stack([frames.targets[i, k] for _, frames, i, k in asked])
    seen = np.full(images.shape, GREY, np.float32) if data.grey else images.astype(np.float32)
    return Batch(
        images=torch.from_numpy(seen),
        pixels=torch.from_numpy(pixels),
        scene=torch.tensor([s for s, *_ in asked]),
        instruction=torch.tensor([k for *_, k in asked]),
        proprio=torch.from_numpy(data.proprio_bounds.normalize(proprio).astype(np.float32)),
        actions=torch.from_numpy(data.action_bounds.normalize(actions).astype(np.float32)),
        target=torch.from_numpy(targets / TARGET_UNIT_M),
        named=torch.from_numpy(data.named)[[k for *_, k in asked]],
    )


def augment(
    images: np.ndarray, pixels: np.ndarray, rng: np.random.Generator, shift_px: int, colour: float
) -> tuple[np.ndarray, np.ndarray]:
    """Shift every image, edges repeated, and change its brightness, contrast and tint.

    Args:
        images: [I, V, Y, X, 3] uint8.
        pixels: [I, V, O, 2] px.
        rng: draws, for every image anew.
        shift_px: at most, in x and in y.
        colour: share by which contrast and brightness vary; a third of it per channel.

    Returns:
        [I, V, Y, X, 3] float32 within 0..255; [I, V, O, 2].
    """
    many, size = images.shape[:2], images.shape[2]
    shift = rng.integers(-shift_px, shift_px + 1, (*many, 2))
    moved = np.empty(images.shape, np.float32)
    for at in np.ndindex(many):
        x, y = (np.clip(np.arange(size) - offset, 0, size - 1) for offset in shift[at])
        moved[at] = images[at][y][:, x]
    gain = rng.uniform(1 - colour, 1 + colour, (*many, 1, 1, 1))
    tint = rng.uniform(1 - colour / 3, 1 + colour / 3, (*many, 1, 1, 3))
    light = rng.uniform(-128 * colour, 128 * colour, (*many, 1, 1, 1))
    moved = (moved - 128) * (gain * tint) + 128 + light
    return np.clip(moved, 0, 255).astype(np.float32), pixels + shift[:, :, None].astype(np.float32)


def draw_batch(
    data: TrainingSet, step: int, *, seed: int, layouts: int, instructions: int, demos: int,
    shift_px: int, colour: float,
) -> Batch:  # fmt: skip
    """The batch of one step: a function of seed and step, so that a resumed run sees the same.

    Args:
        data: to draw from.
        step: of the optimiser.
        seed: of the run.
        layouts: still scenes.
        instructions: asked of each of them.
        demos: demonstration frames, one instruction each.
        shift_px, colour: see `augment`.
    """
    rng = np.random.default_rng((seed, step))
    picks = []
    for frames, count, ask in ((data.layouts, layouts, instructions), (data.demos, demos, 1)):
        for index in rng.integers(len(frames), size=count):
            known = np.flatnonzero(frames.asked[index])
            some = rng.choice(known, min(ask, len(known)), replace=False)
            picks.append((frames, int(index), some.tolist()))
    images = np.stack([frames.images[index] for frames, index, _ in picks])
    pixels = np.stack([frames.pixels[index] for frames, index, _ in picks])
    return make_batch(data, picks, *augment(images, pixels, rng, shift_px, colour))


def draw_visual_idx(
    step: int,
    *,
    seed: int,
    sequences: int,
    patches: int,
    dropout: float,
    spared: np.ndarray | None = None,
    chance: float = 0.0,
) -> Tensor:
    """Which patches the sequences of one step have: as many each, every one its own.

    Args:
        step: of the optimiser.
        seed: of the run.
        sequences: B.
        patches: V*N.
        dropout: largest share of them that goes; how much does is drawn anew for every step.
        spared: [B, V*N] bool, patches that go last with a chance of `chance`; None: none do.
        chance: of each of them.

    Returns:
        [B, K] int64, ascending; at least one.
    """
    rng = np.random.default_rng((seed, step, 1))  # apart from the draw of the batch itself
    count = max(1, round(patches * (1 - rng.uniform(0.0, dropout))))
    order = rng.random((sequences, patches))
    if spared is not None:
        order -= spared & (rng.random(order.shape) < chance)
    order = order.argsort(axis=1)
    return torch.from_numpy(np.sort(order[:, :count], axis=1))
