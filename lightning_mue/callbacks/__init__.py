"""Callbacks: the parameterization, and monitors that show whether a run is healthy."""

from lightning_mue.callbacks.checkpointing.callback import SafeCheckpoint
from lightning_mue.callbacks.guard.callback import StabilityGuard
from lightning_mue.callbacks.health import HealthMonitor
from lightning_mue.callbacks.monitors.activations import ActivationOutlierMonitor
from lightning_mue.callbacks.monitors.logits import LogitsZMonitor
from lightning_mue.callbacks.monitors.precision import PrecisionMonitor
from lightning_mue.callbacks.monitors.routing import RouterMonitor
from lightning_mue.callbacks.monitors.spectral import SpectralMonitor
from lightning_mue.callbacks.monitors.tokens import TokenMonitor
from lightning_mue.callbacks.monitors.updates import UpdateMonitor
from lightning_mue.callbacks.mue.callback import MuECallback
from lightning_mue.callbacks.qk_clip import QKClip
from lightning_mue.callbacks.sample_grid import SampleGrid
from lightning_mue.callbacks.throughput import ThroughputMonitor
from lightning_mue.callbacks.transfer.monitor import TransferMonitor
from lightning_mue.moe import LossFreeBalance

__all__ = [
    "ActivationOutlierMonitor",
    "HealthMonitor",
    "LogitsZMonitor",
    "LossFreeBalance",
    "MuECallback",
    "PrecisionMonitor",
    "QKClip",
    "RouterMonitor",
    "SafeCheckpoint",
    "SampleGrid",
    "SpectralMonitor",
    "StabilityGuard",
    "ThroughputMonitor",
    "TokenMonitor",
    "TransferMonitor",
    "UpdateMonitor",
]
