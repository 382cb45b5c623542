"""Fine and coarse motion told apart by the valley between their executed speeds.

SpecPrune-VLA (section 6.2, Fig. 6, A.1.3) reads v_t^th and v_r^th off bimodal histograms by eye.
Here Hartigan's dip says whether one mode explains the speeds, a mixture and a kernel density say
where the valley is, and resampled runs of steps say how sure that is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from specprune_ros.calibration.density import (
    BINS,
    NO_ANTIMODE,
    NOWHERE,
    Antimode,
    KernelDensity,
    Mixture,
    antimode,
    fit_mixture,
    refit_mixture,
)
from specprune_ros.calibration.dip import dip_p_value, dip_statistic
from specprune_ros.checks import executed_displacement
from specprune_ros.config import RobotConfig
from specprune_ros.errors import ObservationError
from specprune_ros.pruning.motion import Motion, motion_of
from specprune_ros.recordings.base import Event
from specprune_ros.types import ExecutedAction

NAN = float('nan')
REST = 0.01  # of the 95th percentile: slower steps stand still, and belong to neither mode
LEAST_STEPS = 50
SIGNIFICANCE = 0.01  # of the dip
DEEPEST = 0.7  # density in the valley over that of the lower peak; above it there is no valley
RESAMPLES = 120


@dataclass(frozen=True, kw_only=True)
class SpeedValley:
    """What the speeds of one kind say about their threshold.

    Attributes:
        speeds: [n] executed speeds in motion, in order.
        at_rest: executed steps that stood still; left out.
        why_not: why there is no valley; empty when there is one.
        valley: the threshold, in the unit of the speeds: the geometric mean of both estimates.
        interval: from the lower to the higher end of the 95 % intervals of both estimates, from
            resampled blocks of steps.
        found_share: share of the resamples that have a valley at all.
        mixture, kernel: the two estimates.
        dip: Hartigan's dip.
        p_value: how often a uniform sample of this size has as large a dip.
        density: [2, BINS] of the mixture and the kernels at `grid`.
        grid: [BINS] speeds.
    """

    speeds: np.ndarray
    at_rest: int
    why_not: str
    valley: float = NAN
    interval: tuple[float, float] = NOWHERE
    found_share: float = NAN
    mixture: Antimode = NO_ANTIMODE
    kernel: Antimode = NO_ANTIMODE
    dip: float = NAN
    p_value: float = NAN
    density: np.ndarray | None = None
    grid: np.ndarray | None = None

    @property
    def bimodal(self) -> bool:
        """Whether there is a valley."""
        return not self.why_not

    @property
    def slow_share(self) -> float:
        """Share of the moving steps below the valley."""
        return float((self.speeds < self.valley).mean()) if self.bimodal else NAN


def executed_motion(events: Iterable[Event], robot: RobotConfig) -> tuple[list[Motion], int]:
    """The executed steps of a recording, in order, as the controller sees them (Eqs. 10-11).

    Returns:
        The motions, and how many executed actions do not say what moved. Dry runs count nowhere.
    """
    motions, unusable = [], 0
    for event in events:
        if not isinstance(event, ExecutedAction) or event.dry_run:
            continue
        try:
            moved = executed_displacement(event, robot)
        except ObservationError:
            moved = None
        if moved is None:
            unusable += 1
        else:
            motions.append(motion_of(*moved))
    return motions, unusable


def find_valley(speeds: np.ndarray, seed: int = 0) -> SpeedValley:
    """The speed that separates fine from coarse motion (section 6.2).

    Args:
        speeds: [n] >= 0 in the order of execution, any unit: the result scales with it.
        seed: of the resampling.

    Returns:
        The valley; none when one mode explains the speeds, or a density has no deep valley.
    """
    speeds = np.asarray(speeds, float)
    moving = speeds[speeds > REST * np.percentile(speeds, 95)] if len(speeds) else speeds
    seen = {'speeds': moving, 'at_rest': len(speeds) - len(moving)}
    if len(moving) < LEAST_STEPS:
        why = f'{len(moving)} executed steps in motion, needs {LEAST_STEPS}'
        why = why if len(speeds) else 'no executed actions were recorded'
        return SpeedValley(**seen, why_not=why)
    if np.ptp(moving) <= 1e-9 * moving.max():
        return SpeedValley(**seen, why_not='not bimodal: all speeds are the same')
    grid = moving.max() * (np.arange(BINS) + 1.0) / BINS
    mixture, kernels = fit_mixture(moving), KernelDensity(moving, grid)
    densities = np.concatenate((mixture.density(grid), kernels.density(moving[None])))
    by_mixture, by_kernels = (antimode(grid, density) for density in densities)
    dip = dip_statistic(moving)
    p_value = dip_p_value(dip, len(moving))
    seen |= {'mixture': by_mixture, 'kernel': by_kernels, 'dip': dip, 'p_value': p_value}
    seen |= {'density': densities, 'grid': grid}
    why = _why_not(p_value, by_mixture.depth, by_kernels.depth)
    if why:
        return SpeedValley(**seen, why_not=why)
    estimates = (by_mixture.at, by_kernels.at)
    valleys = _resampled(moving, mixture, kernels, seed)
    found = valleys[np.isfinite(valleys).all(axis=1)]
    ends = np.percentile(found, (2.5, 97.5), axis=0) if len(found) else np.array([estimates])
    return SpeedValley(
        **seen,
        why_not='',
        valley=math.sqrt(math.prod(estimates)),
        interval=(float(ends.min()), float(ends.max())),
        found_share=len(found) / len(valleys),
    )


def _why_not(p_value: float, *depths: float) -> str:
    if p_value > SIGNIFICANCE:
        return f'not bimodal: one mode explains the speeds (dip test, p {p_value:.2f})'
    if not all(depth <= DEEPEST for depth in depths):
        return 'not bimodal: no valley between two modes, or a shallow one'
    return ''


def _resampled(
    speeds: np.ndarray, mixture: Mixture, kernels: KernelDensity, seed: int
) -> np.ndarray:
    """[RESAMPLES, 2] valleys of the mixture and the kernels, NaN where there is none.

    Blocks of steps are drawn, not steps: neighbours belong to one phase of the motion, and say
    the same thing twice.
    """
    random = np.random.default_rng(seed)
    steps, block = len(speeds), math.ceil(math.sqrt(len(speeds)))
    starts = random.integers(0, steps, (RESAMPLES, math.ceil(steps / block), 1))
    rows = ((starts + np.arange(block)) % steps).reshape(RESAMPLES, -1)[:, :steps]
    fits = refit_mixture(mixture, speeds[rows], speeds)
    pairs = zip(fits.density(kernels.grid), kernels.density(speeds[rows]), strict=True)
    return np.array([[antimode(kernels.grid, density).at for density in pair] for pair in pairs])
