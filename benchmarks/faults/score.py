"""Scores the fault bench: what rose first in each faulty run, how long before the loss showed it, and what it named.

The loss shows a fault when its median over 5 steps is 5 % above that of the healthy run of the same seed for 5 steps, or is not
finite. A fault is flagged by the first symptom, from its first step on, that the healthy run of the same seed does not have.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from faults import FAULTS
from rich.console import Console
from rich.table import Table

from lightning_mue.health.departures import Level, Reference
from lightning_mue.health.judging import Health, Symptom, judge
from lightning_mue.health.series import Run, read_run

_LOSS = "train/loss"


@dataclass(frozen=True)
class Score:
    """One faulty run; steps count from the fault's first one, None where nothing happened."""

    fault: str
    seed: int
    flagged: int | None
    indicator: str
    place: str
    shown: int | None
    named: bool

    @property
    def early(self) -> bool:
        """Whether it was flagged before the loss showed it."""
        return self.flagged is not None and (self.shown is None or self.flagged < self.shown)

    @property
    def lead(self) -> int | None:
        """Steps from the flag to the loss; None where one of them is missing."""
        return None if self.flagged is None or self.shown is None else self.shown - self.flagged


def loss_shows(run: Run, healthy: Run, at: int) -> int | None:
    """The step, counted from ``at``, at which the loss shows a fault."""
    loss, calm = run[_LOSS], healthy[_LOSS]
    n = min(len(loss.values), len(calm.values))
    for i in range(at, n):
        if not np.isfinite(loss.values[i]):
            return i - at
        above = [
            np.median(loss.values[max(0, j - 4) : j + 1]) > 1.05 * np.median(calm.values[max(0, j - 4) : j + 1])
            for j in range(max(at, i - 4), i + 1)
        ]
        if len(above) == 5 and all(above):
            return i - at
    return None


def score(told: dict[str, object], run: Run, healthy: Run, reference: Reference | None) -> Score:
    """The score of one run."""
    fault, at = FAULTS[str(told["fault"])], int(str(told["at"]))
    usual = {(f.indicator.name, f.where) for f in judge(healthy, reference=reference).symptoms}
    found = [
        f for f in judge(run, reference=reference).symptoms if f.step >= at and (f.indicator.name, f.where) not in usual
    ]
    first = found[0] if found else None
    return Score(
        fault=str(told["fault"]),
        seed=int(str(told["seed"])),
        flagged=None if first is None else first.step - at,
        indicator="" if first is None else first.indicator.name,
        place="" if first is None else first.place,
        shown=loss_shows(run, healthy, at),
        named=any(_names(symptom, fault.role, fault.layer) for symptom in found if symptom.step <= found[0].step + 2),
    )


def _names(symptom: Symptom, role: str, layer: str | None) -> bool:
    text = f"{symptom.indicator.tag} {symptom.where}"
    return role in text and layer in (None, symptom.layer)


def table(scores: Sequence[Score], calm: Sequence[Health]) -> Table:
    """The scores of all runs."""
    shown = Table(title="Faults: what rose first, and when (steps from the fault)")
    for column in ("fault", "seed", "flagged", "loss shows", "lead", "indicator", "place", "named"):
        shown.add_column(column)
    for s in scores:
        cells = (s.flagged, s.shown, s.lead)
        numbers = ["-" if cell is None else str(cell) for cell in cells]
        shown.add_row(s.fault, str(s.seed), *numbers, s.indicator, s.place, "yes" if s.named else "no")
    shown.caption = f"{sum(v.level > Level.HEALTHY for v in calm)} false alarms in {len(calm)} healthy runs"
    return shown


def main() -> None:
    """Reads the runs, prints the table and writes the scores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument(
        "--reference", type=Path, nargs="*", default=[], help="healthy runs of other seeds to compare with"
    )
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    told = {path.parent: json.loads(path.read_text()) for path in sorted(options.runs.rglob("run.json"))}
    runs = {folder: read_run(folder) for folder in told}
    reference = Reference([read_run(folder) for folder in options.reference]) if options.reference else None
    healthy = {told[f]["seed"]: runs[f] for f in told if told[f]["fault"] == "none"}
    scores = [
        score(told[f], runs[f], healthy[told[f]["seed"]], reference)
        for f in told
        if told[f]["fault"] != "none" and told[f]["seed"] in healthy
    ]
    scores.sort(key=lambda s: (list(FAULTS).index(s.fault), s.seed))
    calm = [judge(run, reference=reference) for run in healthy.values()]
    Console(width=160).print(table(scores, calm))
    early = {f: [s.early for s in scores if s.fault == f] for f in FAULTS}
    named = {f: [s.named for s in scores if s.fault == f] for f in FAULTS}
    leads = [s.lead for s in scores if s.lead is not None]
    told_short = {
        "faults flagged before the loss (most seeds)": sum(2 * sum(e) > len(e) for e in early.values() if e),
        "faults named (most seeds)": sum(2 * sum(n) > len(n) for n in named.values() if n),
        "median lead, where the loss shows the fault": statistics.median(leads) if leads else None,
        "false alarms": sum(v.level > Level.HEALTHY for v in calm),
        "healthy runs": len(calm),
    }
    print(json.dumps(told_short, indent=1))
    if options.output:
        options.output.write_text(json.dumps({"scores": [asdict(s) for s in scores], "summary": told_short}, indent=1))


if __name__ == "__main__":
    main()
