"""Counts of optimizer steps."""

from __future__ import annotations

from lightning.pytorch import Trainer


def steps_done(trainer: Trainer) -> int:
    """Optimizer steps so far; several optimizers that step in one batch (manual optimization) count as one."""
    return trainer.global_step // max(1, len(trainer.optimizers))
