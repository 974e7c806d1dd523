"""MuECallback: applies a parameterization to any LightningModule at fit start."""

from lightning_mue.callbacks.mue.callback import MuECallback

__all__ = ["MuECallback"]
