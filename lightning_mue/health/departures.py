"""How far an indicator is from where it should be: by its own recent history, by healthy runs, and by fixed limits.

A departure is counted in multiples of the least one that matters, in logarithms where the indicator is a scale: 1 is just enough.

Shape legend: n samples of one tag.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_mue.health.indicators import INDICATORS, Indicator
from lightning_mue.health.series import Series

#: Samples of a tag before its own history says anything.
LEAST_HISTORY = 20
#: Recent values whose median is expected, over a short and a long time, and what the latter multiplies the least departure by.
SHORT, LONG, LONG_FACTOR = 12, 128, 1.5
#: A departure from the own history is at least this many standard deviations of the noise.
SPREADS = 6.0
#: Departures in a row that make a symptom, unless one is `Indicator.at_once` times the least.
IN_A_ROW = 3
#: Values whose median is compared with the same of the healthy runs.
SMOOTHED = 8
#: What matters of a steady indicator is so many times the largest departure of one healthy run from the others (few runs tell
#: it too small), from so many runs on, and between this share of the factor and all of it.
SAFETY, LEAST_RUNS, LEAST_SHARE = 4.0, 3, 0.25
#: Values on which the level of the last one depends.
LONGEST_MEMORY = LONG + max(indicator.hold for indicator in INDICATORS)

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


class Level(IntEnum):
    """The three verdicts."""

    HEALTHY = 0
    WATCH = 1
    ACT = 2


class Healthy(NamedTuple):
    """One tag in healthy runs, and the departure from their range that matters at some of their steps [n], in its scale."""

    series: tuple[Series, ...]
    steps: NDArray[np.int64]
    least: Floats


def healthy_of(indicator: Indicator, series: Sequence[Series]) -> Healthy:
    """One tag in healthy runs.

    The factor is the departure that matters, unless the indicator is steady: then it is `SAFETY` times the largest one that a run
    has from the range of the others, `IN_A_ROW` samples long, within a quarter of the run before and after.
    """
    steps_n, most = series[0].steps, least_of(indicator)
    least_n = np.full(len(steps_n), most)
    if indicator.steady and len(series) >= LEAST_RUNS and len(steps_n) > SMOOTHED:
        smooth = _smooth(np.array([np.interp(steps_n, one.steps, scaled(indicator, one.values)) for one in series]))
        others = (np.delete(smooth, i, axis=0) for i in range(len(smooth)))
        gaps = [_gap(indicator, own, o.min(axis=0), o.max(axis=0)) for own, o in zip(smooth, others, strict=True)]
        lasting_n = np.min([np.roll(gaps, shift, axis=1) for shift in range(IN_A_ROW)], axis=0).max(axis=0)
        near = max(2 * SMOOTHED, len(steps_n) // 4)
        largest_n = np.lib.stride_tricks.sliding_window_view(np.pad(np.nan_to_num(lasting_n), near), 2 * near + 1).max(
            -1
        )
        least_n = np.clip(SAFETY * largest_n, LEAST_SHARE * most, most)
    return Healthy(tuple(series), steps_n, least_n)


def range_of(indicator: Indicator, steps_n: NDArray[np.int64], healthy: Sequence[Series]) -> tuple[Floats, Floats]:
    """(lowest [n], highest [n]) of healthy runs, smoothed, at the same steps; NaN before `SMOOTHED` of them."""
    at = np.array([np.interp(steps_n, one.steps, scaled(indicator, one.values)) for one in healthy])
    smooth = _smooth(at)
    return smooth.min(axis=0), smooth.max(axis=0)


def levels(
    indicator: Indicator, series: Series, healthy: Healthy | None = None, *, only_last: bool = False
) -> tuple[NDArray[np.int64], Floats, Floats, list[str]]:
    """The level of each sample [n]; what was seen there [n] (a median, for a drift) and expected [n], and that in words [n].

    Args:
        indicator: What the samples are.
        series: The samples.
        healthy: The same tag in healthy runs.
        only_last: Whether only the last level is needed; those before it are then not to be read.
    """
    calm = only_last and surely_healthy(indicator, series.values.tolist())
    if calm:  # all that is left to ask, of healthy runs, depends on the last samples
        last = slice(-indicator.hold - SMOOTHED, None)
        series = Series(series.steps[last], series.values[last])
    values_n = series.values
    first = max(0, len(values_n) - indicator.hold) if only_last else 0
    y_n = scaled(indicator, values_n)
    seen_n, expected_n, beyond_n = from_history(indicator, y_n, len(y_n) if calm else first)
    departed_n = _held(beyond_n >= 1, indicator.hold) | (beyond_n >= indicator.at_once)
    words = [f"about {e:.3g}" for e in unscaled(indicator, expected_n)]
    if healthy is not None:
        smooth_n, healthy_n, beyond_n, usual_n = from_healthy(indicator, series.steps, y_n, seen_n, healthy, first)
        departed_n &= ~usual_n
        left_n = _held(beyond_n >= 1, indicator.hold) & ~departed_n
        told = [f"about {e:.3g} as in the reference" for e in unscaled(indicator, healthy_n)]
        seen_n, expected_n = np.where(left_n, smooth_n, seen_n), np.where(left_n, healthy_n, expected_n)
        words = [new if left else old for old, new, left in zip(words, told, left_n, strict=True)]
        departed_n |= left_n
    seen_n, expected_n = unscaled(indicator, seen_n), unscaled(indicator, expected_n)
    level_n = departed_n.astype(np.int64)
    side, beyond = ("above", np.less_equal) if indicator.falls else ("below", np.greater_equal)
    for level, bound in ((Level.WATCH, indicator.watch), (Level.ACT, indicator.act)):
        over_n = (
            np.zeros(len(values_n), dtype=bool) if bound is None else _held(beyond(values_n, bound), indicator.hold)
        )
        newly_n = over_n & (level_n < level)
        words = [f"{side} {bound:g}" if new else word for word, new in zip(words, newly_n, strict=True)]
        expected_n = np.where(newly_n, np.nan if bound is None else bound, expected_n)
        seen_n = np.where(newly_n, values_n, seen_n)
        level_n = np.maximum(level_n, over_n * int(level))
    broken_n = ~np.isfinite(values_n)
    level_n[broken_n] = int(Level.ACT)
    words = ["a finite number" if broken else word for word, broken in zip(words, broken_n, strict=True)]
    return level_n, np.where(broken_n, values_n, seen_n), np.where(broken_n, np.nan, expected_n), words


def surely_healthy(indicator: Indicator, values: Sequence[float]) -> bool:
    """Whether the last of up to `LONGEST_MEMORY` values is healthy by its own history and the limits, told quickly.

    All that `levels` compares are medians, and medians lie between the least and the largest value: where the last `SMOOTHED`
    values are not far in the bad direction from any other, nothing has departed. False says nothing; so does it for NaN.
    """
    low, high, last = min(values), max(values), values[-1]
    newest = values[-SMOOTHED:]
    if not indicator.both:
        low, high = (min(newest), high) if indicator.falls else (low, max(newest))
    bounds = [bound for bound in (indicator.watch, indicator.act) if bound is not None]
    if any(last <= bound if indicator.falls else last >= bound for bound in bounds):
        return False
    factor = 0.999 * indicator.factor  # not at the mercy of rounding
    near = high - low < factor if indicator.linear else 1e-12 < low <= high < factor * low
    return near and math.isfinite(sum(values))


def is_back(indicator: Indicator, value: float, expected: float, now: float) -> bool:
    """Whether a value that was out of range has gone at least half of the way back to what was expected."""
    if not np.isfinite(now):
        return False
    if not (np.isfinite(value) and np.isfinite(expected)):
        return True
    y, y_expected, y_now = scaled(indicator, np.array([value, expected, now]))
    return bool((y_now - y_expected) * np.sign(y - y_expected) < 0.5 * abs(y - y_expected))


def from_history(indicator: Indicator, y_n: Floats, first: int = 0) -> tuple[Floats, Floats, Floats]:
    """(seen [n], expected [n], departure [n]) of scaled values; NaN and 0 up to `LEAST_HISTORY`.

    Two kinds: a jump, a value far from the median of the last `SHORT` values and from that of the last `LONG` ones (near which it
    is if it merely returns to where it was); and a drift, the median of the last `SMOOTHED` values far from that of those right
    before them, or `LONG_FACTOR` times as far from that of all `LONG`; the first `LEAST_HISTORY` values are the model's settling,
    from which nothing drifts. The noise is that of successive differences, which a trend
    does not widen; a median has less of it. What grew from nothing is expected to be at most what it was so far.
    """
    n, least = len(y_n), least_of(indicator)
    seen_n, expected_n, beyond_n = y_n.copy(), np.full(n, np.nan), np.zeros(n)
    if n <= (first := max(first, LEAST_HISTORY)):
        return seen_n, expected_n, beyond_n
    y, known = y_n[first:], np.concatenate([np.full(LONG, np.nan), np.where(np.isfinite(y_n), y_n, np.nan)])
    at = np.arange(first, n)[:, None] + LONG
    past = known[at + np.arange(-LONG, 0)]
    long, short, now = _medians(past), _medians(past[:, -SHORT:]), _medians(known[at + np.arange(1 - SMOOTHED, 1)])
    before = _medians(past[:, -SHORT - SMOOTHED : 1 - SMOOTHED])
    noise = 1.4826 / 2**0.5 * _medians(np.abs(np.diff(past)))
    least_of_one, least_of_median = np.maximum(least, SPREADS * noise), np.maximum(least, SPREADS / 2 * noise)
    jump = np.minimum(_bad(indicator, y - short), _bad(indicator, y - long)) / least_of_one
    recent = _bad(indicator, now - before) / least_of_median
    slow = _bad(indicator, now - long) / (LONG_FACTOR * least_of_median)
    settled = np.arange(first, n) >= 2 * LEAST_HISTORY
    beyond = np.maximum(jump, np.where(settled, np.maximum(recent, slow), 0.0))
    drifts = jump < beyond
    seen, expected = np.where(drifts, now, y), np.where(drifts, np.where(recent == beyond, before, long), short)
    if not (indicator.linear or indicator.falls):
        # A scale that grew from next to nothing, as that of weights which begin as zeros: its medians lag, whatever it does. What
        # grows exponentially from a level of its own is a drift before it has grown so far.
        begun = known[np.maximum(at - LONG, LONG) + np.arange(IN_A_ROW)]
        grown = short - _medians(begun) > 2 * LONG_FACTOR * least
        top = np.fmax.reduce(past[:, : 1 - IN_A_ROW], axis=-1)
        beyond = np.where(grown, np.maximum(0.0, y - top) / least_of_one, beyond)
        seen, expected = np.where(grown, y, seen), np.where(grown, top, expected)
    enough = np.isfinite(past).sum(axis=-1) >= LEAST_HISTORY - 1
    seen_n[first:], expected_n[first:] = np.where(enough, seen, y), np.where(enough, expected, np.nan)
    beyond_n[first:] = np.nan_to_num(np.where(enough, beyond, 0.0), nan=0.0, posinf=1e9)
    return seen_n, expected_n, beyond_n


def from_healthy(
    indicator: Indicator, steps_n: NDArray[np.int64], y_n: Floats, seen_n: Floats, healthy: Healthy, first: int = 0
) -> tuple[Floats, Floats, Floats, Bools]:
    """(smoothed [n], expected [n], departure [n], whether usual [n]) of scaled values, by the range of healthy runs there.

    Usual is what was ``seen_n`` where it is nearer to the range than half of the departure that matters. NaN, 0 and False before
    ``first``, and for the first `SMOOTHED` values, which are not smooth yet.
    """
    n, start = len(y_n), max(0, first - SMOOTHED + 1)
    own_n, low_n, high_n = np.full((3, n), np.nan)
    low_n[start:], high_n[start:] = range_of(indicator, steps_n[start:], healthy.series)
    own_n[start:] = _smooth(y_n[start:])
    least_n = np.interp(steps_n, healthy.steps, healthy.least)
    beyond_n = np.nan_to_num(_gap(indicator, own_n, low_n, high_n) / least_n, nan=0.0, posinf=1e9)
    beyond_n[: max(first, min(SMOOTHED, n))] = 0.0
    usual_n = _gap(indicator, seen_n, low_n, high_n) < 0.5 * least_n
    return own_n, np.where(own_n > high_n, high_n, low_n), beyond_n, usual_n


def _gap(indicator: Indicator, y_n: Floats, low_n: Floats, high_n: Floats) -> Floats:
    """How far values [n] are outside of a range [n] of healthy ones in the bad direction; 0 inside, NaN where there is no range."""
    with np.errstate(invalid="ignore"):  # infinity less itself
        gap_n = np.where(y_n > high_n, y_n - high_n, np.minimum(y_n - low_n, 0.0))
    return np.maximum(0.0, np.abs(gap_n) if indicator.keeps else _bad(indicator, gap_n))


def _bad(indicator: Indicator, gap: Any) -> Any:
    """A gap, or [n] of them, as positive where it is in the bad direction."""
    return np.abs(gap) if indicator.both else -gap if indicator.falls else gap


def least_of(indicator: Indicator) -> float:
    """The least departure that matters, in the indicator's scale."""
    return indicator.factor if indicator.linear else float(np.log(indicator.factor))


