"""Judges a run from its metrics: what left its healthy range, when, where, and how bad that is.

Everything is causal: whether a sample is healthy depends on the samples before it only, so a judge that watches a run says the
same as one that reads it afterwards.

Shape legend: n samples of one tag, w samples in a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_mue.health.indicators import INDICATORS, Indicator, indicator_of, is_training_loss
from lightning_mue.health.series import Run, Series

#: Samples of a tag before any of its values can be called a departure; samples that the expectation is made of.
LEAST_HISTORY, WINDOW = 20, 64
#: Departures in a row that make a finding, and how many times the usual spread (standard deviations) each must be.
IN_A_ROW, SPREADS = 3, 6.0
#: Departures this many times as large as the least one need no repetition.
AT_ONCE = 3.0

Floats = NDArray[np.float64]
#: (indicator, where, layer) of a tag.
Placed = tuple[Indicator, str, str]


class Level(IntEnum):
    """The three verdicts."""

    HEALTHY = 0
    WATCH = 1
    ACT = 2


@dataclass(frozen=True)
class Finding:
    """One indicator that left its healthy range.

    Attributes:
        indicator: Which.
        where: Role or kind of branch; empty if the indicator has none.
        layer: Layer's label, ``mean`` or ``max``; empty if it has none.
        level: How bad.
        step: The step at which it was certain.
        value: The value there.
        expected: What was expected there, in words.
        lasts: Whether the last sample of the run is still out of range.
    """

    indicator: Indicator
    where: str
    layer: str
    level: Level
    step: int
    value: float
    expected: str
    lasts: bool

    @property
    def place(self) -> str:
        """Where, in words, e.g. ``attention, layer 03``."""
        layer = f"layer {self.layer}" if self.layer[:1].isdigit() else self.layer
        return ", ".join(filter(None, (self.where, layer)))


@dataclass(frozen=True)
class Verdict:
    """What a run's metrics say: the level, and the findings, the earliest first."""

    level: Level
    findings: tuple[Finding, ...]
    samples: int
    last_step: int


