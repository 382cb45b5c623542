"""The speeds of two kinds of motion as two densities, and the threshold between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from specprune_ros.calibration.log_concave import fit_log_concave

BINS = 150  # each: of equal counts, and of equal widths
LEAST_SPREAD = 1e-3  # of a mode to start from, where all its speeds are the same, in the range
ODD_SHARE = 0.02  # of the steps that belong to neither mode, to start from
ENOUGH = 1e-2  # gain in log-likelihood of one iteration, below which EM has arrived
MOST_ITERATIONS = 60
# Misassigned steps by which two thresholds can be told apart, so that in an empty gap none can.
ALIKE = 0.02


@dataclass(frozen=True)
class Bins:
    """Narrow where the speeds are dense, and nowhere wider than a share of their range.

    Attributes:
        edges: [K + 1] ascending speeds > 0.
    """

    edges: np.ndarray

    @classmethod
    def of(cls, speeds: np.ndarray) -> Bins:
        """Bins of speeds [n] > 0, not all the same."""
        shares = np.linspace(0.0, 1.0, BINS + 1)
        even = speeds.min() + shares * np.ptp(speeds)
        return cls(np.unique(np.concatenate((np.quantile(speeds, shares), even))))

    @cached_property
    def widths(self) -> np.ndarray:
        """[K] of the bins."""
        return np.diff(self.edges)

    @cached_property
    def log_widths(self) -> np.ndarray:
        """[K] of the bins in the log of the speed."""
        return np.diff(np.log(self.edges))

    @cached_property
    def centers(self) -> np.ndarray:
        """[K] geometric centres."""
        return np.sqrt(self.edges[1:] * self.edges[:-1])

    def index(self, speeds: np.ndarray) -> np.ndarray:
        """Which bin every speed falls into."""
        return np.searchsorted(self.edges[1:-1], speeds, 'right')

    def count(self, index: np.ndarray) -> np.ndarray:
        """[K] how many speeds there are in each bin."""
        return np.bincount(index, minlength=len(self.widths)).astype(float)


@dataclass(frozen=True, eq=False)
class TwoModes:
    """Slow and fast motion, each of a log-concave density in the log of the speed.

    Some steps belong to neither, and are spread evenly over all speeds.

    Attributes:
        bins: [K] of the speeds.
        mass: [3, K] share of the steps that are slow, fast and neither, in every bin; sums to 1.
        steps: n.
    """

    bins: Bins
    mass: np.ndarray
    steps: float

    @property
    def density(self) -> np.ndarray:
        """[2, K] of the slow and the fast mode per unit of speed, times their share."""
        return self.mass[:2] / self.bins.widths

    @cached_property
    def threshold(self) -> float:
        """The speed that leaves the fewest steps on the wrong side.

        There the densities are equal; where they are both empty, the geometric middle.
        """
        slow, fast = self.mass[:2]
        wrong = np.pad(np.cumsum(fast), (1, 0)) + np.pad(np.cumsum(slow[::-1])[::-1], (0, 1))
        first, last = self._medians
        wrong[:first], wrong[last + 2 :] = math.inf, math.inf
        best = int(wrong.argmin())
        alike = wrong <= wrong[best] + ALIKE / self.steps
        low = best - int(np.argmin(np.append(alike[best::-1], False))) + 1
        high = best + int(np.argmin(np.append(alike[best:], False))) - 1
        return math.sqrt(self.bins.edges[low] * self.bins.edges[high])

    @cached_property
    def peaks(self) -> tuple[float, float]:
        """Speeds of the highest density on either side of the threshold."""
        low, high = self._peaks
        return float(self.bins.centers[low]), float(self.bins.centers[high])

    @cached_property
    def depth(self) -> float:
        """The least density between the peaks over that of the lower peak; 1 without a valley."""
        density = self.density.sum(axis=0)
        low, high = self._peaks
        return float(density[low : high + 1].min() / min(density[low], density[high]))

    @property
    def _peaks(self) -> tuple[int, int]:
        density = self.density.sum(axis=0)
        split = int(np.clip(self.bins.index(np.array(self.threshold)), 1, len(density) - 1))
        return int(density[:split].argmax()), split + int(density[split:].argmax())

    @property
    def _medians(self) -> tuple[int, int]:
        """Bins of the modes' medians, ascending."""
        shares = np.cumsum(self.mass[:2], axis=1)
        low, high = np.sort((shares < shares[:, -1:] / 2).sum(axis=1))
        return int(low), int(high)


def split_modes(bins: Bins, counts: np.ndarray, split: float) -> np.ndarray:
    """How sure every bin is slow, fast or neither, from modes that a speed parts.

    The modes are normal in the root of the speed, which lies between the speed and its log. They
    overlap from the start: modes that do not would never come to.

    Returns:
        [3, K], over the modes 1.
    """
    at = np.sqrt(bins.centers)
    mass = np.empty((3, len(at)))
    is_slow = np.arange(len(at)) <= min(bins.index(np.array(split)), len(at) - 2)
    for mode, mine in enumerate((is_slow, ~is_slow)):
        weights = counts * mine
        mean = weights @ at / weights.sum()
        spread = math.sqrt(weights @ (at - mean) ** 2 / weights.sum()) or LEAST_SPREAD * np.ptp(at)
        density = np.exp(-0.5 * ((at - mean) / spread) ** 2) / spread / math.sqrt(2 * math.pi)
        widths = np.diff(np.sqrt(bins.edges))
        mass[mode] = weights.sum() / counts.sum() * (1 - ODD_SHARE) * density * widths
    mass[2] = ODD_SHARE * _even(bins)
    return mass / mass.sum(axis=0)


def fit_modes(bins: Bins, counts: np.ndarray, shares: np.ndarray) -> TwoModes:
    """The two likeliest log-concave modes (EM).

    Args:
        bins: K of them.
        counts: [K] steps in the bins.
        shares: [3, K] how sure every bin is slow, fast or neither, to start from.

    Source: Chang and Walther, Clustering with mixtures of log-concave distributions (2007).
    """
    at, steps, even, last = np.log(bins.centers), counts.sum(), _even(bins), -math.inf
    mass = shares * (counts / steps)
    for _ in range(MOST_ITERATIONS):
        weights = shares * (counts / steps)
        sizes = weights.sum(axis=1)
        if steps * sizes[:2].min() < 1.0:
            break  # a mode has no step left to be fitted to
        modes = [fit_log_concave(at, bins.log_widths, each) for each in weights[:2]]
        mass = sizes[:, None] * np.stack((*(m * bins.log_widths for m in modes), even))
        total = np.maximum(mass.sum(axis=0), np.finfo(float).tiny)
        shares = mass / total
        likelihood = float(counts @ np.log(total))
        if likelihood - last < ENOUGH:
            break
        last = likelihood
    return TwoModes(bins, mass, steps)


def _even(bins: Bins) -> np.ndarray:
    """[K] share of the bins in an even spread over all speeds."""
    return bins.widths / bins.widths.sum()
