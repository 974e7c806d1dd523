"""Optimizers: Muon on the Frobenius sphere, and the orthogonalization that it steps along."""

from lightning_mue.optim.hypersphere import HyperSphereOptimizer
from lightning_mue.optim.orthogonal.coefficients import PRESETS
from lightning_mue.optim.orthogonal.newton_schulz import orthogonalize

__all__ = ["PRESETS", "HyperSphereOptimizer", "orthogonalize"]
