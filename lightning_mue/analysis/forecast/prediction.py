"""Laws fitted on a few small sizes, and what they say of a larger run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mue.analysis.cells import SizeTable, shared_seeds
from lightning_mue.analysis.fits import (
    LEVEL,
    Array,
    Estimate,
    LossLaw,
    RateLaw,
    fit_loss_law,
    fit_parabola,
    fit_rate_law,
    t_quantile,
)
from lightning_mue.checks import listed, value_error

MOST_SIZES, MOST_TRIALS = 4, 30
#: Tokens that differ by less are one number: steps and batches are whole ones.
_SAME = 1.02


@dataclass(frozen=True)
class Optimum:
    """Where one size is best.

    Attributes:
        cell: Its runs.
        rate: The best rate, of the mean over seeds.
        losses: Of each seed at that rate, by its own parabola [S].
    """

    cell: SizeTable
    rate: Estimate
    losses: Array


@dataclass(frozen=True)
class Prediction:
    """What small runs say of a larger one.

    Attributes:
        loss: Of one run at the best rate, with the interval for it.
        rate: The best rate (before the rule scales it), with the interval for an optimum measured there.
        loss_law: Loss against compute.
        rate_law: Best rate against tokens or compute.
        rate_over: "tokens" where they move, else "compute".
        rate_moves: Whether the rate law's exponent differs from 0. If not, `rate` is the mean, and its interval holds that of
            the law too.
        sizes: Those fitted.
        trials: Runs of these sizes.
    """

    loss: Estimate
    rate: Estimate
    loss_law: LossLaw
    rate_law: RateLaw
    rate_over: str
    rate_moves: bool
    sizes: Sequence[Optimum]
    trials: int


def find_optimum(cell: SizeTable, level: float = LEVEL) -> Optimum:
    """The best rate of a size and the losses there.

    Raises:
        ValueError: If there is none (see `fit_parabola`), with the size.
    """
    seeds = shared_seeds([cell])
    try:
        fit = fit_parabola(*cell.table(seeds), level=level)
    except ValueError as error:
        raise value_error(f"{cell.rule}, {cell.label}", found="no optimum", expected="one", do=str(error)) from error
    z = fit.log2_rate.value - fit.centre
    return Optimum(cell, fit.rate, fit.coefficients @ np.array([1, z, z**2]))


def predict(
    cells: Sequence[SizeTable],
    *,
    compute: float,
    tokens: float = math.nan,
    level: float = LEVEL,
    most_sizes: int = MOST_SIZES,
    most_trials: int = MOST_TRIALS,
) -> Prediction:
    """Predicts loss and best rate of a run from the sizes of one rule that take less compute.

    Args:
        cells: Sizes of one rule on the way to the run: what grows in the run grows in them.
        compute: Of the run, in the unit of the trials (FLOPs).
        tokens: Of the run; needed where the trials' tokens differ.
        level: Of the intervals.
        most_sizes: A forecast is worth little that needed many runs: more sizes than this are refused.
        most_trials: The same for runs, those that diverged too.

    Raises:
        ValueError: If the sizes are too many or too few, have no known compute or no optimum, or the losses fit no law.
        ModuleNotFoundError: Without scipy.
    """
    used = _smaller(cells, compute)
    trials = sum(len(cell.losses) for cell in used)
    for key, found, most in (("sizes", len(used), most_sizes), ("trials", trials, most_trials)):
        if found > most:
            do = f"Choose sizes with --size, or fit on all with --most-{key} {found}."
            raise value_error(key, found=found, expected=f"at most {most}", do=do)
    optima = [find_optimum(cell, level) for cell in used]
    law = fit_loss_law(
        np.concatenate([np.full(len(o.losses), o.cell.compute) for o in optima]),
        np.concatenate([o.losses for o in optima]),
        level=level,
    )
    over = _moving(used, tokens)
    at = [getattr(cell, over) for cell in used]
    rate_law = fit_rate_law(at, [o.rate.value for o in optima], level=level)
    moves = 0.0 not in rate_law.exponent
    rate = rate_law.predict(tokens if over == "tokens" else compute)
    if not moves:
        rate = _flat([o.rate.value for o in optima], rate, level)
    return Prediction(law.predict(compute), rate, law, rate_law, over, moves, optima, trials)


def _smaller(cells: Sequence[SizeTable], compute: float) -> list[SizeTable]:
    rules = sorted({cell.rule for cell in cells})
    if len(rules) > 1:
        raise value_error("rule", found=listed(rules), expected="one", do="Choose it with --rule.")
    unknown = [cell.label for cell in cells if not math.isfinite(cell.compute)]
    if unknown:
        do = "The module needs a method flops_per_token(); then sweep again."
        raise value_error("compute", found=f"none for {listed(unknown)}", expected="that of every size", do=do)
    used = sorted((cell for cell in cells if cell.compute < compute), key=lambda cell: cell.compute)
    if len(used) < 3:
        found = f"{len(used)} sizes with less than the run's {compute:.4g} (all: {listed([c.compute for c in cells])})"
        raise value_error(
            "compute", found=found, expected="at least 3 smaller sizes", do="Sweep more, or smaller ones."
        )
    return used


def _moving(cells: Sequence[SizeTable], tokens: float) -> str:
    of_trials = sorted(cell.tokens for cell in cells)
    every = [*of_trials, tokens if math.isfinite(tokens) else of_trials[0]]
    if max(every) <= _SAME * min(every) or not any(map(math.isfinite, every)):
        return "compute"
    if not math.isfinite(sum(of_trials) + tokens) or of_trials[-1] <= _SAME * of_trials[0]:
        found = f"{tokens:g} for the run and {listed([f'{value:g}' for value in of_trials])} in the trials"
        do = "Sweep sizes with different tokens, or give the run the trials' tokens."
        raise value_error("tokens", found=found, expected="tokens that move in the trials as they do to the run", do=do)
    return "tokens"


def _flat(rates: Sequence[float], of_law: Estimate, level: float) -> Estimate:
    """The mean of optima that do not move, with an interval that holds that of the law too."""
    logs = np.log2(rates)
    half = t_quantile(level, len(logs) - 1) * float(logs.std(ddof=1)) * math.sqrt(1 + 1 / len(logs))
    value = float(logs.mean())
    return Estimate(2.0**value, min(of_law.low, 2.0 ** (value - half)), max(of_law.high, 2.0 ** (value + half)))
