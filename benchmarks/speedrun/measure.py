"""What the board says of an entry: steps to the target in a column, and what a transfer costs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from entries import Entry
from runs import FACTORS, Runs
from scoring import Crossing, best_factor, counts, crossing, extra_steps, length_to_confirm, p_value

#: Longest and shortest run that is tried, in multiples of the task's first one.
LONGEST, SHORTEST = 8, 1 / 8


@dataclass(frozen=True)
class Confirmed:
    """A length of run, its losses by seed, and the p-value of its mean below the target."""

    steps: int
    losses: list[float]
    p: float


def tuned(entry: Entry, column: str) -> Entry:
    """The entry with what was searched on the column's own model."""
    return entry.changed(entry.moe) if column == "moe" else entry


def curve(runs: Runs, entry: Entry, column: str) -> Crossing | None:
    """Where the entry's mean loss meets the target; lengths go up or down from the task's `start` until two enclose it."""
    losses: dict[int, dict[int, float]] = {}
    length = start = runs.task.start
    while SHORTEST <= length / start <= LONGEST and crossing(losses, runs.task.target) is None:
        losses[length] = runs.losses(tuned(entry, column), column, length, runs.task.curve_seeds)
        above = statistics.fmean(losses[length].values()) > runs.task.target
        length = round(length * 2 ** (0.5 if above else -0.5))
    return crossing(losses, runs.task.target)


def confirm(runs: Runs, entry: Entry, column: str, tries: int = 3) -> Confirmed | None:
    """The first length that counts, from the one expected to; each further try is 4 % longer. None if no try counts."""
    met = curve(runs, entry, column)
    if met is None:
        return None
    seeds, target = runs.task.seeds, runs.task.target
    length = length_to_confirm(met, seeds)
    for _ in range(tries):
        losses = list(runs.losses(tuned(entry, column), column, length, seeds).values())
        if counts(losses, target, seeds):
            return Confirmed(length, losses, p_value(losses, target))
        length = max(length + 1, round(length * 1.04))
    return None


@dataclass(frozen=True)
class Transfer:
    """The base's hyperparameters at another size, in runs as long as those of the search, or as the base needs if that is less.

    Attributes:
        steps: Length of the runs.
        losses: Mean loss by factor on all rates.
        best: Factor of the lowest loss, by a parabola in its logarithm.
        extra: Share of steps that factor 1 costs over it, by the slope of the base's curve.
        to_target: Steps to the target at factor 1, by the same slope.
    """

    steps: int
    losses: dict[float, float]
    best: float
    extra: float
    to_target: float


def transfer(runs: Runs, entry: Entry, column: str, rule: str) -> Transfer | None:
    """Under a rule; None if the base does not reach the target."""
    met = curve(runs, entry, "dense")
    if met is None:
        return None
    steps, seeds = round(min(met.steps, runs.task.start)), runs.task.transfer_seeds
    losses = {
        factor: statistics.fmean(runs.losses(entry, column, steps, seeds, rule=rule, factor=factor).values())
        for factor in FACTORS
    }
    best, lowest = best_factor(losses)
    to_target = steps * 2.0 ** ((losses[1.0] - runs.task.target) / -met.slope)
    return Transfer(steps, losses, best, extra_steps(losses[1.0], lowest, met.slope), to_target)
