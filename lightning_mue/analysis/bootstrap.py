"""Bootstrap over seeds: whole seeds are drawn, so that what a seed adds to all of its runs cancels in differences.

Shape legend: S seeds, D draws, of which the first is the mean over seeds itself.
"""

from __future__ import annotations

import math

import numpy as np

from lightning_mue.analysis.fits import Array, Estimate, t_quantile

_DRAWS = 2000


def seed_weights(seeds: int) -> Array:
    """float64 [D, S]: 1/S for the mean over seeds, then of draws of S seeds with replacement. The same at every call."""
    draws = np.random.default_rng(0).multinomial(seeds, np.full(seeds, 1 / seeds), size=_DRAWS) / seeds
    return np.concatenate([np.full((1, seeds), 1 / seeds), draws])


def spread(draws: Array, seeds: int, level: float) -> Estimate:
    """The value of the mean over seeds, and its bootstrap standard error times Student's t of S - 1 degrees of freedom.

    Draws of few seeds scatter too little, by (S-1)/S in the variance: this is made up for. For a mean over seeds this is
    exactly the t interval. Unbounded for one seed, and where more than one draw in ten has no value.
    """
    value, drawn = float(draws[0]), draws[1:]
    finite = drawn[np.isfinite(drawn)]
    if seeds < 2 or not math.isfinite(value) or len(finite) < 0.9 * len(drawn):
        return Estimate(value)
    half = t_quantile(level, seeds - 1) * float(finite.std()) * math.sqrt(seeds / (seeds - 1))
    return Estimate(value, value - half, value + half)
