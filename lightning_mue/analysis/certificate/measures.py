"""What a certificate says of one axis: optima, drift, penalty, and the three figures E, kappa and R(inf), with intervals.

Shape legend: K sizes (the base first), S seeds, R rates, D draws: the mean over seeds, then bootstrap draws of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_mue.analysis.bootstrap import seed_weights, spread
from lightning_mue.analysis.cells import SizeTable
from lightning_mue.analysis.fits import Array, Estimate, Parabola, fit_parabola

UNKNOWN = Estimate(math.nan)


@dataclass(frozen=True)
class Limits:
    """Where a verdict changes; all of a certificate's limits.

    Attributes:
        drift: Octaves by which an optimum may move.
        penalty: Relative loss that the transferred rate may cost.
        level: Of the intervals.
    """

    drift: float = 0.5
    penalty: float = 0.01
    level: float = 0.9


@dataclass(frozen=True)
class SizeResult:
    """One size of an axis, as the base's rate finds it.

    Attributes:
        label: The size, of the names that move.
        ratio: N, the size over the base's; NaN where sizes have no order.
        rates: Those of all seeds [R].
        losses: Means over seeds [R]; infinite where a seed diverged.
        optimum: The parabola; None where there is none.
        problem: Why there is none, or why the penalty is not known; empty if all is known.
        drift: log2 of the optimum over the base's, in octaves.
        penalty: Loss at the base's optimum over the loss at the own optimum, minus 1.
    """

    label: str
    ratio: float
    rates: Array
    losses: Array
    optimum: Parabola | None
    problem: str = ""
    drift: Estimate = UNKNOWN
    penalty: Estimate = UNKNOWN


@dataclass(frozen=True)
class Figures:
    """E, kappa and R(inf) of an axis; NaN where the sizes do not give one.

    Attributes:
        flat_error: E of the flat law: RMS of the optima around their mean, in octaves.
        exponent: p of the law lr = c N^-p.
        law_error: E of that law.
        kappa: Exponent with which the relative curvature grows with N: above 0, an error in the rate costs more at large size.
        penalty_limit: R(inf), the penalty as 1/N goes to 0.
    """

    flat_error: Estimate = UNKNOWN
    exponent: Estimate = UNKNOWN
    law_error: Estimate = UNKNOWN
    kappa: Estimate = UNKNOWN
    penalty_limit: Estimate = UNKNOWN


def measure(
    cells: Sequence[SizeTable], labels: Sequence[str], ratios: Sequence[float], seeds: Sequence[int], limits: Limits
) -> tuple[list[SizeResult], Figures]:
    """Measures an axis of K sizes; the first is the base."""
    weights = seed_weights(len(seeds))
    curves = [_Curve(cell, seeds, weights, limits.level) for cell in cells]
    transfers = [
        curve.transfer(curves[0], label, ratio, limits.level)
        for curve, label, ratio in zip(curves, labels, ratios, strict=True)
    ]
    if any(curve.parabola is None for curve in curves):
        return transfers, Figures()
    return transfers, _figures(curves, np.array(ratios), len(seeds), limits.level)


class _Curve:
    """Loss against log2 lr at one size: the mean over seeds, and its draws."""

    def __init__(self, cell: SizeTable, seeds: Sequence[int], weights: Array, level: float) -> None:
        self.seeds = len(seeds)
        self.rates, losses = cell.table(seeds)
        self.x = np.log2(self.rates)
        self.finite: Any = np.isfinite(losses).all(axis=0)
        self.losses = np.where(self.finite, losses, math.inf).mean(0)
        self.parabola: Parabola | None = None
        self.problem = ""
        try:
            self.parabola = fit_parabola(self.rates, losses, level=level)
        except ValueError as error:
            self.problem = str(error)
            return
        self.points = weights @ np.where(self.finite, losses, 0.0)  # [D, R]
        self.coefficients = weights @ self.parabola.coefficients  # [D, 3]
        _, linear, square = self.coefficients.T
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = np.where(square > 0, -linear / (2 * square), math.nan)
        self.optimum = self.parabola.centre + vertex  # [D]
        self.least = self._parabola(self.optimum, np.arange(len(vertex)))
        self.curvature = square / self.least

    def _parabola(self, x: Array, draws: NDArray[np.intp]) -> Array:
        assert self.parabola is not None
        constant, linear, square = self.coefficients[draws].T
        z = x - self.parabola.centre
        return constant + z * (linear + z * square)

    def excess(self, x: Array) -> Array:
        """Relative loss above the optimum's, at a rate for each draw [D]; a single draw, the mean, is read at all rates.

        By the parabola between its points; outside them by monotone cubics (PCHIP) between measured losses; infinite next to a
        diverged rate; NaN beyond the measured rates.
        """
        assert self.parabola is not None
        draws = np.arange(len(x)) if len(x) == len(self.points) else np.zeros(len(x), dtype=np.intp)
        interval = np.clip(np.searchsorted(self.x, np.nan_to_num(x)), 1, len(self.x) - 1)
        between = self._between(x, draws)
        between = np.where(self.finite[interval] & self.finite[interval - 1], between, math.inf)
        between = np.where((x >= self.x[0]) & (x <= self.x[-1]), between, math.nan)
        low, high = math.log2(self.parabola.rates[0]), math.log2(self.parabola.rates[-1])
        loss = np.where((x >= low) & (x <= high), self._parabola(x, draws), between)
        return loss / self.least[draws] - 1

    def _between(self, x: Array, draws: NDArray[np.intp]) -> Array:
        from scipy.interpolate import PchipInterpolator

        finite = self.x[self.finite]
        cubics = PchipInterpolator(finite, self.points[:, self.finite], axis=1).c  # [4, intervals, D]
        interval = np.clip(np.searchsorted(finite, np.nan_to_num(x)) - 1, 0, len(finite) - 2)
        result: Array = np.zeros_like(x)
        for factors in cubics:
            result = result * (x - finite[interval]) + factors[interval, draws]
        return result

    def transfer(self, base: _Curve, label: str, ratio: float, level: float) -> SizeResult:
        """Drift and penalty of this size at the base's optimum."""
        found = SizeResult(label, ratio, self.rates, self.losses, self.parabola, self.problem)
        if self.parabola is None or base.parabola is None:
            return found
        if self is base:
            zero = Estimate(0.0, 0.0, 0.0)
            return SizeResult(label, ratio, self.rates, self.losses, self.parabola, "", zero, zero)
        drift = spread(self.optimum - base.optimum, self.seeds, level)
        penalty, problem = self._penalty(base.optimum, drift, level)
        return SizeResult(label, ratio, self.rates, self.losses, self.parabola, problem, drift, penalty)

    def _penalty(self, transferred: Array, drift: Estimate, level: float) -> tuple[Estimate, str]:
        """The penalty, and what is missing to know it.

        Near the optimum it grows as the square of the drift, and is no normal variable: its ends are then the least and the most
        that the drift's interval allows. Far from it the noise of the curve itself counts. The interval holds both.
        """
        drawn = self.excess(transferred)
        value, rate = float(drawn[0]), 2 ** float(transferred[0])
        if math.isnan(value):
            outside = f"outside the rates that ran here, {self.rates[0]:.3g} to {self.rates[-1]:.3g}"
            return UNKNOWN, f"the base's best rate, {rate:.3g}, is {outside}"
        if not math.isfinite(drift.high - drift.low):
            return Estimate(value, 0.0, math.inf), ""
        drifts = np.append(np.linspace(drift.low, drift.high, 129), np.clip(0.0, drift.low, drift.high))
        costs = np.nan_to_num(self.excess(float(self.optimum[0]) - drifts), nan=math.inf, posinf=math.inf)
        noise = _positive(spread(drawn, self.seeds, level))
        return Estimate(value, min(noise.low, float(costs.min())), max(noise.high, float(costs.max()))), ""


