"""Two estimates of a density of positive numbers, and the valley between its modes.

The mixture places a valley well where hardly a sample lies in it; the kernels do where the modes
have another shape than the mixture's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

NAN = float('nan')
NOWHERE = (NAN, NAN)
LEAST_SHARE = 0.05  # of either component of the mixture
LEAST_WIDTH = 0.1  # of a component, in standard deviations of the sample
START_SHARES = (0.15, 0.3, 0.5, 0.7, 0.85)  # of the slow component, that EM starts from
BINS = 240

# axis -> (to the axis, its derivative): components are Gaussian in the speed, its root, or its log
AXES = {
    'linear': (lambda v: v, lambda v: np.ones_like(v)),
    'root': (np.sqrt, lambda v: 0.5 / np.sqrt(v)),
    'log': (np.log, lambda v: 1.0 / v),
}


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Two Gaussians and a uniform background on one axis; of B mixtures where it says so.

    Attributes:
        axis: key of AXES.
        weights: [B, 3] of the slow and the fast component and the background; sums to 1.
        means, widths: [B, 2] on the axis.
        log_likelihood: [B] of the binned sample, on the axis.
    """

    axis: str
    weights: np.ndarray
    means: np.ndarray
    widths: np.ndarray
    log_likelihood: np.ndarray

    def density(self, speeds: np.ndarray) -> np.ndarray:
        """[B, n] density of the two Gaussians at speeds [n] above 0, without the background."""
        forward, slope = AXES[self.axis]
        parts = _gaussian(forward(speeds), self.means[..., None], self.widths[..., None])
        return (self.weights[:, :2, None] * parts).sum(axis=1) * slope(speeds)

    def pick(self, index: int) -> Mixture:
        """One of the B, slow component first."""
        order = np.argsort(self.means[index])
        return Mixture(
            axis=self.axis,
            weights=self.weights[index][None, [*order, 2]],
            means=self.means[index][None, order],
            widths=self.widths[index][None, order],
            log_likelihood=self.log_likelihood[index][None],
        )


@dataclass(frozen=True)
class Antimode:
    """The lowest point of a density between its two highest peaks, and how low it is.

    Attributes:
        at: speed.
        depth: density there over that of the lower peak.
        peaks: speeds of the slow and the fast peak.
    """

    at: float = NAN
    depth: float = NAN
    peaks: tuple[float, float] = NOWHERE


NO_ANTIMODE = Antimode()


def antimode(grid: np.ndarray, density: np.ndarray) -> Antimode:
    """The valley between the two highest peaks of a density [n] on a grid [n]."""
    padded = np.pad(density, 1, constant_values=-1.0)
    peaks = np.flatnonzero((density > padded[:-2]) & (density >= padded[2:]) & (density > 0))
    if len(peaks) < 2:
        return NO_ANTIMODE
    low, high = np.sort(peaks[np.argsort(density[peaks])[-2:]])
    at = low + int(np.argmin(density[low : high + 1]))
    depth = density[at] / min(density[low], density[high])
    return Antimode(float(grid[at]), float(depth), (float(grid[low]), float(grid[high])))


class KernelDensity:
    """Gaussian kernels, narrower where the speeds are dense (Abramson), mirrored at 0.

    Args:
        speeds: [n] that set the widths of the kernels.
        grid: [K] evenly spaced from one step above 0 to the highest speed.
    """

    def __init__(self, speeds: np.ndarray, grid: np.ndarray):
        self.grid = grid
        quartiles = np.diff(np.percentile(speeds, (25, 75)))[0] / 1.34
        width = 0.9 * min(speeds.std(), quartiles or math.inf) * len(speeds) ** -0.2
        width = max(width, grid[0])
        pilot = self._counts(speeds[None])[0] @ self._kernels(np.full(len(grid), width))
        seen = np.interp(speeds, grid, pilot)
        least = 1e-6 * pilot.max()
        narrower = np.sqrt(np.exp(np.log(seen).mean()) / np.maximum(pilot, least))
        self._matrix = self._kernels(np.maximum(width * narrower, grid[0]))

    def density(self, samples: np.ndarray) -> np.ndarray:
        """[B, K] density of samples [B, n] on the grid."""
        return self._counts(samples) @ self._matrix / samples.shape[1]

    def _counts(self, samples: np.ndarray) -> np.ndarray:
        nearest = np.rint(samples / self.grid[0]).astype(int) - 1
        return _bin_counts(nearest, len(self.grid))

    def _kernels(self, widths: np.ndarray) -> np.ndarray:
        """[K, K]: row i is the kernel of width widths[i] around grid[i]."""
        at, widths = self.grid[:, None], widths[:, None]
        return _gaussian(self.grid, at, widths) + _gaussian(-self.grid, at, widths)


