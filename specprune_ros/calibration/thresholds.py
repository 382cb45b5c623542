"""Fine and coarse motion told apart by the threshold between their executed speeds.

SpecPrune-VLA (section 6.2, Fig. 6, A.1.3) reads v_t^th and v_r^th off bimodal histograms by eye.
Here Hartigan's dip says whether one mode explains the speeds, two modes say where the density is
lowest, and resampled runs of steps say how sure that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from specprune_ros.calibration.density import Bins, TwoModes, fit_modes, split_modes
from specprune_ros.calibration.dip import dip_p_value, dip_statistic, sparse_stretch
from specprune_ros.calibration.power_normal import fit_power_normals
from specprune_ros.checks import executed_displacement
from specprune_ros.config import RobotConfig
from specprune_ros.errors import ObservationError
from specprune_ros.pruning.motion import Motion, motion_of
from specprune_ros.recordings.base import Event
from specprune_ros.types import ExecutedAction

NAN = float('nan')
NOWHERE = (NAN, NAN)
REST = 0.01  # of the 95th percentile: slower steps stand still, and belong to neither mode
LEAST_STEPS = 50
LEAST_LEVELS = 5  # different speeds; fewer are exact commands, more with ties are rounded ones
SIGNIFICANCE = 0.005  # of the dip: no sample of the unimodal null has as large a one
DEEPEST = 0.7  # density in the valley over that of the lower peak; above it there is no valley
SAME = 1e-9  # relative difference of speeds that are the same but for floating-point noise
AT_LIMIT = 0.9  # of the highest speed, if it repeats: a threshold above it parts what a limit cut
RESAMPLES = 40

Fit = Callable[[Bins, np.ndarray, np.ndarray], TwoModes]


@dataclass(frozen=True, kw_only=True)
class SpeedValley:
    """What the speeds of one kind say about their threshold.

    Attributes:
        speeds: [n] executed speeds in motion, in order.
        at_rest: executed steps that stood still; left out.
        why_not: why there is no valley; empty when there is one.
        valley: the threshold, in the unit of the speeds: where their density is lowest between
            the peaks.
        interval: 95 % of the thresholds of resampled blocks of steps.
        found_share: share of the resamples that have a valley at all.
        peaks: speeds of the slow and the fast mode.
        depth: the valley's density over that of the lower peak.
        dip: Hartigan's dip.
        p_value: how often a unimodal sample of this size has as large a dip.
        density: [2, K] of the slow and the fast mode at `grid`, times their share.
        grid: [K] speeds, ascending.
    """

    speeds: np.ndarray
    at_rest: int
    why_not: str
    valley: float = NAN
    interval: tuple[float, float] = NOWHERE
    found_share: float = NAN
    peaks: tuple[float, float] = NOWHERE
    depth: float = NAN
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
    why = _too_few(speeds, moving)
    if why:
        return SpeedValley(**seen, why_not=why)
    spread = _without_ties(moving, seed)
    bins = Bins.of(spread)
    index = bins.index(spread)
    counts = bins.count(index)
    dip = float(dip_statistic(spread))
    p_value = dip_p_value(dip, counts, bins.edges, seed)
    seen |= {'dip': dip, 'p_value': p_value}
    if p_value > SIGNIFICANCE:
        why = f'not bimodal: one mode explains the speeds (dip test, p {p_value:.2f})'
        return SpeedValley(**seen, why_not=why)
    split = math.sqrt(math.prod(sparse_stretch(spread)))
    modes, fit = _two_modes(bins, counts, split)
    seen |= {'peaks': modes.peaks, 'depth': modes.depth}
    seen |= {'density': modes.density, 'grid': bins.centers}
    why = _why_not(modes, moving)
    if why:
        return SpeedValley(**seen, why_not=why)
    found = _resampled(index, modes, fit, seed)
    ends = np.percentile(found if len(found) else modes.threshold, (2.5, 97.5))
    return SpeedValley(
        **seen,
        why_not='',
        valley=modes.threshold,
        interval=(float(ends[0]), float(ends[1])),
        found_share=len(found) / RESAMPLES,
    )


def _too_few(speeds: np.ndarray, moving: np.ndarray) -> str:
    if not len(speeds):
        return 'no executed actions were recorded'
    if len(moving) < LEAST_STEPS:
        return f'{len(moving)} executed steps in motion, needs {LEAST_STEPS}'
    if np.ptp(moving) <= SAME * moving.max():
        return 'not bimodal: all speeds are the same'
    return ''


def _two_modes(bins: Bins, counts: np.ndarray, split: float) -> tuple[TwoModes, Fit]:
    """The modes of steps [K] in the bins, parted by a speed to start from, and what fits them.

    Normal, gamma and log-normal modes know how empty a gap is where there is no step; log-concave
    ones are for speeds that are unlike these.
    """
    shares = split_modes(bins, counts, split)
    modes = fit_power_normals(bins, counts, shares)
    if not modes.refuted_by(counts):
        return modes, fit_power_normals
    return fit_modes(bins, counts, shares), fit_modes


def _why_not(modes: TwoModes, speeds: np.ndarray) -> str:
    if modes.depth > DEEPEST:
        return 'not bimodal: no valley between two modes, or a shallow one'
    limit = speeds.max()
    repeats = (speeds >= limit * (1 - SAME)).sum() > 1
    if repeats and modes.threshold > AT_LIMIT * limit:
        return 'not bimodal: what is faster only is what a speed limit cut off'
    return ''


def _without_ties(speeds: np.ndarray, seed: int) -> np.ndarray:
    """The speeds, those that repeat spread over what rounding to their neighbours would take.

    Rounded speeds are a comb whose every tooth would count as a mode.
    """
    shortened = np.round(speeds / speeds.max() / SAME) * SAME
    levels, level_of, counts = np.unique(shortened, return_inverse=True, return_counts=True)
    if len(levels) < LEAST_LEVELS:
        return speeds
    gaps = np.diff(levels)
    gaps = np.minimum(np.append(gaps, gaps[-1]), np.append(gaps[0], gaps))
    reach = np.where(counts > 1, np.minimum(gaps, levels) / 2, 0.0)
    shifts = np.random.default_rng(seed).uniform(-1.0, 1.0, len(speeds))
    return speeds + speeds.max() * reach[level_of] * shifts


def _resampled(index: np.ndarray, modes: TwoModes, fit: Fit, seed: int) -> np.ndarray:
    """Thresholds of those of RESAMPLES that have a valley.

    Blocks of steps are drawn, not steps: neighbours belong to one phase of the motion, and say
    the same thing twice.

    Args:
        index: [n] the steps' bins, in order.
        modes: of all steps.
        fit: what fits modes of the same kind.
        seed: of the resampling.
    """
    random = np.random.default_rng(seed)
    steps, block = len(index), math.ceil(math.sqrt(len(index)))
    starts = random.integers(0, steps, (RESAMPLES, math.ceil(steps / block), 1))
    rows = ((starts + np.arange(block)) % steps).reshape(RESAMPLES, -1)[:, :steps]
    shares = modes.mass / np.maximum(modes.mass.sum(axis=0), np.finfo(float).tiny)
    fits = (fit(modes.bins, modes.bins.count(index[row]), shares) for row in rows)
    return np.array([each.threshold for each in fits if each.depth <= DEEPEST])
