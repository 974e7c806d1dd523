"""Fits on plain arrays, with intervals: the best learning rate of a sweep, how best rates move, how losses fall with compute.

What the points cannot say is refused.

Shape legend: S seeds, R rates, n points, G exponents tried. Losses are float64 in the unit of the data (nats, as a rule).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_mue.checks import listed, mismatch, value_error

Array = NDArray[np.float64]
#: Of every interval, unless another is asked for.
LEVEL = 0.9
#: Octaves from the best rate to the farthest point of a parabola. The two neighbours of the best count at any distance.
REACH = 1.5
#: Exponents of the loss law that are tried.
_EXPONENTS = np.geomspace(0.01, 3.0, 600)


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval; infinite ends where the points cannot bound it.

    Example:
        >>> print(Estimate(0.5, 0.25, 0.75))
        0.5 [0.25, 0.75]
    """

    value: float
    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Parabola:
    """Loss = ``loss + curvature * (log2(lr) - log2_rate)^2`` round the best rate.

    Attributes:
        log2_rate: The best rate, log2. Its interval is Fieller's: the rates at which the slope is not significantly different
            from zero, by a t-test over seeds. What a seed adds to the losses of all rates cancels.
        loss: Mean loss over seeds at the best rate, with a t interval over seeds.
        curvature: Loss per squared octave, with a t interval over seeds.
        rates: The rates of the fitted points, ascending.
        seeds: S. Of one seed, intervals come from the residuals of the fit; with three points there are none: they are infinite.
        centre: log2 of the rate about which `coefficients` are.
        coefficients: float64 [S, 3]: of each seed the factors of 1, z and z^2, with z = log2(lr) - centre.
    """

    log2_rate: Estimate
    loss: Estimate
    curvature: Estimate
    rates: tuple[float, ...]
    seeds: int
    centre: float = field(repr=False)
    coefficients: Array = field(repr=False, compare=False)

    @property
    def rate(self) -> Estimate:
        """The best rate."""
        return Estimate(2.0**self.log2_rate.value, 2.0**self.log2_rate.low, _power(self.log2_rate.high))


def fit_parabola(rates: ArrayLike, losses: ArrayLike, *, level: float = LEVEL, reach: float = REACH) -> Parabola:
    """Fits a parabola to loss against log2 lr by least squares, through the best rate and those within `reach` octaves of it.

    Args:
        rates: [R], each once, in any order.
        losses: [S, R] or [R]. A rate at which a seed's loss is not finite diverged: it is worse than all others and no point.
        level: Of the intervals.
        reach: In octaves; the nearest rate on each side of the best counts at any distance.

    Raises:
        ValueError: If fewer than three rates are finite, the best is at the edge or next to a diverged one, or the parabola has
            no minimum between its points.
    """
    x, y = _sorted_losses(rates, losses)
    near = _near_best(x, y, reach)
    centre = float(x[near][np.argmin(y[:, near].mean(0))])
    z, points = x[near] - centre, y[:, near]
    design = np.stack([np.ones_like(z), z, z**2], axis=1)
    solve = np.linalg.pinv(design)
    coefficients = points @ solve.T
    mean = coefficients.mean(0)
    if mean[2] <= 0 or not z[0] <= -mean[1] / (2 * mean[2]) <= z[-1]:
        found = f"a parabola without a minimum between {2 ** x[near][0]:.3g} and {2 ** x[near][-1]:.3g}"
        do = "Train more seeds, more rates near the best, or longer: the differences are smaller than the noise."
        raise value_error("losses", found=found, expected="losses that rise on both sides of the best rate", do=do)
    # Of the mean over seeds: covariance of the three coefficients.
    if len(y) > 1:
        covariance, freedom = np.cov(coefficients.T) / len(y), len(y) - 1
    else:
        freedom = len(z) - 3
        residual = np.square(points[0] - design @ mean).sum()
        covariance = solve @ solve.T * residual / freedom if freedom else np.full((3, 3), math.nan)
    t = t_quantile(level, freedom)
    vertex = -mean[1] / (2 * mean[2])
    at = np.array([1.0, vertex, vertex**2])
    low, high = _fieller(mean, covariance, t)
    return Parabola(
        Estimate(centre + vertex, centre + low, centre + high),
        _around(float(at @ mean), t * _root(at @ covariance @ at)),
        _around(float(mean[2]), t * _root(covariance[2, 2])),
        tuple(float(r) for r in 2 ** x[near]),
        len(y),
        centre,
        coefficients,
    )


