"""Maximum likelihood of a log-concave density: the shape follows the sample, nothing is tuned.

Normal, log-normal, gamma, exponential and uniform densities of a speed are log-concave in the log
of the speed; two peaks never are.
"""

from __future__ import annotations

import numpy as np

LEAST_WEIGHT = 1e-8  # of the largest one: bins below it lie outside of the support
CONCAVE = 1e-9  # a kink counts as one from here on, in slope
GAIN = 1e-4  # of the mean log-likelihood per unit of a kink's slope; less is no gain
MOST_KINKS, MOST_STEPS = 25, 30
LEAST_STEP = 1e-6
BOUND = 200.0  # of an exponent


def fit_log_concave(at: np.ndarray, widths: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The log-concave density that is likeliest to give weighted bins.

    Its logarithm is linear between bins that are kinks; kinks are added where the likelihood
    gains most, and go where they would turn it convex (active set).

    Args:
        at: [K] ascending places of the bins.
        widths: [K] of the bins, > 0.
        weights: [K] >= 0, not all 0.

    Returns:
        [K] density at the bins, 0 outside of the support; density * widths sums to 1.

    Source: Duembgen, Huesler, Rufibach, Active set and EM algorithms for log-concave densities
    (2007); differs: bins take the place of single observations.
    """
    density = np.zeros(len(at))
    seen = np.flatnonzero(weights > LEAST_WEIGHT * weights.max())
    inside = slice(seen[0], seen[-1] + 1)
    x, width = at[inside], widths[inside]
    if len(x) == 1:
        density[inside] = 1.0 / width
        return density
    shape = _Shape(x, width, weights[inside] / weights[inside].sum())
    for _ in range(MOST_KINKS):
        shape.climb()
        if not shape.add_kink():
            break
    found = np.exp(shape.log_density())
    density[inside] = found / (found @ width)
    return density


class _Shape:
    """A concave log-density on bins while it is being fitted.

    Args:
        x, widths, weights: [K] of the bins; the weights sum to 1.
    """

    def __init__(self, x: np.ndarray, widths: np.ndarray, weights: np.ndarray):
        self._x, self._widths, self._weights = x, widths, weights
        self._kinks = np.array([0, len(x) - 1])  # both ends are always there
        self._values = np.full(2, -np.log(widths.sum()))

    def log_density(self) -> np.ndarray:
        """[K], linear between the kinks."""
        return np.interp(self._x, self._x[self._kinks], self._values)

    def climb(self) -> None:
        """To the most likely values at the kinks; kinks that would turn convex go."""
        while True:
            concave = self._values
            found = self._newton()
            bends = [np.diff(self._slopes(values)) for values in (concave, found)]
            convex = bends[1] > -CONCAVE
            if not convex.any():
                self._values = found
                return
            # As far as the line stays concave, up to the kink that is straight by then.
            shares = np.full(len(convex), np.inf)
            shares[convex] = bends[0][convex] / np.minimum(bends[0] - bends[1], -CONCAVE)[convex]
            gone = int(shares.argmin())
            share = min(max(shares[gone], 0.0), 1.0)
            values = concave + share * (found - concave)
            self._kinks = np.delete(self._kinks, gone + 1)
            self._values = np.delete(values, gone + 1)

    def add_kink(self) -> bool:
        """Where the likelihood gains most; False when it gains nowhere."""
        x, kinks = self._x, self._kinks
        excess = self._weights - self._widths * np.exp(self.log_density())
        # Derivative in the direction of a line that bends down from bin j on.
        beyond = np.cumsum(excess[::-1])[::-1], np.cumsum((excess * x)[::-1])[::-1]
        gains = x * beyond[0] - beyond[1]
        gains[kinks] = -1.0
        best = int(gains.argmax())
        if gains[best] < GAIN:
            return False
        place = int(np.searchsorted(kinks, best))
        value = self.log_density()[best]
        self._kinks = np.insert(kinks, place, best)
        self._values = np.insert(self._values, place, value)
        return True

    def _slopes(self, values: np.ndarray) -> np.ndarray:
        return np.diff(values) / np.diff(self._x[self._kinks])

    def _newton(self) -> np.ndarray:
        """Values at the kinks that are likeliest without regard to concavity."""
        basis, values = self._basis(), self._values
        for _ in range(MOST_STEPS):
            mass = self._widths * np.exp(basis @ values)
            gradient = basis.T @ (self._weights - mass)
            curvature = (basis * mass[:, None]).T @ basis
            curvature += np.diag(1e-7 * np.diag(curvature) + 1e-9)
            step = np.linalg.solve(curvature, gradient)
            rise = float(gradient @ step)
            if rise < 1e-9:
                break
            now, size = self._likelihood(basis @ values), 1.0
            while size > LEAST_STEP and not (
                self._likelihood(basis @ (values + size * step)) >= now + 0.1 * size * rise
            ):
                size /= 2
            if size <= LEAST_STEP:
                break
            values = values + size * step
        return values

    def _likelihood(self, log_density: np.ndarray) -> float:
        mass = self._widths @ np.exp(np.minimum(log_density, BOUND))
        return float(self._weights @ log_density - mass)

    def _basis(self) -> np.ndarray:
        """[K, kinks] share of every kink's value in every bin's."""
        x, at = self._x, self._x[self._kinks]
        left = np.clip(np.searchsorted(at, x, 'right') - 1, 0, len(at) - 2)
        share = (x - at[left]) / (at[left + 1] - at[left])
        basis = np.zeros((len(x), len(at)))
        rows = np.arange(len(x))
        basis[rows, left], basis[rows, left + 1] = 1.0 - share, share
        return basis
