"""Scores the runs of the fault bench: what rose first, how long before the loss showed it, and what it named.

Indicators and loss get the same chance. Both are compared with the run's own past and with healthy runs of other seeds, and may
raise no alarm in healthy runs: the indicators by the ranges of `lightning_mue.health`, which were tuned on seeds that are not
scored; the loss by the least thresholds that the healthy runs allow, found here from these very runs. So the loss shows a fault as
soon as anybody could have seen it there without having raised a false alarm before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from faults import FAULTS
from numpy.typing import NDArray

from lightning_mue.health.departures import IN_A_ROW, SMOOTHED
from lightning_mue.health.judging import Symptom, judge
from lightning_mue.health.reference import Reference
from lightning_mue.health.series import Run

LOSS = "train/loss"
#: A role is named if one of the symptoms of the first steps names it: they are on the card that the first of them raises.
NAMED_WITHIN = 2
#: The loss of a run beside that of its healthy twin: so much above it, in the median over so many steps, for as many steps.
TWIN_FACTOR, TWIN_STEPS = 1.05, 5


@dataclass(frozen=True)
class Score:
    """One run. Steps count from the fault's first one (in a healthy run from its own first one), None where nothing happened.

    Attributes:
        fault: Its name, or "healthy".
        seed: Of the run.
        flagged: When the first indicator left its range.
        indicator: Which.
        place: The role and layer that it names.
        named: Whether the faulty role (and layer) is named within `NAMED_WITHIN` steps.
        shown: When the loss shows it.
        beside_twin: When the loss shows it to somebody who has the healthy run of the same seed and data beside it.
        left: Steps from the fault to the end of the run.
    """

    fault: str
    seed: int
    flagged: int | None
    indicator: str
    place: str
    named: bool
    shown: int | None
    beside_twin: int | None
    left: int

    @property
    def early(self) -> bool:
        """Whether it was flagged before the loss showed it."""
        return self.flagged is not None and (self.shown is None or self.flagged < self.shown)

    @property
    def lead(self) -> int | None:
        """Steps from the flag to the loss, or to the end of a run whose loss shows nothing; None without a flag."""
        if self.flagged is None:
            return None
        return (self.left if self.shown is None else self.shown) - self.flagged

    def row(self) -> dict[str, object]:
        """As it is stored."""
        return {**asdict(self), "early": self.early, "lead": self.lead}


class LossWatch:
    """Sees a fault in a smoothed training loss: above its own past, or above the healthy runs of other seeds.

    The thresholds are the least ones at which no healthy run is seen as ill (`IN_A_ROW` steps in a row beyond them).

    Args:
        healthy: Seed -> healthy run; two or more.
    """

    def __init__(self, healthy: Mapping[int, Run]) -> None:
        self._smooth = {seed: _smoothed(run) for seed, run in healthy.items()}
        gaps = [self._gaps(seed, smooth_n) for seed, smooth_n in self._smooth.items()]
        self.thresholds = [max(_lasting(gap_n[SMOOTHED:]) for gap_n in kind) for kind in zip(*gaps, strict=True)]

    def shows(self, seed: int, run: Run, at: int) -> int | None:
        """The step, counted from ``at``, at which the loss of a run shows a fault."""
        broken_n = ~np.isfinite(run[LOSS].values)
        for gap_n, threshold in zip(self._gaps(seed, _smoothed(run)), self.thresholds, strict=True):
            beyond_n = gap_n > threshold
            for shift in range(1, IN_A_ROW):
                beyond_n[shift:] &= gap_n[:-shift] > threshold
            broken_n |= beyond_n
        found = np.flatnonzero(broken_n[at:])
        return int(found[0]) if len(found) else None

    def _gaps(self, seed: int, smooth_n: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(gap to the own least so far [n], gap to the largest of the healthy runs of other seeds [n]), of logarithms."""
        others = [other_n[: len(smooth_n)] for other, other_n in self._smooth.items() if other != seed]
        return smooth_n - np.fmin.accumulate(smooth_n), smooth_n - np.max(others, axis=0)


def _smoothed(run: Run) -> NDArray[np.float64]:
    y_n = np.log(run[LOSS].values)
    return np.array([np.median(y_n[max(0, i - SMOOTHED + 1) : i + 1]) for i in range(len(y_n))])


def _lasting(gap_n: NDArray[np.float64]) -> float:
    """The largest gap that lasts for `IN_A_ROW` steps."""
    return float(np.lib.stride_tricks.sliding_window_view(gap_n, IN_A_ROW).min(axis=1).max())


def beside_twin(run: Run, twin: Run, at: int) -> int | None:
    """The step, counted from ``at``, at which the loss is clearly above that of the healthy run of the same seed and data."""
    loss_n, calm_n = run[LOSS].values, twin[LOSS].values
    lasted = 0
    for i in range(at, min(len(loss_n), len(calm_n))):
        window = slice(max(0, i - TWIN_STEPS + 1), i + 1)
        above = np.median(loss_n[window]) > TWIN_FACTOR * np.median(calm_n[window])
        lasted = lasted + 1 if above else 0
        if lasted >= TWIN_STEPS or not np.isfinite(loss_n[i]):
            return i - at
    return None


def score(fault: str, seed: int, run: Run, at: int, healthy: Mapping[int, Run], watch: LossWatch) -> Score:
    """The score of a run with a fault from step ``at`` on, or of a healthy one with ``at`` 0."""
    reference = Reference([other for s, other in healthy.items() if s != seed])
    ill = FAULTS.get(fault)
    found = judge(run, reference=reference).symptoms
    symptoms = [s for s in found if ill is None or (s.step >= at and s.indicator.name != "loss")]
    first = symptoms[0] if symptoms else None
    near = [s for s in symptoms if s.step <= symptoms[0].step + NAMED_WITHIN]
    return Score(
        fault=fault,
        seed=seed,
        flagged=None if first is None else first.step - at,
        indicator="" if first is None else first.indicator.name,
        place="" if first is None else first.place,
        named=ill is not None and any(_names(s, ill.role, ill.layer) for s in near),
        shown=watch.shows(seed, run, at),
        beside_twin=None if seed not in healthy else beside_twin(run, healthy[seed], at),
        left=len(run[LOSS].values) - at,
    )


def _names(symptom: Symptom, role: str, layer: str | None) -> bool:
    text = f"{symptom.indicator.tag} {symptom.where}"
    return re.search(role, text) is not None and layer in (None, symptom.layer)


def by_fault(scores: Sequence[Score], quality: str) -> int:
    """Faults of which every run has a quality of `Score`: "early" or "named"."""
    faults = dict.fromkeys(s.fault for s in scores)
    return sum(all(getattr(s, quality) for s in scores if s.fault == fault) for fault in faults)
