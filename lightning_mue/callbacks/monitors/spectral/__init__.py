"""SpectralMonitor: spectra of the weights, and how inputs align with them."""

from lightning_mue.callbacks.monitors.spectral.monitor import SpectralMonitor

__all__ = ["SpectralMonitor"]
