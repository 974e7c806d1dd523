"""Which points a cell's grid still needs: its own, and those that extend it until the best rate is interior."""

from __future__ import annotations

import math
from collections.abc import Mapping

from lightning_mue.analysis.sweep.plan import Point, SweepPlan

#: Mean loss over seeds: inf where a seed diverged, NaN where one crashed, None while one is not finished.
Curve = Mapping[Point, float | None]


def wanted_points(plan: SweepPlan, curve: Curve) -> list[Point]:
    """The points of a grid whose seeds are to be trained, the middle of the grid first; those known already are among them.

    A grid is extended once all its points are finished.
    """
    points = list(dict.fromkeys([*(Point(rate) for rate in plan.rates), *curve]))
    finished = {p.lr: loss for p in points if (loss := curve.get(p)) is not None}
    if len(finished) == len(points) and len(points) - len(plan.rates) < plan.extend:
        rate = next_rate(finished)
        points += [] if rate is None else [Point(rate)]
    middle = math.log(plan.rates[len(plan.rates) // 2])
    return sorted(points, key=lambda p: abs(math.log(p.lr) - middle))


def next_rate(losses: Mapping[float, float]) -> float | None:
    """The rate by which a curve must be extended for its best one to lie between two finite losses; None if it does.

    Beyond an edge the next rate is as far away as the last two are from each other; towards a rate that diverged it is half way
    (geometric mean). If all diverged, the grid grows downwards.

    Args:
        losses: Rate -> loss, inf where the run diverged; NaN (a crash) counts as not measured.

    Example:
        >>> next_rate({0.01: 2.0, 0.02: 1.9, 0.04: 1.8})
        0.08
    """
    rates = sorted(rate for rate, loss in losses.items() if not math.isnan(loss))
    if len(rates) < 2:
        return None
    best = min(range(len(rates)), key=lambda i: losses[rates[i]])
    if best == 0:
        return _rounded(rates[0] * rates[0] / rates[1])
    if best == len(rates) - 1:
        return _rounded(rates[-1] * rates[-1] / rates[-2])
    for neighbour in (rates[best - 1], rates[best + 1]):
        if math.isinf(losses[neighbour]):
            return _rounded(math.sqrt(rates[best] * neighbour))
    return None


def _rounded(rate: float) -> float:
    """Without the last digits, so that 0.01 x 0.01 / 0.02 is 0.005."""
    return float(f"{rate:.12g}")
