"""Coordinate check: tests whether a parameterization keeps every layer's update at its size when the model grows."""

from lightning_mue.analysis.check import CoordinateCheck
from lightning_mue.analysis.coordinate import coordinate_check
from lightning_mue.analysis.slopes import Record, Slope, fit_slope

__all__ = ["CoordinateCheck", "Record", "Slope", "coordinate_check", "fit_slope"]
