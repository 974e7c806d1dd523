"""TransferMonitor: compares a running model with the base that was tuned."""

from lightning_mue.callbacks.transfer.monitor import TransferMonitor

__all__ = ["TransferMonitor"]
