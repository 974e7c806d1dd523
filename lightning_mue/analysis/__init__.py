"""Studies of a parameterization: does it hold from layer to layer, and from size to size?"""

from lightning_mue.analysis.check import CoordinateCheck
from lightning_mue.analysis.coordinate import coordinate_check
from lightning_mue.analysis.slopes import Record, Slope, fit_slope

__all__ = ["CoordinateCheck", "Record", "Slope", "coordinate_check", "fit_slope"]
