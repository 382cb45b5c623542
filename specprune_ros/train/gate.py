"""Whether a network goes for the object that it is told to: measured on held-out still scenes.

The loss of held-out demonstrations does not tell: most of their frames show which way the hand
goes already. In a still scene with a random hand only image and words do.

"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from specprune_ros.train.data import TARGET_UNIT_M, TrainingSet, make_batch
from specprune_ros.train.network import AuxiliaryHeads, Network

FAR = 3 / 8  # of the way that unit commands make in a chunk
CHUNK = 25  # scenes at a time


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One measurement.

    Attributes:
        nearest: share of scenes in which, of the objects that can be named, the named one is the
            nearest to the place that the network tells (chance: a quarter).
        error_mm: horizontal distance from that place to the named object, median.
        action_error: L1 of the normalised chunk, all elements alike.
        heading_deg: angle between the chunk's horizontal motion and the right one, median of
            the hands whose right chunk goes far: 3/8 of the longest way or more; NaN without any.
    """

    nearest: float
    error_mm: float
    action_error: float
    heading_deg: float

    def passed(self) -> bool:
        """Whether figures about pruning may be taken from this network."""
        return self.nearest >= 0.98 and self.error_mm <= 10.0


@torch.no_grad()
def measure(
    network: Network,
    heads: AuxiliaryHeads,
    data: TrainingSet,
    prompts: list[tuple[int, ...]],
    scenes: int,
) -> Gate:
    """Ask one instruction of every held-out scene, in turn.

    Args:
        network: in eval mode or not; nothing in it depends on that.
        heads: that tell the named object's place.
        data: with the scenes.
        prompts: ids of every instruction.
        scenes: how many of them.
    """
    frames = data.gate
    places, actions, wanted, truth = [], [], [], []
    indices = range(min(scenes, len(frames)))
    for first in range(0, len(indices), CHUNK):
        picks = [(frames, i, [_instruction(frames.asked[i], i)]) for i in indices[first:][:CHUNK]]
        images = np.stack([frames.images[i] for _, i, _ in picks])
        batch = make_batch(data, picks, images, np.stack([frames.pixels[i] for _, i, _ in picks]))
        batch = batch.to(next(network.parameters()).device)
        ids = [prompts[k] for k in batch.instruction.tolist()]
        outputs = network(batch.images, batch.scene, batch.proprio, ids)
        places.append(heads.target(outputs.stop).cpu().numpy() * TARGET_UNIT_M)
        actions.append(outputs.actions.cpu().numpy())
        wanted.append(batch.actions.cpu().numpy())
        for _, i, (own,) in picks:
            known = np.flatnonzero(frames.asked[i])
            truth.append((frames.targets[i, known], known.tolist().index(own)))
    return _figures(data, *(np.concatenate(some) for some in (places, actions, wanted)), truth)


def _instruction(asked: np.ndarray, index: int) -> int:
    known = np.flatnonzero(asked)
    return int(known[index % len(known)])


def _figures(
    data: TrainingSet,
    places: np.ndarray,
    actions: np.ndarray,
    wanted: np.ndarray,
    truth: list[tuple[np.ndarray, int]],
) -> Gate:
    nearest, error = [], []
    for place, (candidates, own) in zip(places, truth, strict=True):
        gaps = np.linalg.norm(candidates[:, :2] - place[:2], axis=1)
        nearest.append(int(gaps.argmin()) == own)
        error.append(gaps[own])
    motion, right = (
        data.action_bounds.unnormalize(a)[..., :2].sum(axis=1) for a in (actions, wanted)
    )
    far = np.linalg.norm(right, axis=1) > FAR * wanted.shape[1]
    cosine = (motion * right).sum(axis=1) / np.maximum(
        np.linalg.norm(motion, axis=1) * np.linalg.norm(right, axis=1), 1e-9
    )
    angles = np.degrees(np.arccos(np.clip(cosine[far], -1.0, 1.0)))
    return Gate(
        nearest=float(np.mean(nearest)),
        error_mm=1000 * float(np.median(error)),
        action_error=float(np.abs(actions - wanted).mean()),
        heading_deg=float(np.median(angles)) if far.any() else math.nan,
    )
