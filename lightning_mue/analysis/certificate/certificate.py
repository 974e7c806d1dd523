"""From trials to a certificate: settings, seeds, axes, measures and verdicts."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from lightning_mue.analysis.cells import cells_of, shared_seeds
from lightning_mue.analysis.certificate.axes import axes_of, find_base
from lightning_mue.analysis.certificate.measures import Limits, measure
from lightning_mue.analysis.certificate.pages import as_table, write_pages
from lightning_mue.analysis.certificate.verdict import AxisResult, judge
from lightning_mue.analysis.trials import Trial, Value


@dataclass(frozen=True)
class Certificate:
    """What trials say of transfer, an axis at a time, for each rule.

    Attributes:
        base: The tuned size.
        results: One for each rule and axis.
        limits: Where verdicts change.
        notes: What was left out of the trials, and why.
    """

    base: Mapping[str, Value]
    results: Sequence[AxisResult]
    limits: Limits
    notes: Sequence[str] = ()

    def holds(self, rules: Sequence[str] = ()) -> bool:
        """Whether every axis of these rules (all, if none is given) transfers."""
        return all(r.verdict == "transfers" for r in self.results if not rules or r.rule in rules)

    def write(self, folder: str | Path) -> Path:
        """Writes certificate.html, .png, .csv and .json, each whole or not at all, and returns the path of the page."""
        return write_pages(Path(folder), self.results, self.base, self.limits, self.notes)

    def __rich__(self) -> Table:
        return as_table(self.results, self.base, self.notes)


def certify(
    trials: Sequence[Trial], base: Mapping[str, Value] | None = None, *, limits: Limits | None = None
) -> Certificate:
    """Measures how the rate tuned at a base holds at the other sizes of a sweep; docs/certificate.md defines every figure.

    Args:
        trials: Finished runs, of one rule or several.
        base: Size of the tuned cell, or some of its axes: the smallest size that agrees. By default the smallest of all.
        limits: Where verdicts change.

    Raises:
        ValueError: If a rule has not the base and another size, two runs of one kind have different losses, no seed ran at every
            size of an axis, or a loss is not positive.
        ModuleNotFoundError: Without scipy.
    """
    limits = limits or Limits()
    size = find_base([trial.size for trial in trials], base)
    results: list[AxisResult] = []
    notes: list[str] = []
    for rule in dict.fromkeys(trial.rule for trial in trials):
        kept = _of_best_settings([trial for trial in trials if trial.rule == rule], size, notes)
        for axis in axes_of(rule, cells_of(kept), size):
            seeds = shared_seeds(axis.cells)
            if others := sorted(set.union(*(cell.seeds for cell in axis.cells)) - set(seeds)):
                notes.append(f"{rule}, {axis.name}: seeds {others} left out: they did not run everywhere.")
            transfers, figures = measure(axis.cells, axis.labels, axis.ratios, seeds, limits)
            verdict, reason = judge(transfers, len(seeds), limits)
            results.append(AxisResult(rule, axis.name, tuple(seeds), transfers, figures, verdict, reason))
    return Certificate(size, results, limits, notes)


def _of_best_settings(trials: Sequence[Trial], base: Mapping[str, Value], notes: list[str]) -> list[Trial]:
    """The trials with the settings whose best mean loss at the base is the lowest: they, too, are tuned there only."""
    losses: dict[str, dict[float, list[float]]] = {}
    for trial in trials:
        at_rate = losses.setdefault(_settings(trial), {})
        if dict(trial.size) == base:
            at_rate.setdefault(trial.lr, []).append(trial.loss if math.isfinite(trial.loss) else math.inf)
    if len(losses) < 2:
        return list(trials)
    best = min(losses, key=lambda s: min((sum(of) / len(of) for of in losses[s].values()), default=math.inf))
    kept = [trial for trial in trials if _settings(trial) == best]
    left = len(trials) - len(kept)
    notes.append(f"{trials[0].rule}: settings {best}, the best at the base; {left} trials of other settings left out.")
    return kept


def _settings(trial: Trial) -> str:
    return json.dumps(dict(trial.settings), sort_keys=True)