def scaled(indicator: Indicator, values_n: Floats) -> Floats:
    """Values in the scale in which departures are measured: logarithms, unless differences count."""
    return values_n.astype(np.float64) if indicator.linear else np.log(np.maximum(values_n, indicator.floor))


def unscaled(indicator: Indicator, y_n: Floats) -> Floats:
    """What `scaled` was made from."""
    return y_n if indicator.linear else np.exp(y_n)


def _smooth(y_n: Floats) -> Floats:
    """The median of each value and the `SMOOTHED` - 1 before it, [..., n]; NaN where there are fewer, or one of them is."""
    smooth_n = np.full(y_n.shape, np.nan)
    if y_n.shape[-1] >= SMOOTHED:
        ordered = np.sort(np.lib.stride_tricks.sliding_window_view(y_n, SMOOTHED, axis=-1), axis=-1)  # NaN last
        median = 0.5 * (ordered[..., (SMOOTHED - 1) // 2] + ordered[..., SMOOTHED // 2])
        smooth_n[..., SMOOTHED - 1 :] = np.where(np.isnan(ordered[..., -1]), np.nan, median)
    return smooth_n


def _medians(windows: Floats) -> Floats:
    """The median of each window [..., k] without its NaN; several times as quick as numpy's. NaN where there is nothing else."""
    ordered, k = np.sort(windows, axis=-1), windows.shape[-1]  # NaN last
    if not np.isnan(ordered[..., -1]).any():
        return np.asarray(0.5 * (ordered[..., (k - 1) // 2] + ordered[..., k // 2]))
    count = np.maximum(np.isfinite(windows).sum(axis=-1, keepdims=True), 1)
    low, high = (np.take_along_axis(ordered, at, axis=-1)[..., 0] for at in ((count - 1) // 2, count // 2))
    return np.asarray(0.5 * (low + high))


def _held(flags_n: Bools, in_a_row: int = IN_A_ROW) -> Bools:
    """Where a flag is the last of so many in a row."""
    held_n = flags_n.copy()
    for shift in range(1, min(in_a_row, len(flags_n) + 1)):
        held_n[shift:] &= flags_n[:-shift]
        held_n[:shift] = False
    return held_n