def _sorted_losses(rates: ArrayLike, losses: ArrayLike) -> tuple[Array, Array]:
    """log2 of the rates, ascending [R], and losses in their order [S, R]."""
    rate, y = np.asarray(rates, dtype=float), np.atleast_2d(np.asarray(losses, dtype=float))
    if rate.ndim != 1 or y.ndim != 2 or y.shape[1] != len(rate) or not len(y):
        found = f"shapes {rate.shape} and {y.shape}"
        raise value_error("losses", found=found, expected="rates [R] and losses [S, R]")
    if not (np.isfinite(rate) & (rate > 0)).all() or len(set(rate)) < len(rate):
        raise value_error("rates", found=listed(rate), expected="positive rates, each once")
    order = np.argsort(rate)
    return np.log2(rate[order]), y[:, order]


def _near_best(x: Array, y: Array, reach: float) -> NDArray[np.intp]:
    """Indices of the points of the parabola.

    Raises:
        ValueError: If the best is not inside.
    """
    finite = np.flatnonzero(np.isfinite(y).all(0))
    if len(finite) < 3:
        found = f"{len(finite)} rate{'s' if len(finite) != 1 else ''} with finite losses"
        raise value_error("rates", found=found, expected="at least 3", do="Train at more rates.")
    best = finite[np.argmin(y[:, finite].mean(0))]
    if best in (0, len(x) - 1):
        side, step, other = ("lowest", 0.5, "lower") if best == 0 else ("highest", 2.0, "higher")
        rate = 2 ** x[best]
        do = f"Train at {rate * step:.3g} and {other} too."
        raise value_error("rates", found=f"the best at the edge, {rate:.3g}, the {side}", expected="it inside", do=do)
    for beside in (best - 1, best + 1):
        if beside not in finite:
            found = f"the best, {2 ** x[best]:.3g}, next to {2 ** x[beside]:.3g}, which diverged"
            do = f"Train at a rate between them, such as {2 ** ((x[best] + x[beside]) / 2):.3g}."
            raise value_error("rates", found=found, expected="finite losses on both sides of the best", do=do)
    near = np.abs(x - x[best]) <= reach
    near[best - 1 : best + 2] = True
    return np.intersect1d(finite, np.flatnonzero(near))


def _fieller(mean: Array, covariance: Array, t: float) -> tuple[float, float]:
    """The interval of the vertex, about `centre`: where (b + 2 c z)^2 <= t^2 var(b + 2 c z)."""
    (_, b, c), v = mean, t**2 * covariance
    square, linear, constant = 4 * (c**2 - v[2, 2]), 4 * (b * c - v[1, 2]), b**2 - v[1, 1]
    root = linear**2 - 4 * square * constant
    if not (np.isfinite(root) and square > 0):
        return -math.inf, math.inf  # the curvature itself may be zero
    return tuple(float((-linear + sign * math.sqrt(max(root, 0.0))) / (2 * square)) for sign in (-1, 1))  # type: ignore[return-value]


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
    exponent = _around(-slope, half / math.sqrt(square))
    offset = _around(intercept, half * math.sqrt(1 / len(x) + x.mean() ** 2 / square))
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


def t_quantile(level: float, freedom: int) -> float:
    """Half-width of a two-sided t interval, in standard errors; infinite without a degree of freedom.

    Raises:
        ModuleNotFoundError: Without scipy.
        ValueError: If the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise value_error("level", found=level, expected="a number above 0 and below 1")
    try:
        from scipy.stats import t
    except ModuleNotFoundError as error:
        do = "pip install 'lightning-mue[sweep]'."
        raise ModuleNotFoundError(mismatch("scipy", found="none", expected="it installed", do=do)) from error
    return float(t.ppf((1 + level) / 2, freedom)) if freedom > 0 else math.inf


def _around(value: float, half: float) -> Estimate:
    return Estimate(value, value - half, value + half) if half == half else Estimate(value)


def _root(variance: float) -> float:
    return math.sqrt(max(float(variance), 0.0)) if variance == variance else math.inf


def _power(log2: float) -> float:
    return math.inf if log2 > 1000 else 2.0**log2
