"""Two modes of known shapes: what their tails say about a gap in which there is hardly a step."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from specprune_ros.calibration.density import ENOUGH, Bins, TwoModes, even_mass

# The power of the speed that is normal: log-normal (0), gamma (a third, to within a per cent:
# Wilson and Hilferty, The distribution of chi-square, 1931) and normal modes.
POWERS = (0.0, 1 / 3, 1.0)
MOST_ITERATIONS = 300
LEAST_SPREAD = 1e-4  # of a mode, in the range of the speeds, both to its power
LEAST_STEPS = 2.0  # of a mode that a mean and a spread can be had of
# Largest difference of the distribution of the steps to that of the modes, times the root of their
# number. Of independent steps, 99 % have less than 0.8; neighbours that are alike have more.
MISFIT = 0.9
MOST_ODD = 0.05  # share of steps of neither mode, above which the modes do not explain the speeds
POINTS = 3000  # between which the density is looked up
# The standard normal distribution as a table: NumPy has no error function.
DEVIATIONS = np.linspace(-8.0, 8.0, 4001)
BELOW = np.array([0.5 + 0.5 * math.erf(each / math.sqrt(2)) for each in DEVIATIONS])
REACH = 3.0  # spreads beyond the medians, within which the peaks lie


@dataclass(frozen=True)
class PowerNormal:
    """Speeds of which a power is normal.

    Attributes:
        power: exponent; 0 is the logarithm.
        mean, spread: of the power.
    """

    power: float
    mean: float
    spread: float

    @classmethod
    def of(cls, power: float, speeds: np.ndarray, weights: np.ndarray) -> PowerNormal:
        """The likeliest one for speeds [K] > 0, ascending, and their weights [K] >= 0."""
        at = _to_power(speeds, power)
        mean = float(weights @ at / weights.sum())
        spread = math.sqrt(weights @ (at - mean) ** 2 / weights.sum())
        return cls(power, mean, max(spread, LEAST_SPREAD * float(np.ptp(at))))

    def quantile(self, spreads: float) -> float:
        """The speed so many spreads beyond the median; 0 where the power is not that of any."""
        at = self.mean + spreads * self.spread
        return math.exp(at) if not self.power else max(at, 0.0) ** (1 / self.power)

    def log_density(self, speeds: np.ndarray) -> np.ndarray:
        """Per unit of speed, at speeds > 0."""
        deviation = (_to_power(speeds, self.power) - self.mean) / self.spread
        slope = math.log(self.power or 1.0) + (self.power - 1) * np.log(speeds)
        return slope - 0.5 * deviation**2 - math.log(self.spread * math.sqrt(2 * math.pi))

    def mass(self, edges: np.ndarray) -> np.ndarray:
        """[K] share between ascending edges [K + 1] > 0; the end bins hold what lies outside."""
        deviation = (_to_power(edges[1:-1], self.power) - self.mean) / self.spread
        below = np.interp(deviation, DEVIATIONS, BELOW)
        return np.diff(below, prepend=0.0, append=1.0)


@dataclass(frozen=True, eq=False)
class PowerNormalModes(TwoModes):
    """Slow and fast motion of known shapes.

    Attributes:
        modes: the slow and the fast one.
        sizes: [2] their shares of the steps.
        log_likelihood: of the steps in the bins.
    """

    modes: tuple[PowerNormal, PowerNormal]
    sizes: np.ndarray
    log_likelihood: float

    def refuted_by(self, counts: np.ndarray) -> bool:
        """Whether steps [K] in the bins are too unlike this (Kolmogorov-Smirnov)."""
        differs = np.cumsum(counts / self.steps - self.mass.sum(axis=0))
        misfit = float(np.abs(differs).max()) * math.sqrt(self.steps)
        return misfit > MISFIT or 1.0 - self.sizes.sum() > MOST_ODD

    @cached_property
    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """[P] speeds, ascending, and [2, P] log-density of the modes there, per unit of speed."""
        first, last = self.bins.edges[[0, -1]]
        ends = [mode.quantile(side * REACH) for mode in self.modes for side in (-1, 1)]
        speeds = np.geomspace(max(min(ends), first), min(max(ends), last), POINTS)
        # A narrow mode would lie between two of the points.
        speeds = np.union1d(speeds, [mode.quantile(0.0) for mode in self.modes])
        parts = [mode.log_density(speeds) for mode in self.modes]
        return speeds, np.log(self.sizes)[:, None] + np.stack(parts)

    @property
    def level(self) -> float:
        """None: known shapes have tails in an empty gap too."""
        return -math.inf


def fit_power_normals(bins: Bins, counts: np.ndarray, shares: np.ndarray) -> PowerNormalModes:
    """The likeliest two modes, each normal in the likeliest power of the speed.

    Args:
        bins: K of them.
        counts: [K] steps in the bins.
        shares: [3, K] how sure every bin is slow, fast or neither, to start from.
    """
    pairs = itertools.product(POWERS, repeat=2)
    fits = [_fit(bins, counts, shares, pair) for pair in pairs]
    return max(fits, key=lambda fit: fit.log_likelihood)


def _fit(
    bins: Bins, counts: np.ndarray, shares: np.ndarray, powers: tuple[float, ...]
) -> PowerNormalModes:
    """The same by expectation-maximization, of given powers."""
    steps, even, last = counts.sum(), even_mass(bins), -math.inf
    for _ in range(MOST_ITERATIONS):
        weights = np.maximum(shares * (counts / steps), np.finfo(float).tiny)
        sizes = weights.sum(axis=1)
        modes = tuple(
            PowerNormal.of(power, bins.centers, each)
            for power, each in zip(powers, weights[:2], strict=True)
        )
        mass = sizes[:, None] * np.stack((*(mode.mass(bins.edges) for mode in modes), even))
        total = np.maximum(mass.sum(axis=0), np.finfo(float).tiny)
        likelihood = float(counts @ np.log(total))
        if likelihood - last < ENOUGH or steps * sizes[:2].min() < LEAST_STEPS:
            break
        shares, last = mass / total, likelihood
    return PowerNormalModes(bins, mass, steps, modes, sizes[:2], likelihood)


def _to_power(speeds: np.ndarray, power: float) -> np.ndarray:
    return speeds**power if power else np.log(speeds)
