"""Steps to a target loss, from final losses at a few lengths of run, and when a length counts as enough.

Losses are those after a run's last step, at which the rate is zero: each length is a run of its own, and no run is judged in its
middle. Runs of one seed see the same batches at every length.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

#: A length counts if a t-test says with this error that its mean loss is below the target.
P_VALUE = 0.01


@dataclass(frozen=True)
class Crossing:
    """Where the curve of loss against log steps meets the target.

    Attributes:
        steps: By the mean curve.
        low, high: 90 % interval over seeds, each seed with a curve of its own; NaN with one seed.
        slope: Change of the loss in nats as steps double, there; negative.
        deviation: Standard deviation of the loss over seeds, there; NaN with one seed.
    """

    steps: float
    low: float
    high: float
    slope: float
    deviation: float


def p_value(losses: Sequence[float], target: float) -> float:
    """Of the one-sided t-test that the mean of `losses` is below `target`; 1 for fewer than two losses."""
    if len(losses) < 2:
        return 1.0
    if max(losses) == min(losses):
        return 0.0 if losses[0] < target else 1.0
    return float(stats.ttest_1samp(losses, target, alternative="less").pvalue)


def counts(losses: Sequence[float], target: float, seeds: int) -> bool:
    """Whether a length of run counts as reaching the target."""
    return len(losses) >= seeds and p_value(losses, target) < P_VALUE


def crossing(losses: Mapping[int, Mapping[int, float]], target: float) -> Crossing | None:
    """Steps at which the target is met, by lines in log steps; None unless losses lie on both sides of the target.

    Args:
        losses: Length of run -> seed -> loss. Seeds that not all lengths have are left out, so that the curve is of one set of
            seeds.
        target: Loss to meet.
    """
    lengths = sorted(losses)
    seeds = sorted(set.intersection(*(set(losses[length]) for length in lengths))) if lengths else []
    if not seeds:
        return None
    mean = {length: statistics.fmean(losses[length][seed] for seed in seeds) for length in lengths}
    ends = _bracket(mean, target)
    if ends is None:
        return None
    steps, slope = _meet(ends, [mean[length] for length in ends], target)
    low = high = deviation = math.nan
    if len(seeds) > 1:
        deviation = statistics.fmean(statistics.stdev(losses[end][seed] for seed in seeds) for end in ends)
        logs = [math.log(_meet(ends, [losses[length][seed] for length in ends], target, slope)[0]) for seed in seeds]
        half = stats.t.ppf(0.95, len(seeds) - 1) * statistics.stdev(logs) / math.sqrt(len(seeds))
        low, high = steps * math.exp(-half), steps * math.exp(half)
    return Crossing(steps, low, high, slope, deviation)


def _bracket(mean: Mapping[int, float], target: float) -> tuple[int, int] | None:
    """The first two neighbouring lengths of which one is above the target and the longer one is not."""
    lengths = sorted(mean)
    pairs = itertools.pairwise(lengths)
    return next(((a, b) for a, b in pairs if mean[a] > target >= mean[b]), None)


def _meet(
    ends: Sequence[int], values: Sequence[float], target: float, slope: float | None = None
) -> tuple[float, float]:
    """Steps at which a line in log2 steps meets the target, and its slope; with `slope` the line through the points' centre."""
    x = [math.log2(end) for end in ends]
    slope = (values[1] - values[0]) / (x[1] - x[0]) if slope is None else slope
    return 2.0 ** (statistics.fmean(x) + (target - statistics.fmean(values)) / slope), slope


def length_to_confirm(met: Crossing, seeds: int) -> int:
    """Shortest length of which the t-test with so many seeds is expected to say that it reaches the target."""
    margin = stats.t.ppf(1 - P_VALUE, seeds - 1) * met.deviation / math.sqrt(seeds)
    return math.ceil(met.steps * 2.0 ** (margin / -met.slope))


def best_factor(losses: Mapping[float, float]) -> tuple[float, float]:
    """Factor on the rates of the lowest loss, and that loss, from losses at factors 1/f, 1 and f.

    By the parabola in the logarithm of the factor, where its lowest point lies between the outer two; else the best of the three.
    """
    low, middle, high = sorted(losses)
    below, above = losses[low] - losses[middle], losses[high] - losses[middle]
    if min(below, above) > 0:  # its lowest point is then within half of the distance between two factors
        octaves = math.log2(high / middle) * (below - above) / (2 * (below + above))
        return middle * 2.0**octaves, losses[middle] - (below - above) ** 2 / (8 * (below + above))
    best = min(losses, key=lambda factor: losses[factor])
    return best, losses[best]


def extra_steps(loss: float, best: float, slope: float) -> float:
    """Share of steps that a loss above the best one costs, by the slope of loss against log2 steps: 0.03 is 3 % more steps."""
    return 2.0 ** ((loss - best) / -slope) - 1.0
