"""Exact against fast preprocessing on a recording: time, pixels, and actions."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from specprune_ros.config import PolicyConfig
from specprune_ros.policy import Policy
from specprune_ros.types import Observation

MODES = ('exact', 'fast')


@dataclass(frozen=True)
class Difference:
    """Figures of one recording.

    Attributes:
        exact_ms, fast_ms: median time of one call for all cameras.
        pixel_mean, pixel_max: absolute differences of the model's images, gray levels.
        action_mean, action_max: absolute differences of dense normalised actions.
        action_step: mean absolute difference of exact actions from query to query, for scale.
    """

    exact_ms: float
    fast_ms: float
    pixel_mean: float
    pixel_max: float
    action_mean: float
    action_max: float
    action_step: float


def compare(config: PolicyConfig, observations: Sequence[Observation]) -> Difference:
    """Run every observation dense, with both modes.

    Args:
        config: any method; it runs with none.
        observations: at least two, with decoded images.
    """
    config = dataclasses.replace(
        config, pruning=dataclasses.replace(config.pruning, method='none')
    )
    pixels: dict[str, list[np.ndarray]] = {mode: [] for mode in MODES}
    actions: dict[str, list[np.ndarray]] = {mode: [] for mode in MODES}
    spent: dict[str, list[float]] = {mode: [] for mode in MODES}
    for mode in MODES:
        model = dataclasses.replace(config.model, preprocessing=mode)
        policy = Policy.load(dataclasses.replace(config, model=model))
        for observation in observations:
            images = [observation.images[name] for name in policy.model.info.cameras]
            start = time.perf_counter()
            prepared = policy.model.preprocess(images).cpu()
            spent[mode].append(1e3 * (time.perf_counter() - start))
            pixels[mode].append(prepared.numpy())
            actions[mode].append(policy.infer(observation).chunk.normalized)
    off = np.abs(np.stack(pixels['exact']).astype(int) - np.stack(pixels['fast']))
    exact, fast = np.stack(actions['exact']), np.stack(actions['fast'])
    moved = np.abs(exact - fast)
    return Difference(
        exact_ms=float(np.median(spent['exact'])),
        fast_ms=float(np.median(spent['fast'])),
        pixel_mean=float(off.mean()),
        pixel_max=float(off.max()),
        action_mean=float(moved.mean()),
        action_max=float(moved.max()),
        action_step=float(np.abs(np.diff(exact, axis=0)).mean()),
    )
