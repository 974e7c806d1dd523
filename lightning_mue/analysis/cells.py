"""Trials of one rule at one size, as a table of losses by seed and rate.

Shape legend: S seeds, R rates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mue.analysis.fits import Array
from lightning_mue.analysis.trials import Trial, Value
from lightning_mue.checks import listed, value_error

Size = tuple[tuple[str, Value], ...]


@dataclass(frozen=True)
class SizeTable:
    """The runs of one rule at one size.

    Attributes:
        rule: Rule of the runs.
        size: (name, value) of each axis, by name.
        losses: (seed, rate) -> loss; infinite where the run diverged.
        tokens: Of a run that did not diverge; NaN if unknown or not the same in all.
        compute: FLOPs of such a run; NaN if unknown or not the same in all.
    """

    rule: str
    size: Size
    losses: Mapping[tuple[int, float], float]
    tokens: float
    compute: float

    @property
    def label(self) -> str:
        """The size in words.

        Example:
            >>> SizeTable("sp", (("depth", 2), ("width", 64)), {}, 1.0, 1.0).label
            'depth=2, width=64'
        """
        return ", ".join(f"{name}={value}" for name, value in self.size) or "the only size"

    @property
    def seeds(self) -> set[int]:
        """All seeds that ran."""
        return {seed for seed, _ in self.losses}

    def rates(self, seeds: Sequence[int]) -> list[float]:
        """The rates at which all of some seeds ran, ascending."""
        every = {rate for _, rate in self.losses}
        return sorted(rate for rate in every if all((seed, rate) in self.losses for seed in seeds))

    def table(self, seeds: Sequence[int]) -> tuple[Array, Array]:
        """Rates [R] at which all of these seeds ran, and their losses [S, R]."""
        rates = self.rates(seeds)
        return np.array(rates), np.array([[self.losses[seed, rate] for rate in rates] for seed in seeds])


def cells_of(trials: Sequence[Trial]) -> list[SizeTable]:
    """One cell for each rule and size, in the order of the trials.

    Raises:
        ValueError: If there is no trial, two runs of one kind have different losses, two seeds the same, or a loss is not positive.
    """
    if not trials:
        raise value_error("trials", found="none", expected="finished runs")
    groups: dict[tuple[str, Size], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.rule, tuple(sorted(trial.size.items()))), []).append(trial)
    return [_cell(rule, size, group) for (rule, size), group in groups.items()]


def _cell(rule: str, size: Size, trials: Sequence[Trial]) -> SizeTable:
    losses: dict[tuple[int, float], float] = {}
    for trial in trials:
        loss = trial.loss if math.isfinite(trial.loss) else math.inf
        where = f"rule {rule}, {dict(size)}, seed {trial.seed}, lr {trial.lr:.6g}"
        if loss <= 0:
            do = "Penalties are relative to the loss: give one that is positive."
            raise value_error("loss", found=f"{loss:.4g} ({where})", expected="a positive loss", do=do)
        if losses.setdefault((trial.seed, trial.lr), loss) != loss:
            found = f"two runs with the losses {losses[trial.seed, trial.lr]:.6g} and {loss:.6g} ({where})"
            do = "Give trials of one protocol; certify others, or other settings, by themselves."
            raise value_error("trials", found=found, expected="one run of each kind", do=do)
    _refuse_copies(rule, size, losses)
    whole = [trial for trial in trials if math.isfinite(trial.loss)]  # one that diverged may have been stopped before
    return SizeTable(rule, size, losses, _same([t.tokens for t in whole]), _same([t.compute for t in whole]))


def _refuse_copies(rule: str, size: Size, losses: Mapping[tuple[int, float], float]) -> None:
    """Seeds that change nothing would make every interval as narrow as nothing."""
    rows: dict[int, dict[float, float]] = {}
    for (seed, rate), loss in losses.items():
        if math.isfinite(loss):
            rows.setdefault(seed, {})[rate] = loss
    for a, b in itertools.combinations(sorted(rows), 2):
        shared = rows[a].keys() & rows[b].keys()
        if shared and all(rows[a][rate] == rows[b][rate] for rate in shared):
            found = f"seeds {a} and {b} with the same losses ({rule}, {dict(size)})"
            do = "Give the seed to the data module and to MuECallback(seed=...) too, as `lightning-mue sweep` does."
            raise value_error("seeds", found=found, expected="runs that differ", do=do)


def _same(values: Sequence[float]) -> float:
    return values[0] if len(set(values)) == 1 else math.nan


def shared_seeds(cells: Sequence[SizeTable]) -> list[int]:
    """As many seeds as ran in all cells at three common rates or more, or at as many as one seed has.

    Runs of one seed see the same batches, so that differences between rates and sizes are taken within seeds. A seed that ran
    at a few rates only would leave those alone, and is left out.

    Raises:
        ValueError: If no seed ran in all cells.
    """
    in_all = set.intersection(*(cell.seeds for cell in cells))
    if not in_all:
        found = "; ".join(f"{cell.label}: {listed(sorted(cell.seeds))}" for cell in cells)
        raise value_error(
            "seeds", found=found, expected="at least one that ran at every size", do="Run the same seeds."
        )
    seeds = sorted(in_all, key=lambda seed: (-min(len(cell.rates([seed])) for cell in cells), seed))
    for count in range(len(seeds), 1, -1):
        chosen = seeds[:count]
        if all(len(cell.rates(chosen)) >= min(3, len(cell.rates(seeds[:1]))) for cell in cells):
            return sorted(chosen)
    return seeds[:1]
