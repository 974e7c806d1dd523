"""UpdateMonitor: what each optimizer step does to the weights, by role and layer."""

from lightning_mue.callbacks.monitors.updates.monitor import UpdateMonitor

__all__ = ["UpdateMonitor"]