def _figures(curves: Sequence[_Curve], ratios: Array, seeds: int, level: float) -> Figures:
    optima = np.stack([curve.optimum for curve in curves])  # [K, D]
    flat = optima - optima.mean(0)
    flat_error = _positive(spread(np.sqrt(np.square(flat).mean(0)), seeds, level))
    if not (np.isfinite(ratios).all() and np.ptp(ratios) > 0):
        return Figures(flat_error)
    size = np.log2(ratios)
    slope, residual = _line(size, optima)
    with np.errstate(invalid="ignore", divide="ignore"):
        kappa, _ = _line(size, np.log2(np.stack([curve.curvature for curve in curves])))
    exponent, kappa_estimate = spread(-slope, seeds, level), spread(kappa, seeds, level)
    if len(set(ratios[1:])) < 2:
        return Figures(flat_error, exponent, UNKNOWN, kappa_estimate, UNKNOWN)
    penalties = np.stack([curve.excess(curves[0].optimum) for curve in curves[1:]])
    inverse = 1 / ratios[1:]
    slope, _ = _line(inverse, penalties)
    limit = penalties.mean(0) - slope * inverse.mean()
    return Figures(
        flat_error,
        exponent,
        _positive(spread(residual, seeds, level)),
        kappa_estimate,
        _positive(spread(limit, seeds, level)),
    )


def _line(x: Array, y: Array) -> tuple[Array, Array]:
    """Slope and RMS residual of the least-squares line through each column of y [K, D] against x [K]."""
    centred = x - x.mean()
    slope = centred @ y / np.square(centred).sum()
    residual = y - y.mean(0) - np.outer(centred, slope)
    return slope, np.sqrt(np.square(residual).mean(0))


def _positive(estimate: Estimate) -> Estimate:
    """An estimate of what cannot be negative."""
    return Estimate(max(0.0, estimate.value), max(0.0, estimate.low), max(0.0, estimate.high))
