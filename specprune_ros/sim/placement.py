"""Where the objects of a shuffled episode stand.

LIBERO-Object puts every object of a task at the same place (within 6 mm) in every episode, so that
a policy can learn the motion and ignore the images. Here the objects change places and move.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MAX_DRAWS = 100_000  # about 30 are needed
# What stands where, and a generator -> position of the hand [3], m, and its turn [3], rad.
HandDraw = Callable[[Mapping[str, np.ndarray], np.random.Generator], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Shuffle:
    """How to draw one layout.

    Attributes:
        objects: what is moved.
        slots: [O] (x, y) m, as many as objects.
        jitter_m: an object stands at most this far from its slot, in x and in y.
        distance_m: between any two objects at least.
        hand_m: (x, y): two objects differ by as much in x or in y. The open hand is wide in y.
    """

    objects: tuple[str, ...]
    slots: tuple[tuple[float, float], ...]
    jitter_m: float
    distance_m: float
    hand_m: tuple[float, float]


def draw_layout(shuffle: Shuffle, rng: np.random.Generator) -> Mapping[str, np.ndarray]:
    """Permute the objects over the slots, and move each; draw again until all stand apart.

    Returns:
        object -> [2] x and y, m.

    Raises:
        RuntimeError: no draw keeps the distances.
    """
    slots = np.array(shuffle.slots)
    for _ in range(MAX_DRAWS):
        moved = slots + rng.uniform(-shuffle.jitter_m, shuffle.jitter_m, slots.shape)
        if stand_apart(moved, shuffle):
            order = rng.permutation(len(slots))
            return dict(zip(shuffle.objects, moved[order], strict=True))
    raise RuntimeError(f'no layout found that keeps {shuffle}')


def stand_apart(positions: np.ndarray | Sequence[Sequence[float]], shuffle: Shuffle) -> bool:
    """Whether the gripper can take any object and touch no other.

    Args:
        positions: [O, 2] m.
        shuffle: the distances to keep.
    """
    points = np.asarray(positions)
    first, second = np.triu_indices(len(points), k=1)
    gaps = np.abs(points[first] - points[second])
    far = np.hypot(*gaps.T) >= shuffle.distance_m
    reachable = (gaps >= np.array(shuffle.hand_m)).any(axis=1)
    return bool((far & reachable).all())


def seed_stream(seed: int, *, split: str, task: str) -> np.random.Generator:
    """The random numbers of one episode; other splits and tasks share none of them.

    Args:
        seed: of the episode, from 0.
        split: 'train' or 'eval'.
        task: its name.
    """
    words = [seed, *split.encode(), 0, *task.encode()]
    return np.random.default_rng(np.random.SeedSequence(words))
