"""The 1-D toy of HeatSmoothing (Campbell et al., arXiv:2010.02508, figure 4), computed.

A scalar function f on [-1, 1] decides for one class where it is positive and for the other where it is negative. Its
iterates minimise equation (15) over a uniform density,

    f_{k+1} = argmin_v  integral of  1/2 (v - f_k)^2 + h sigma^2 / 2 |v'|^2,

so v - h sigma^2 v'' = f_k with v' = 0 at both ends. The integral is put on a uniform grid by the trapezoidal rule,
whose minimiser is the solution of one tridiagonal system.

The paper draws f_0 and gives no formula. Ours takes the two classes to be parted at 0 and has one outlier, an interval
that is given to the other class, placed so that the point -0.5 lies as far from it as the paper prints (0.10).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: The point whose adversarial distance the paper states.
POINT = -0.5


@dataclass(frozen=True, kw_only=True)
class SmoothingToy:
    """The toy with its settings."""

    sigma: float = 0.1
    """Of the CIFAR-10 experiment."""
    time_step: float = 0.2
    """h = 1/5: five steps smooth for as long as the CIFAR-10 model."""
    outlier: float = -0.4
    """Where the outlier's interval begins: at the printed distance from -0.5."""
    width: float = 0.1
    """Of that interval: as wide as it is far."""
    points: int = 4001
    """Of the grid."""

    @property
    def grid(self) -> NDArray[np.float64]:
        """Return the places `(points,)`."""
        return np.linspace(-1.0, 1.0, self.points)

    def start(self) -> NDArray[np.float64]:
        """Return f_0 on the grid: 1 left of 0, -1 right of it and on the outlier; the mean where it jumps."""
        x = self.grid
        low, high = self.outlier, self.outlier + self.width
        # A place that rounding puts beside a jump lies on it.
        near = 0.25 * (x[1] - x[0])

        def step(at: float) -> NDArray[np.float64]:
            return np.where(np.abs(x - at) < near, 0.0, np.sign(x - at))

        return -step(0.0) - step(low) + step(high)

    def iterate(self, f: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the minimiser that follows `f` on the grid."""
        strength = self.time_step * self.sigma**2 / (self.grid[1] - self.grid[0]) ** 2
        diagonal = np.full(len(f), 1 + 2 * strength)
        beside = np.full(len(f) - 1, -strength)
        # The ends have half the weight and one neighbour: divided by that half, twice the strength.
        above, below = beside.copy(), beside.copy()
        above[0] = below[-1] = -2 * strength
        return _tridiagonal(below, diagonal, above, f)

    def iterates(self, last: int) -> list[NDArray[np.float64]]:
        """Return f_0 to f_last."""
        found = [self.start()]
        for _ in range(last):
            found.append(self.iterate(found[-1]))
        return found

    def distance(self, f: NDArray[np.float64], point: float = POINT) -> float:
        """Return how far the nearest place of the other class is from `point`; infinite where there is none."""
        x = self.grid
        changes = np.flatnonzero(np.sign(f[:-1]) * np.sign(f[1:]) <= 0)
        crossings = []
        for i in changes:
            rise = f[i + 1] - f[i]
            crossings.append(x[i] if rise == 0 else x[i] - f[i] * (x[i + 1] - x[i]) / rise)
        return float(min((abs(at - point) for at in crossings), default=np.inf))


def _tridiagonal(
    below: NDArray[np.float64], diagonal: NDArray[np.float64], above: NDArray[np.float64], right: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the solution of a tridiagonal system that is dominated by its diagonal (Thomas' elimination)."""
    n = len(right)
    ratio, value = [0.0] * n, [0.0] * n
    a, b, c, d = below.tolist(), diagonal.tolist(), above.tolist(), right.tolist()
    ratio[0], value[0] = c[0] / b[0], d[0] / b[0]
    for i in range(1, n):
        pivot = b[i] - a[i - 1] * ratio[i - 1]
        ratio[i] = c[i] / pivot if i < n - 1 else 0.0
        value[i] = (d[i] - a[i - 1] * value[i - 1]) / pivot
    for i in range(n - 2, -1, -1):
        value[i] -= ratio[i] * value[i + 1]
    return np.array(value)


def adversarial_distance(step: int) -> float:
    """Return the distance at x = -0.5 under the iterate f_step, with the settings above."""
    toy = SmoothingToy()
    return toy.distance(toy.iterates(step)[-1])
