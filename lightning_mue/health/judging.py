"""Judges a run from its metrics: what left its healthy range, when, where, and how bad that is.

Everything is causal: whether a sample is healthy depends on the samples before it only, so a judge that watches a run says the
same as one that reads it afterwards.

Shape legend: n samples of one tag.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_mue.health.departures import (
    LEAST_HISTORY,
    LONGEST_MEMORY,
    Healthy,
    Level,
    is_back,
    levels,
    surely_healthy,
)
from lightning_mue.health.indicators import INDICATORS, Indicator, indicator_of
from lightning_mue.health.losses import is_training_loss
from lightning_mue.health.reference import Reference
from lightning_mue.health.series import Run, Series, series_of

#: (indicator, where, layer) of a tag.
Placed = tuple[Indicator, str, str]


@dataclass(frozen=True)
class Symptom:
    """One indicator that left its healthy range.

    Attributes:
        indicator: Which.
        where: Role or kind of branch; empty if the indicator has none.
        layer: Layer's label, ``mean`` or ``max``; empty if it has none.
        level: How bad.
        step: The step at which it was certain.
        value: The value there; for a drift the median of the last ones.
        expected: What was expected there; NaN where that is any finite number.
        told: The same in words.
        lasts: Whether the last sample of the run is still nearer to the value than to what was expected.
    """

    indicator: Indicator
    where: str
    layer: str
    level: Level
    step: int
    value: float
    expected: float
    told: str
    lasts: bool

    @property
    def place(self) -> str:
        """Where, in words, e.g. ``attention, layer 03``."""
        layer = f"layer {self.layer}" if self.layer[:1].isdigit() else self.layer
        return ", ".join(filter(None, (self.where, layer)))


@dataclass(frozen=True)
class Group:
    """All symptoms of one indicator: the first of them, and the places of the others."""

    first: Symptom
    others: tuple[str, ...]
    level: Level
    lasts: bool

    @property
    def place(self) -> str:
        """Where, in words: the first place, and how many others there are."""
        more = f" and {len(self.others)} other{'s' if len(self.others) > 1 else ''}" if self.others else ""
        return f"{self.first.place}{more}"


@dataclass(frozen=True)
class Health:
    """What a run's metrics say.

    Attributes:
        level: How bad it is; of a run that is not `known`, nothing.
        symptoms: What left its range, the earliest first.
        samples: Of the indicator that has most of them.
        indicators: How many were judged.
        last_step: The run's last one.
    """

    level: Level
    symptoms: tuple[Symptom, ...]
    samples: int
    indicators: int
    last_step: int

    @property
    def known(self) -> bool:
        """Whether there is evidence: a symptom, or an indicator with samples enough to have a range of its own."""
        return self.level > Level.HEALTHY or self.samples >= LEAST_HISTORY

    @property
    def groups(self) -> list[Group]:
        """The symptoms by indicator, the earliest first: one cause shows in many places at once."""
        by_name: dict[str, list[Symptom]] = {}
        for symptom in self.symptoms:
            by_name.setdefault(symptom.indicator.name, []).append(symptom)
        return [
            Group(found[0], tuple(f.place for f in found[1:]), max(f.level for f in found), any(f.lasts for f in found))
            for found in by_name.values()
        ]


class RunJudge:
    """Judges a run while it goes on; it says what `judge` says of the same metrics afterwards.

    Args:
        losses: Tags of further training losses that their names do not show.
        reference: Healthy runs to compare with.
    """

    def __init__(self, losses: Iterable[str] = (), reference: Reference | None = None) -> None:
        self.losses, self.reference = tuple(losses), reference
        self._recent: dict[str, list[tuple[int, float]]] = {}
        self._symptoms: dict[str, Symptom] = {}
        self._samples: dict[str, int] = {}
        self._last_step = 0

    def add(self, step: int, metrics: Mapping[str, float]) -> list[Symptom]:
        """Takes the metrics of one step, and returns the symptoms that are new."""
        new = []
        for tag, value in metrics.items():
            self._last_step = max(self._last_step, step)
            found = _placed(tag, self.losses)
            if found is None:
                continue
            self._samples[tag] = self._samples.get(tag, 0) + 1
            recent = self._recent.setdefault(tag, [])
            recent.append((step, value))
            del recent[:-LONGEST_MEMORY]
            usual = tag not in self._symptoms and self.reference is None
            if usual and surely_healthy(found[0], [v for _, v in recent]):
                continue
            symptom = self._updated(tag, found, step, recent)
            if symptom is not None:
                new.append(symptom)
        return new

    def _updated(self, tag: str, found: Placed, step: int, recent: list[tuple[int, float]]) -> Symptom | None:
        level_n, seen_n, expected_n, words = levels(
            found[0], series_of(recent), self._expected(tag, found[0]), only_last=True
        )
        level, known = Level(int(level_n[-1])), self._symptoms.get(tag)
        if known is not None:
            self._symptoms[tag] = replace(known, level=max(known.level, level), lasts=_lasts(known, recent[-1][1]))
        elif level > 0:
            self._symptoms[tag] = Symptom(
                *found, level, step, float(seen_n[-1]), float(expected_n[-1]), words[-1], True
            )
            return self._symptoms[tag]
        return None

    def _expected(self, tag: str, indicator: Indicator) -> Healthy | None:
        return None if self.reference is None else self.reference.of(tag, indicator)

    @property
    def verdict(self) -> Health:
        """The verdict so far."""
        return _verdict(self._symptoms.values(), self._samples, self._last_step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge as an undisturbed one, in plain types."""
        symptoms = {
            tag: (int(f.level), f.step, f.value, f.expected, f.told, f.lasts) for tag, f in self._symptoms.items()
        }
        return {"recent": self._recent, "symptoms": symptoms, "samples": self._samples, "last_step": self._last_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state."""
        self._recent = {tag: [(int(s), float(v)) for s, v in points] for tag, points in state["recent"].items()}
        self._samples, self._last_step = dict(state["samples"]), int(state["last_step"])
        self._symptoms = {
            tag: Symptom(*found, Level(level), *rest)
            for tag, (level, *rest) in state["symptoms"].items()
            if (found := _placed(tag, self.losses)) is not None
        }


def judge(run: Run, *, losses: Iterable[str] = (), reference: Reference | None = None) -> Health:
    """Judges all indicators of a run.

    Args:
        run: Tag -> series, without a logger's prefix.
        losses: Tags of further training losses that their names do not show.
        reference: Healthy runs to compare with.
    """
    found = [judge_series(tag, series, losses=losses, reference=reference) for tag, series in run.items()]
    symptoms = [symptom for symptom in found if symptom is not None]
    samples = {tag: len(series.steps) for tag, series in run.items() if _placed(tag, losses)}
    last = max((int(series.steps[-1]) for series in run.values() if len(series.steps)), default=0)
    return _verdict(symptoms, samples, last)


def judge_series(
    tag: str, series: Series, *, losses: Iterable[str] = (), reference: Reference | None = None
) -> Symptom | None:
    """The first symptom in one tag, or None if it is healthy or no indicator."""
    found = _placed(tag, losses)
    if found is None or not len(series.steps):
        return None
    healthy = None if reference is None else reference.of(tag, found[0])
    level_n, seen_n, expected_n, words = levels(found[0], series, healthy)
    bad = np.flatnonzero(level_n > 0)
    if not len(bad):
        return None
    first = int(bad[0])
    step, value = int(series.steps[first]), float(seen_n[first])
    symptom = Symptom(*found, Level(int(level_n.max())), step, value, float(expected_n[first]), words[first], True)
    return replace(symptom, lasts=_lasts(symptom, float(series.values[-1])))


def _lasts(symptom: Symptom, now: float) -> bool:
    return not is_back(symptom.indicator, symptom.value, symptom.expected, now)


def _placed(tag: str, losses: Iterable[str]) -> Placed | None:
    """What a tag is, if it is judged: of losses those of training only, since others depend on what they are measured on."""
    if tag in losses:
        return INDICATORS[0], tag, ""
    found = indicator_of(tag)
    return None if found is not None and found[0] is INDICATORS[0] and not is_training_loss(tag) else found


def _verdict(symptoms: Iterable[Symptom], samples: Mapping[str, int], last_step: int) -> Health:
    kept = _one_a_place(symptoms)
    level = max((symptom.level for symptom in kept), default=Level.HEALTHY)
    judged = {
        (indicator_of(tag) or INDICATORS)[0].name for tag in samples
    }  # losses of other names are the first indicator
    return Health(level, tuple(kept), max(samples.values(), default=0), len(judged), last_step)


def _one_a_place(symptoms: Iterable[Symptom]) -> list[Symptom]:
    """The earliest symptom of each indicator and place, a layer before a mean over layers; the earliest first."""
    best: dict[tuple[str, str], Symptom] = {}
    for symptom in sorted(symptoms, key=lambda f: (f.step, f.layer in ("mean", "max", "min"), -f.level)):
        best.setdefault((symptom.indicator.name, symptom.where), symptom)
    return sorted(best.values(), key=lambda f: (f.step, -f.level))
