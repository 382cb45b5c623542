"""The similarity threshold tau from what a camera's noise does to patches that show no motion.

SpecPrune-VLA (section 4.1.2, A.6.2) takes 0.95 in simulation and 0.8 on a real robot by eye. Two
pictures of a still patch p with independent noise of variance s^2 per channel differ by

    1 - sim = s^2 / mean(p^2)   in expectation,

so (1 - sim) mean(p^2) estimates s^2 whatever the patch shows, and still patches are those whose
estimates agree, in time and with each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

NAN = float('nan')
NOWHERE = (NAN, NAN)
ROUNDING = 1 / 12  # variance of rounding to 8 bits, levels^2: less is no sensor's noise
LEAST_PAIRS = 20  # pairs of frames
LEAST_STATIC = 500  # static patches times pairs
STEADY = 0.5  # greatest spread of a still patch's log variance in time, standard deviations
SIMILAR = math.log(4.0)  # a still patch's log variance may exceed the others' by so much
OUTLIER = 4.0  # standard deviations above a patch's own median: something moved
NARROWEST = 0.06  # of that spread: what 588 independent values leave, sqrt(2 / 588)
STILL_PAIRS = 2  # pairs on either side that must be still too
RESAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class CameraNoise:
    """What still patches of one camera do.

    Attributes:
        pairs: pairs of consecutive frames that were compared.
        static_patches, patches: patches with still times, of all.
        static: [m] 1 - similarity of still patches in still times.
        all_pairs: [n] 1 - similarity of everything, for the picture.
        why_not: why there is no threshold; empty when there is one.
        sigma: noise per pixel and channel, grey levels 0..255.
        threshold: greatest tau at which the wanted share of still patches counts as changed.
        interval: 95 % interval of it, from resampled patches.
    """

    pairs: int
    static_patches: int
    patches: int
    static: np.ndarray
    all_pairs: np.ndarray
    why_not: str = ''
    sigma: float = NAN
    threshold: float = NAN
    interval: tuple[float, float] = NOWHERE

    def false_change_rate(self, tau: float) -> float:
        """Share of still patches that tau calls changed; NaN without any."""
        return float((self.static > 1.0 - tau).mean()) if len(self.static) else NAN


def patch_power(frames: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean squared pixel value of every patch.

    Args:
        frames: [V, Y, X, 3] uint8.
        grid: (rows, cols) of patches; divides Y and X.

    Returns:
        [V, N] float32, grey levels squared.
    """
    cameras, height, width, _ = frames.shape
    rows, cols = grid
    shape = (cameras, rows, height // rows, cols, width // cols * 3)
    return frames.view(shape).float().square().mean(dim=(2, 4)).flatten(1)


def camera_noise(
    dissimilarity: np.ndarray, power: np.ndarray, rate: float, seed: int = 0
) -> CameraNoise:
    """The threshold below which still patches of one camera fall no more often than wanted.

    Args:
        dissimilarity: [P, N] 1 - similarity of the patches of consecutive frames, in order.
        power: [P, N] mean squared pixel value of the patches (`patch_power`).
        rate: wanted false-change rate, in 0..1.
        seed: of the resampling.

    Returns:
        The threshold, or why there is none: few pictures, nothing still, or no noise at all (a
        rendered or re-encoded recording, whose still parts are equal).
    """
    moved = dissimilarity.max(axis=1, initial=0.0) > 0.0
    dissimilarity, power = dissimilarity[moved], power[moved]  # without repeated pictures
    pairs, patches = dissimilarity.shape
    variance = dissimilarity * power
    seen = {'pairs': pairs, 'patches': patches, 'all_pairs': dissimilarity.ravel()}
    still = still_times(variance) if pairs >= LEAST_PAIRS else np.zeros_like(variance, bool)
    static = dissimilarity[still]
    seen |= {'static': static, 'static_patches': int(still.any(axis=0).sum())}
    if pairs < LEAST_PAIRS:
        why = f'{pairs} pairs of consecutive pictures that differ, needs {LEAST_PAIRS}'
    elif len(static) < LEAST_STATIC:
        why = 'nothing keeps still'
    elif np.median(variance[still]) < ROUNDING:
        why = 'no noise where nothing moves (rendered or re-encoded)'
    else:
        why = ''
    sigma = float(np.sqrt(np.median(variance[still]))) if len(static) else NAN
    if why:
        return CameraNoise(**seen, why_not=why, sigma=sigma)
    low, high = _resampled(dissimilarity, still, rate, seed)
    return CameraNoise(
        **seen,
        sigma=sigma,
        threshold=_threshold(static, rate),
        interval=(low, high),
    )


def still_times(variance: np.ndarray) -> np.ndarray:
    """When and where nothing moved.

    Args:
        variance: [P, N] estimates of the noise variance, levels^2.

    Returns:
        [P, N] bool: patches whose estimates are steady in time and like those of the other steady
        patches, at times when they and their neighbours in time are no outliers.
    """
    log = np.log(np.maximum(variance, ROUNDING / 10))
    middle = np.median(log, axis=0)
    # Motion only adds to the estimates: the lower half tells how much noise alone spreads them.
    spread = np.maximum(middle - np.percentile(log, 15.87, axis=0), NARROWEST)
    steady = spread < STEADY
    if not steady.any():
        return np.zeros_like(variance, bool)
    like_others = middle <= np.percentile(middle[steady], 25) + SIMILAR
    inlying = log <= middle + OUTLIER * spread
    still = inlying.copy()
    for shift in range(1, STILL_PAIRS + 1):
        still[shift:] &= inlying[:-shift]
        still[:-shift] &= inlying[shift:]
    return still & steady & like_others


def proposed_tau(cameras: dict[str, CameraNoise]) -> tuple[float, str]:
    """One tau for all cameras: the lowest of theirs, so that none sees false changes.

    Returns:
        tau, rounded down in the third digit of 1 - tau, and the camera that sets it; NaN and ''
        when no camera has one.
    """
    known = {name: noise.threshold for name, noise in cameras.items() if not noise.why_not}
    if not known:
        return NAN, ''
    name = min(known, key=known.get)
    gap = 1.0 - known[name]
    digit = 10.0 ** (math.floor(math.log10(gap)) - 2)
    return 1.0 - math.ceil(gap / digit) * digit, name


def _threshold(static: np.ndarray, rate: float) -> float:
    return float(1.0 - np.quantile(static, 1.0 - rate, method='higher'))


def _resampled(
    dissimilarity: np.ndarray, still: np.ndarray, rate: float, seed: int
) -> tuple[float, float]:
    """95 % interval of the threshold when whole patches are drawn, which differ in texture."""
    random = np.random.default_rng(seed)
    columns = [dissimilarity[still[:, patch], patch] for patch in np.flatnonzero(still.any(0))]
    thresholds = []
    for _ in range(RESAMPLES):
        drawn = random.integers(0, len(columns), len(columns))
        thresholds.append(_threshold(np.concatenate([columns[index] for index in drawn]), rate))
    low, high = np.percentile(thresholds, (2.5, 97.5))
    return float(low), float(high)
