"""Fits on plain arrays, with intervals: the best learning rate of a sweep, how best rates move, how losses fall with compute.

What the points cannot say is refused.
"""

from lightning_mue.analysis.fits.estimate import LEVEL, Array, Estimate, t_quantile
from lightning_mue.analysis.fits.laws import LossLaw, RateLaw, fit_loss_law, fit_rate_law
from lightning_mue.analysis.fits.parabola import REACH, Parabola, fit_parabola

__all__ = [
    "LEVEL",
    "REACH",
    "Array",
    "Estimate",
    "LossLaw",
    "Parabola",
    "RateLaw",
    "fit_loss_law",
    "fit_parabola",
    "fit_rate_law",
    "t_quantile",
]