class RunJudge:
    """Judges a run while it goes on; it says what `judge` says of the same metrics afterwards.

    Args:
        losses: Tags of further training losses that their names do not show.
    """

    def __init__(self, losses: Iterable[str] = ()) -> None:
        self.losses = tuple(losses)
        self._recent: dict[str, list[float]] = {}
        self._findings: dict[str, Finding] = {}
        self._samples: dict[str, int] = {}
        self._last_step = 0

    def add(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        """Takes the metrics of one step, and returns the findings that are new."""
        new = []
        for tag, value in metrics.items():
            self._samples[tag] = self._samples.get(tag, 0) + 1
            self._last_step = max(self._last_step, step)
            found = _placed(tag, self.losses)
            if found is None:
                continue
            recent = self._recent.setdefault(tag, [])
            recent.append(value)
            del recent[: -(WINDOW + IN_A_ROW)]
            finding = self._updated(tag, found, step, recent)
            if finding is not None:
                new.append(finding)
        return new

    def _updated(self, tag: str, found: Placed, step: int, recent: list[float]) -> Finding | None:
        levels, words = _levels(found[0], np.array(recent, dtype=np.float64), last=IN_A_ROW)
        level, known = Level(int(levels[-1])), self._findings.get(tag)
        if known is not None:
            self._findings[tag] = replace(known, level=max(known.level, level), lasts=level > 0)
        elif level > 0:
            self._findings[tag] = Finding(*found, level, step, recent[-1], words[-1], True)
            return self._findings[tag]
        return None

    @property
    def verdict(self) -> Verdict:
        """The verdict so far."""
        return _verdict(self._findings.values(), max(self._samples.values(), default=0), self._last_step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge as an undisturbed one, in plain types."""
        findings = {
            tag: (int(f.level), f.step, f.value, f.expected, bool(f.lasts)) for tag, f in self._findings.items()
        }
        return {"recent": self._recent, "findings": findings, "samples": self._samples, "last_step": self._last_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state."""
        self._recent = {tag: list(values) for tag, values in state["recent"].items()}
        self._samples, self._last_step = dict(state["samples"]), int(state["last_step"])
        self._findings = {
            tag: Finding(*found, Level(level), *rest)
            for tag, (level, *rest) in state["findings"].items()
            if (found := _placed(tag, self.losses)) is not None
        }


def judge(run: Run, *, losses: Iterable[str] = ()) -> Verdict:
    """Judges all indicators of a run.

    Args:
        run: Tag -> series, without a logger's prefix.
        losses: Tags of further training losses that their names do not show.
    """
    findings = [f for tag, series in run.items() if (f := judge_series(tag, series, losses=losses)) is not None]
    samples = max((len(series.steps) for series in run.values()), default=0)
    last = max((int(series.steps[-1]) for series in run.values() if len(series.steps)), default=0)
    return _verdict(findings, samples, last)


def judge_series(tag: str, series: Series, *, losses: Iterable[str] = ()) -> Finding | None:
    """The first finding in one tag, or None if it is healthy or no indicator."""
    found = _placed(tag, losses)
    if found is None or not len(series.steps):
        return None
    level_n, expected = _levels(found[0], series.values)
    bad = np.flatnonzero(level_n > 0)
    if not len(bad):
        return None
    first = int(bad[0])
    return Finding(
        *found,
        level=Level(int(level_n.max())),
        step=int(series.steps[first]),
        value=float(series.values[first]),
        expected=expected[first],
        lasts=bool(level_n[-1] > 0),
    )


def _placed(tag: str, losses: Iterable[str]) -> Placed | None:
    """What a tag is, if it is judged: of losses those of training only, since others depend on what they are measured on."""
    if tag in losses:
        return INDICATORS[0], tag, ""
    found = indicator_of(tag)
    return None if found is not None and found[0] is INDICATORS[0] and not is_training_loss(tag) else found


def _levels(indicator: Indicator, values_n: Floats, *, last: int | None = None) -> tuple[NDArray[np.int64], list[str]]:
    """(level of each sample [n], what was expected of it in words [n]); of the ``last`` samples only where that is given."""
    expected_n, beyond_n = departure(indicator, values_n, last=last)
    departed_n = _held(beyond_n >= 1) | (beyond_n >= AT_ONCE)
    level_n = departed_n.astype(np.int64)
    words = [f"about {e:.3g}" for e in expected_n]
    side, beyond = ("above", np.less_equal) if indicator.falls else ("below", np.greater_equal)
    for level, bound in ((Level.WATCH, indicator.watch), (Level.ACT, indicator.act)):
        over_n = np.zeros(len(values_n), dtype=bool) if bound is None else _held(beyond(values_n, bound))
        level_n = np.maximum(level_n, over_n * int(level))
        words = [
            f"{side} {bound:g}" if over and not d else w for w, over, d in zip(words, over_n, departed_n, strict=True)
        ]
    broken_n = ~np.isfinite(values_n)
    level_n[broken_n] = int(Level.ACT)
    return level_n, ["a finite number" if broken else w for w, broken in zip(words, broken_n, strict=True)]


def _held(flags_n: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Where a flag is the last of `IN_A_ROW` ones."""
    held_n = flags_n.copy()
    for shift in range(1, min(IN_A_ROW, len(flags_n) + 1)):
        held_n[shift:] &= flags_n[:-shift]
        held_n[:shift] = False
    return held_n


def departure(indicator: Indicator, values_n: Floats, *, last: int | None = None) -> tuple[Floats, Floats]:
    """How far each value lies from the run's own recent history, in the bad direction.

    Expected is the median of the `WINDOW` values before it. A departure of 1 is the larger of `Indicator.factor` and `SPREADS`
    standard deviations of those values round their median (by their median absolute deviation).

    Returns:
        (expected [n], departure [n]); NaN and 0 for the first `LEAST_HISTORY` values, and for all but the ``last`` ones.
    """
    n = len(values_n)
    expected_n, beyond_n = np.full(n, np.nan), np.zeros(n)
    if n <= LEAST_HISTORY:
        return expected_n, beyond_n
    start = LEAST_HISTORY if last is None else max(LEAST_HISTORY, n - last)
    y_n = values_n.astype(float) if indicator.linear else np.log(np.maximum(values_n, 1e-12))
    finite_n = np.where(np.isfinite(y_n), y_n, np.nan)
    middle, spread = np.array([_middle_and_spread(finite_n[max(0, i - WINDOW) : i]) for i in range(start, n)]).T
    gap = y_n[start:] - middle
    gap = np.abs(gap) if indicator.both else -gap if indicator.falls else gap
    least = indicator.factor if indicator.linear else np.log(indicator.factor)
    beyond_n[start:] = np.nan_to_num(gap / np.maximum(least, SPREADS * spread), nan=0.0, posinf=1e9)
    expected_n[start:] = middle if indicator.linear else np.exp(middle)
    return expected_n, beyond_n


def _middle_and_spread(window_w: Floats) -> tuple[float, float]:
    """Median and standard deviation (by the median absolute deviation) of the values that are finite; NaN for none."""
    finite = np.sort(window_w)
    finite = finite[: np.searchsorted(finite, np.inf)]  # NaN is sorted behind everything
    if not len(finite):
        return float("nan"), float("nan")
    middle = 0.5 * (finite[(len(finite) - 1) // 2] + finite[len(finite) // 2])
    gaps = np.sort(np.abs(finite - middle))
    return middle, 1.4826 * 0.5 * (gaps[(len(gaps) - 1) // 2] + gaps[len(gaps) // 2])


def _verdict(findings: Iterable[Finding], samples: int, last_step: int) -> Verdict:
    kept = _one_a_place(findings)
    level = max((finding.level for finding in kept), default=Level.HEALTHY)
    return Verdict(level, tuple(kept), samples, last_step)


def _one_a_place(findings: Iterable[Finding]) -> list[Finding]:
    """The earliest finding of each indicator and place, a layer before a mean over layers; the earliest first."""
    best: dict[tuple[str, str], Finding] = {}
    for finding in sorted(findings, key=lambda f: (f.step, f.layer in ("mean", "max", "min"), -f.level)):
        best.setdefault((finding.indicator.name, finding.where), finding)
    return sorted(best.values(), key=lambda f: (f.step, -f.level))
