"""Loss and best rate of a run before it starts, from small ones; and how well that came true."""

from lightning_mue.analysis.forecast.efficiency import compute_efficiency
from lightning_mue.analysis.forecast.prediction import Prediction, predict

__all__ = ["Prediction", "compute_efficiency", "predict"]
