"""Scores the runs of the fault bench: what rose first, how long before the loss showed it, and what it named.

The loss shows a fault when its median over 5 steps has been 5 % above that of the healthy run of the same seed for 5 steps, or is
not finite. The two runs have the same weights up to the fault and the same data after it, so that nothing but the fault makes a
difference: this sees a fault before anybody could who has only the run itself. The indicators have less: the run's own past, and
healthy runs of other seeds. That the loss leaves its range by these means is a second sight of it (``judged``). A fault is flagged
in time if it is before both, and a lead counts to the earlier one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from faults import FAULTS

from lightning_mue.health.judging import Symptom, judge
from lightning_mue.health.reference import Reference
from lightning_mue.health.series import Run

LOSS = "train/loss"
#: A role is named if one of the symptoms of the first steps names it: they are on the card that the first of them raises.
NAMED_WITHIN = 2
#: The loss shows a fault when it is so much above the healthy one, in the median over so many steps, for as many steps.
SHOWN_FACTOR, SHOWN_STEPS = 1.05, 5


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
        alone: When the first indicator did that by the run's own past alone, without healthy runs.
        shown: When the loss shows it.
        judged: When the loss left its range as the indicators do, by its own past and healthy runs of other seeds.
        left: Steps from the fault to the end of the run.
    """

    fault: str
    seed: int
    flagged: int | None
    indicator: str
    place: str
    named: bool
    alone: int | None
    shown: int | None
    judged: int | None
    left: int

    @property
    def seen(self) -> int | None:
        """When the loss shows it by whichever of the two sights is earlier."""
        return min((step for step in (self.shown, self.judged) if step is not None), default=None)

    @property
    def early(self) -> bool:
        """Whether it was flagged before the loss showed it by either sight."""
        return self.flagged is not None and (self.seen is None or self.flagged < self.seen)

    @property
    def lead(self) -> int | None:
        """Steps from the flag to when the loss is `seen`, or to the end of a run whose loss shows nothing; None without a flag."""
        if self.flagged is None:
            return None
        return (self.left if self.seen is None else self.seen) - self.flagged

    def row(self) -> dict[str, object]:
        """As it is stored."""
        return {**asdict(self), "early": self.early, "lead": self.lead}


def loss_shows(run: Run, healthy: Run, at: int) -> int | None:
    """The step, counted from ``at``, at which the loss of a run shows a fault beside the healthy run of the same seed."""
    loss_n, calm_n = run[LOSS].values, healthy[LOSS].values
    lasted = 0
    for i in range(at, min(len(loss_n), len(calm_n))):
        window = slice(max(0, i - SHOWN_STEPS + 1), i + 1)
        above = np.median(loss_n[window]) > SHOWN_FACTOR * np.median(calm_n[window])
        lasted = lasted + 1 if above else 0
        if lasted >= SHOWN_STEPS or not np.isfinite(loss_n[i]):
            return i - at
    return None


def score(fault: str, seed: int, run: Run, at: int, healthy: Mapping[int, Run]) -> Score:
    """The score of a run with a fault from step ``at`` on, or of a healthy one with ``at`` 0.

    Args:
        fault: Its name.
        seed: Of the run.
        run: Its metrics.
        at: See above.
        healthy: Seed -> healthy run; that of the run's own seed is no reference for the indicators.
    """
    ill = FAULTS.get(fault)
    reference = Reference([other for s, other in healthy.items() if s != seed])
    found = [s for s in judge(run, reference=reference).symptoms if s.step >= at]
    alone = [s for s in judge(run).symptoms if s.step >= at and not _is_loss(s)]
    symptoms = [s for s in found if ill is None or not _is_loss(s)]
    near = [s for s in symptoms if s.step <= symptoms[0].step + NAMED_WITHIN]
    return Score(
        fault=fault,
        seed=seed,
        flagged=symptoms[0].step - at if symptoms else None,
        indicator=symptoms[0].indicator.name if symptoms else "",
        place=symptoms[0].place if symptoms else "",
        named=ill is not None and any(_names(s, ill.role, ill.layer) for s in near),
        alone=alone[0].step - at if alone else None,
        shown=loss_shows(run, healthy[seed], at),
        judged=next((s.step - at for s in found if _is_loss(s)), None),
        left=len(run[LOSS].values) - at,
    )


def _is_loss(symptom: Symptom) -> bool:
    return symptom.indicator.name == "loss"


def _names(symptom: Symptom, role: str, layer: str | None) -> bool:
    text = f"{symptom.indicator.tag} {symptom.where}"
    return re.search(role, text) is not None and layer in (None, symptom.layer)


def by_fault(scores: Sequence[Score], quality: str) -> int:
    """Faults of which every run has a quality of `Score`: "early" or "named"."""
    faults = dict.fromkeys(s.fault for s in scores)
    return sum(all(getattr(s, quality) for s in scores if s.fault == fault) for fault in faults)
