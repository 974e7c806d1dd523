"""A model whose loss depends on random numbers, and a callback that interrupts its training."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback

from lightning_mue import MoELanguageModel

SIZES = {"context_length": 8, "width": 16, "depth": 1, "n_heads": 2, "n_experts": 2, "top_k": 1, "scoring": "sigmoid"}


class Noisy(MoELanguageModel):
    """Its loss depends on random numbers, as with dropout."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (1 + 0.1 * torch.rand(()))


class At(Callback):
    """Does something right before a micro-batch, counted from 0 in this run."""

    def __init__(self, batch, do):
        self.batch, self.do, self.done = batch, do, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.done == self.batch:
            self.do()
        self.done += 1
