"""The averages of the weights that Lightning's weight averaging callbacks hold."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn


@torch.no_grad()
def copy_to_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Copies the drawn weights into the averages, which were copied from the module in ``setup``, before the draw."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if not isinstance(average, nn.Module):
            continue
        averaged = getattr(average, "module", average)
        for mine, drawn in zip(averaged.parameters(), pl_module.parameters(), strict=True):
            mine.copy_(drawn)
