"""An estimate with its interval, and what fits share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_mue.checks import mismatch, value_error

Array = NDArray[np.float64]
#: Of every interval, unless another is asked for.
LEVEL = 0.9


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval; infinite ends where the points cannot bound it.

    Example:
        >>> print(Estimate(0.5, 0.25, 0.75))
        0.5 [0.25, 0.75]
    """

    value: float
    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def t_quantile(level: float, freedom: int) -> float:
    """Half-width of a two-sided t interval, in standard errors; infinite without a degree of freedom.

    Raises:
        ModuleNotFoundError: Without scipy.
        ValueError: If the level is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise value_error("level", found=level, expected="a number above 0 and below 1")
    try:
        from scipy.stats import t
    except ModuleNotFoundError as error:
        do = "pip install 'lightning-mue[sweep]'."
        raise ModuleNotFoundError(mismatch("scipy", found="none", expected="it installed", do=do)) from error
    return float(t.ppf((1 + level) / 2, freedom)) if freedom > 0 else math.inf


def around(value: float, half: float) -> Estimate:
    """An estimate with an interval of a half-width; without one where that is NaN."""
    return Estimate(value, value - half, value + half) if half == half else Estimate(value)


def root(variance: float) -> float:
    """The standard deviation; rounding below 0 counts as 0, and an unknown variance as infinite."""
    return math.sqrt(max(float(variance), 0.0)) if variance == variance else math.inf


def power(log2: float) -> float:
    """2 to a power, infinite where a float cannot hold it."""
    return math.inf if log2 > 1000 else 2.0**log2
