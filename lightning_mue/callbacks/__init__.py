"""Callbacks: the parameterization, and monitors that show whether a run is healthy."""

from lightning_mue.callbacks.activations import ActivationOutlierMonitor
from lightning_mue.callbacks.logits import LogitsZMonitor
from lightning_mue.callbacks.mue import MuECallback
from lightning_mue.callbacks.routing import RouterMonitor
from lightning_mue.callbacks.transfer import TransferMonitor
from lightning_mue.moe import LossFreeBalance

__all__ = [
    "ActivationOutlierMonitor",
    "LogitsZMonitor",
    "LossFreeBalance",
    "MuECallback",
    "RouterMonitor",
    "TransferMonitor",
]
