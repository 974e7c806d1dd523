"""The best learning rate of a sweep: a parabola of the loss in log2 of the rate, with an interval over seeds.

Shape legend: S seeds, R rates. Losses are float64 in the unit of the data (nats, as a rule).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_mue.analysis.fits.estimate import LEVEL, Array, Estimate, around, power, root, t_quantile
from lightning_mue.checks import listed, value_error

#: Octaves from the best rate to the farthest point of a parabola. The two neighbours of the best count at any distance.
REACH = 1.5


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
        return Estimate(2.0**self.log2_rate.value, 2.0**self.log2_rate.low, power(self.log2_rate.high))


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
        around(float(at @ mean), t * root(at @ covariance @ at)),
        around(float(mean[2]), t * root(covariance[2, 2])),
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
