"""How best rates move with size, and how losses fall with compute: laws with intervals.

Shape legend: n points, G exponents tried. Losses are float64 in the unit of the data (nats, as a rule).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lightning_mue.analysis.fits.estimate import LEVEL, Array, Estimate, around, t_quantile
from lightning_mue.checks import listed, value_error

#: Exponents of the loss law that are tried.
_EXPONENTS = np.geomspace(0.01, 3.0, 600)


@dataclass(frozen=True)
class RateLaw:
    """Best rate = ``coefficient * size ** -exponent``.

    Attributes:
        coefficient: c, with a t interval.
        exponent: p, with a t interval.
        residual: RMS of the optima around the law, in octaves.
        level: Of the intervals.
    """

    coefficient: Estimate
    exponent: Estimate
    residual: float
    level: float
    x: Array = field(repr=False, compare=False)
    y: Array = field(repr=False, compare=False)

    def predict(self, size: float) -> Estimate:
        """The best rate at a size, with the interval (t) for one more measured optimum there."""
        freedom = len(self.x) - 2
        centred = self.x - self.x.mean()
        spread = 1 + 1 / len(self.x) + (math.log2(size) - self.x.mean()) ** 2 / np.square(centred).sum()
        half = t_quantile(self.level, freedom) * self.residual * math.sqrt(len(self.x) / freedom * spread)
        value = math.log2(self.coefficient.value) - self.exponent.value * math.log2(size)
        return Estimate(2.0**value, 2.0 ** (value - half), 2.0 ** (value + half))


def fit_rate_law(sizes: ArrayLike, rates: ArrayLike, *, level: float = LEVEL) -> RateLaw:
    """Fits ``lr = c * size^-p`` by least squares of log2 lr on log2 size; `sizes` and `rates` are [n], e.g. tokens and optima.

    Raises:
        ValueError: If there are fewer than three points, they are of one size, or not positive.
    """
    x, y = _logs(sizes, rates, "rates")
    if len(x) < 3 or np.ptp(x) == 0:
        found = f"{len(x)} points at {len(set(x))} sizes"
        raise value_error("sizes", found=found, expected="at least 3 points, not of one size", do="Sweep more sizes.")
    centred = x - x.mean()
    square = np.square(centred).sum()
    slope = float((centred * y).sum() / square)
    intercept = float(y.mean() - slope * x.mean())
    residual = np.square(y - intercept - slope * x).mean()
    error = math.sqrt(residual * len(x) / (len(x) - 2))
    half = t_quantile(level, len(x) - 2) * error
    exponent = around(-slope, half / math.sqrt(square))
    offset = around(intercept, half * math.sqrt(1 / len(x) + x.mean() ** 2 / square))
    coefficient = Estimate(2.0**offset.value, 2.0**offset.low, 2.0**offset.high)
    return RateLaw(coefficient, exponent, math.sqrt(residual), level, x, y)


def _logs(sizes: ArrayLike, values: ArrayLike, name: str) -> tuple[Array, Array]:
    x, y = np.asarray(sizes, dtype=float), np.asarray(values, dtype=float)
    if x.ndim != 1 or x.shape != y.shape:
        raise value_error(name, found=f"shapes {x.shape} and {y.shape}", expected="sizes and values of one shape [n]")
    for key, given in (("sizes", x), (name, y)):
        wrong = given[~(np.isfinite(given) & (given > 0))]
        if len(wrong):
            do = "Leave out the sizes whose runs diverged or have no optimum."
            raise value_error(key, found=listed(wrong), expected="positive finite numbers", do=do)
    return np.log2(x), np.log2(y)


@dataclass(frozen=True)
class LossLaw:
    """Loss = ``a * compute ** -b + l0``, with a, b >= 0 and l0 >= 0.

    Attributes:
        a: Factor, in the loss's unit times compute^b.
        b: Exponent.
        l0: The loss that more compute does not take away.
        noise: Standard deviation of a point around the law, relative to its loss.
        measured: The smallest and the largest compute of the points.
        level: Of the intervals, which are profiles of the sum of squares (exact where the law is linear in what is bounded).
    """

    a: Estimate
    b: Estimate
    l0: Estimate
    noise: float
    measured: tuple[float, float]
    level: float
    profile: _Profile = field(repr=False, compare=False)

    def predict(self, compute: float, *, new: bool = True) -> Estimate:
        """The loss at a compute, with the interval for one more measured run there; of the law alone without `new`."""
        shrink = (compute / self.profile.unit) ** -_EXPONENTS
        return self.profile.estimate(shrink, np.ones_like(shrink), of_run=new)


def fit_loss_law(compute: ArrayLike, losses: ArrayLike, *, level: float = LEVEL) -> LossLaw:
    """Fits ``loss = a * C^-b + l0`` to points [n], several of one compute allowed (seeds).

    For each of many exponents b the best a and l0 are known in closed form, so no start can be the wrong one. Residuals are
    relative to the loss; those beyond 2.5 standard deviations count less (Huber), from 6 points on.

    Raises:
        ValueError: If there are fewer than four points at three computes, one is not positive and finite, or the losses do not
            fall with compute.
    """
    x, y = _logs(compute, losses, "losses")
    if len(x) < 4 or len(set(x)) < 3:
        found = f"{len(x)} points at {len(set(x))} computes"
        do = "Sweep more sizes, or more seeds of each."
        raise value_error("compute", found=found, expected="at least 4 points at 3 or more computes", do=do)
    unit = float(x.mean())
    profile = _Profile(math.log(2) * (x - unit), 2.0**y, 2.0**unit, level)
    if not (profile.a[profile.best] > 0 and 0 < profile.best < len(_EXPONENTS) - 1):
        found = f"losses that do not fall as a power between {2.0 ** x.min():.3g} and {2.0 ** x.max():.3g}"
        do = "Use sizes further apart, and the loss at each one's best rate."
        raise value_error("losses", found=found, expected="a loss that falls with compute", do=do)
    one, zero = np.ones_like(_EXPONENTS), np.zeros_like(_EXPONENTS)
    return LossLaw(
        profile.estimate(profile.unit**_EXPONENTS, zero),
        profile.exponent(),
        profile.estimate(zero, one),
        math.sqrt(profile.variance),
        (float(2.0 ** x.min()), float(2.0 ** x.max())),
        level,
        profile,
    )


class _Profile:
    """The best a and l0 for each exponent, float64 [G], and the sum of squares that is left."""

    def __init__(self, x: Array, y: Array, unit: float, level: float) -> None:
        """`x` is the natural logarithm of compute over `unit`, [n]; `y` the losses [n]."""
        self.unit = unit
        weights = np.ones_like(y)
        for _ in range(20):
            self._solve(x, y, weights / y**2)
            residual = (y - self.a[self.best] * np.exp(-_EXPONENTS[self.best] * x) - self.l0[self.best]) / y
            scale = max(1.48 * float(np.median(np.abs(residual))), 1e-12)
            if len(y) < 6:
                break
            weights = np.minimum(1.0, 2.5 * scale / np.maximum(np.abs(residual), 1e-300))
        self.freedom = len(y) - 3
        self.variance = float(self.squares[self.best] / self.freedom)
        self.bound = self.squares[self.best] + t_quantile(level, self.freedom) ** 2 * self.variance

    def _solve(self, x: Array, y: Array, w: Array) -> None:
        u = np.exp(-np.outer(_EXPONENTS, x))
        uu, u1, one, uy, y1 = (u * u) @ w, u @ w, w.sum(), u @ (w * y), w @ y
        determinant = uu * one - u1**2
        self.a, self.l0 = (one * uy - u1 * y1) / determinant, (uu * y1 - u1 * uy) / determinant
        # Inverse of the normal equations; where l0 would be negative it is held at 0 and has no variance.
        self.inverse: Any = np.stack([one / determinant, -u1 / determinant, uu / determinant])
        held = self.l0 < 0
        self.a, self.l0 = np.where(held, uy / uu, self.a), np.where(held, 0.0, self.l0)
        self.inverse = np.where(held, np.stack([1 / uu, np.zeros_like(uu), np.zeros_like(uu)]), self.inverse)
        self.squares = np.square(y - self.a[:, None] * u - self.l0[:, None]) @ w
        self.best = int(np.argmin(self.squares))

    def estimate(self, of_a: Array, of_l0: Array, *, of_run: bool = False) -> Estimate:
        """The interval of ``of_a * a + of_l0 * l0``: its reach over all exponents that are as good as `bound`."""
        value = of_a * self.a + of_l0 * self.l0
        variance = of_a**2 * self.inverse[0] + 2 * of_a * of_l0 * self.inverse[1] + of_l0**2 * self.inverse[2]
        variance += value**2 if of_run else 0.0
        room = self.bound - self.squares
        half = np.sqrt(np.maximum(variance * room, 0.0))
        ok = room >= 0
        return Estimate(
            float(value[self.best]), max(0.0, float((value - half)[ok].min())), float((value + half)[ok].max())
        )

    def exponent(self) -> Estimate:
        ok = _EXPONENTS[self.squares <= self.bound]
        return Estimate(float(_EXPONENTS[self.best]), float(ok[0]), float(ok[-1]))