def fit_mixture(speeds: np.ndarray) -> Mixture:
    """The likeliest mixture over all axes, among those with a valley if there are any.

    Args:
        speeds: [n] > 0, not all the same.
    """
    fits = []
    for axis, (forward, slope) in AXES.items():
        fit = _fit_axis(axis, forward(speeds))
        speeds_per_bin = np.log(slope(speeds)).sum()  # likelihoods compare in the speeds' unit
        grid = speeds.max() * (np.arange(BINS) + 1.0) / BINS
        has_valley = math.isfinite(antimode(grid, fit.density(grid)[0]).at)
        fits.append((has_valley, float(fit.log_likelihood[0] + speeds_per_bin), fit))
    return max(fits, key=lambda each: each[:2])[2]


def refit_mixture(mixture: Mixture, samples: np.ndarray, speeds: np.ndarray) -> Mixture:
    """Mixtures of samples [B, n] of the speeds, started from the speeds' own."""
    forward, _ = AXES[mixture.axis]
    centers, edges = _bins(forward(speeds))
    counts = _bin_counts(np.searchsorted(edges[1:-1], forward(samples), 'right'), BINS)
    start = (
        np.tile(part, (len(samples), 1))
        for part in (mixture.weights, mixture.means, mixture.widths)
    )
    return _expect_maximize(mixture.axis, centers, counts, *start, iterations=40)


def _fit_axis(axis: str, values: np.ndarray) -> Mixture:
    centers, edges = _bins(values)
    counts = _bin_counts(np.searchsorted(edges[1:-1], values, 'right')[None], BINS)
    splits = [values <= np.quantile(values, share) for share in START_SHARES]
    means = [(values[slow].mean(), values[~slow].mean()) for slow in splits if not slow.all()]
    start = (
        np.tile((0.49, 0.49, 0.02), (len(means), 1)),
        np.array(means),
        np.full((len(means), 2), values.std() / 2),
    )
    fits = _expect_maximize(axis, centers, counts, *start, iterations=120)
    return fits.pick(int(np.argmax(fits.log_likelihood)))


def _expect_maximize(
    axis: str,
    centers: np.ndarray,
    counts: np.ndarray,
    weights: np.ndarray,
    means: np.ndarray,
    widths: np.ndarray,
    iterations: int,
) -> Mixture:
    """EM of B mixtures at once, on bins, so that it costs the same for any recording.

    Args:
        axis: key of AXES.
        centers: [K] of the bins, on the axis.
        counts: [B or 1, K] in the bins.
        weights, means, widths: [B, 3], [B, 2], [B, 2] to start from.
    """
    total = counts.sum(axis=1, keepdims=True)
    middle = (counts * centers).sum(axis=1, keepdims=True) / total
    spread = np.sqrt((counts * (centers - middle) ** 2).sum(axis=1, keepdims=True) / total)
    flat = np.full((len(means), 1, len(centers)), 1.0 / (centers[-1] - centers[0]))
    for _ in range(iterations):
        peaked = _gaussian(centers, means[..., None], widths[..., None])
        parts = weights[..., None] * np.concatenate((peaked, flat), axis=1)
        density = parts.sum(axis=1)
        share = parts * (counts / density)[:, None]
        mass = np.maximum(share.sum(axis=2), np.finfo(float).tiny)
        weights = np.maximum(mass / total, (LEAST_SHARE, LEAST_SHARE, 0.0))
        weights = weights / weights.sum(axis=1, keepdims=True)
        means = share[:, :2] @ centers / mass[:, :2]
        squares = (share[:, :2] * (centers - means[..., None]) ** 2).sum(axis=2)
        widths = np.maximum(np.sqrt(squares / mass[:, :2]), LEAST_WIDTH * spread)
    return Mixture(
        axis=axis,
        weights=weights,
        means=means,
        widths=widths,
        log_likelihood=(counts * np.log(density)).sum(axis=1),
    )


def _bins(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres [BINS] and edges [BINS + 1]."""
    edges = np.linspace(values.min(), values.max(), BINS + 1)
    return (edges[:-1] + edges[1:]) / 2, edges


def _bin_counts(bins: np.ndarray, size: int) -> np.ndarray:
    """[B, size] how often each bin occurs in every row of [B, n]; bins beyond the ends clip."""
    rows, columns = len(bins), np.clip(bins, 0, size - 1)
    flat = columns + size * np.arange(rows)[:, None]
    return np.bincount(flat.ravel(), minlength=rows * size).reshape(rows, size).astype(float)


def _gaussian(x: np.ndarray, mean: np.ndarray, width: np.ndarray) -> np.ndarray:
    return np.exp(-0.5 * ((x - mean) / width) ** 2) / (width * math.sqrt(2 * math.pi))
