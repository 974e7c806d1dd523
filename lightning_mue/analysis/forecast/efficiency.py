"""How much more compute one rule or optimizer needs than another for the same loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lightning_mue.analysis.bootstrap import seed_weights, spread
from lightning_mue.analysis.cells import SizeTable, shared_seeds
from lightning_mue.analysis.fits import LEVEL, Array, Estimate, fit_parabola
from lightning_mue.checks import value_error


def compute_efficiency(
    ours: Sequence[SizeTable], theirs: Sequence[SizeTable], loss: float, *, level: float = LEVEL
) -> Estimate:
    """C_theirs(loss) / C_ours(loss): above 1, ours needs less compute. Its interval is a bootstrap over shared seeds.

    Each size counts at its best rate (the parabola's). Between sizes log compute is a straight line in the loss; beyond the
    losses measured of both, nothing is said.

    Raises:
        ValueError: If the loss is not within what both have measured, losses do not fall with compute, a size has no optimum or
            compute, or no seed ran everywhere.
        ModuleNotFoundError: Without scipy.
    """
    seeds = shared_seeds([*ours, *theirs])
    weights = seed_weights(len(seeds))
    of_theirs, of_ours = (_compute_at(loss, cells, seeds, weights) for cells in (theirs, ours))
    logs = spread(of_theirs - of_ours, len(seeds), level)
    return Estimate(math.exp(logs.value), math.exp(logs.low), math.exp(logs.high))


def _compute_at(loss: float, cells: Sequence[SizeTable], seeds: Sequence[int], weights: Array) -> Array:
    """Natural logarithm of the compute at a loss, for each draw; NaN where a draw's losses do not reach it."""
    ordered = sorted(cells, key=lambda cell: cell.compute)
    compute = np.array([cell.compute for cell in ordered])
    rule = ordered[0].rule
    if not np.isfinite(compute).all() or len(set(compute)) < 2:
        found = f"{len(set(compute[np.isfinite(compute)]))} known for {rule}"
        raise value_error("compute", found=found, expected="that of at least 2 sizes")
    best = []
    for cell in ordered:
        fit = fit_parabola(*cell.table(seeds))
        constant, linear, square = (weights @ fit.coefficients).T
        with np.errstate(divide="ignore", invalid="ignore"):
            best.append(np.where(square > 0, constant - linear**2 / (4 * square), math.nan))
    losses = np.stack(best)  # [sizes, draws], falling
    mean = losses[:, 0]
    if not (np.diff(mean) < 0).all():
        found = f"{rule}: {', '.join(f'{value:.4g}' for value in mean)} with growing compute"
        raise value_error("losses", found=found, expected="losses that fall", do="Leave out sizes that gain nothing.")
    if not mean[-1] <= loss <= mean[0]:
        found = f"{loss:.4g}, while {rule} was measured from {mean[-1]:.4g} to {mean[0]:.4g}"
        raise value_error("loss", found=found, expected="a loss that both have reached", do="Nothing is extrapolated.")
    return _inverse(loss, losses, np.log(compute))


def _inverse(loss: float, losses: Array, log_compute: Array) -> Array:
    """Straight lines between sizes; a draw whose end misses the loss by its noise goes on along its last line."""
    interval = np.clip((losses > loss).sum(0) - 1, 0, len(losses) - 2)
    draws = np.arange(losses.shape[1])
    above, below = losses[interval, draws], losses[interval + 1, draws]
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(above > below, (above - loss) / (above - below), math.nan)
    return log_compute[interval] + share * (log_compute[interval + 1] - log_compute[interval])
