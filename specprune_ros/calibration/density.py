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
# Steps that a gap is expected to hold where its density counts as level.
ALIKE = 0.02
LEVEL = 1e-9  # difference of log-densities that are the same


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
    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """[P] speeds, ascending, and [2, P] log-density of the modes there, per unit of speed."""
        with np.errstate(divide='ignore'):
            return self.bins.centers, np.log(self.density)

    @property
    def level(self) -> float:
        """Log-density from which on down a shape that follows the sample says nothing."""
        return math.log(ALIKE / self.steps / float(np.ptp(self.bins.edges)))

    @property
    def threshold(self) -> float:
        """The speed at which the density is lowest between the peaks.

        Where it is level, the geometric middle.

        Source: section 6.2, Fig. 6.
        """
        return self._valley[0]

    @property
    def peaks(self) -> tuple[float, float]:
        """Speeds of the highest density of either mode, ascending."""
        speeds, _ = self.curve
        low, high = self._peaks
        return float(speeds[low]), float(speeds[high])

    @property
    def depth(self) -> float:
        """The least density between the peaks over that of the lower peak; 1 without a valley."""
        return self._valley[1]

    @cached_property
    def _valley(self) -> tuple[float, float]:
        speeds, parts = self.curve
        low, high = self._peaks
        both = np.logaddexp(*parts)[low : high + 1]
        lowest = np.flatnonzero(both <= max(both.min(), self.level) + LEVEL)
        first, last = lowest[0], lowest[-1]
        lower = min(both[: first + 1].max(), both[last:].max())
        middle = math.sqrt(speeds[low + first] * speeds[low + last])
        return middle, math.exp(both.min() - lower) if lower > self.level else 1.0

    @cached_property
    def _peaks(self) -> tuple[int, int]:
        _, parts = self.curve
        low, high = np.sort(parts.argmax(axis=1))
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
    mass[2] = ODD_SHARE * even_mass(bins)
    return mass / mass.sum(axis=0)


def fit_modes(bins: Bins, counts: np.ndarray, shares: np.ndarray) -> TwoModes:
    """The two likeliest log-concave modes (EM).

    Args:
        bins: K of them.
        counts: [K] steps in the bins.
        shares: [3, K] how sure every bin is slow, fast or neither, to start from.

    Source: Chang and Walther, Clustering with mixtures of log-concave distributions (2007).
    """
    at, steps, even, last = np.log(bins.centers), counts.sum(), even_mass(bins), -math.inf
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


def even_mass(bins: Bins) -> np.ndarray:
    """[K] share of the bins in an even spread over all speeds."""
    return bins.widths / bins.widths.sum()
