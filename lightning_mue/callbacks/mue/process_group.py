"""Tells HyperSphereOptimizer which ranks are replicas of each other, so that they can divide its work."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch.nn.parallel import DistributedDataParallel

from lightning_mue.optim import HyperSphereOptimizer


def set_process_groups(trainer: Trainer) -> None:
    """Under DDP, sets ``process_group`` of each HyperSphereOptimizer that has none to DDP's own group (by default WORLD).

    The ranks of that group hold equal parameters and, after backward, equal gradients. That is not so, and nothing is set,
    where DDP ignores some of the parameters or averages weights instead of gradients (post-local SGD). The wrapped module is
    asked, not the strategy's class: ``pytorch_lightning`` has classes of its own.

    Args:
        trainer: A trainer whose strategy is set up.
    """
    ddp = trainer.strategy.model
    if not isinstance(ddp, DistributedDataParallel) or torch.distributed.get_world_size(ddp.process_group) == 1:
        return
    ignores = any(name in ddp.parameters_to_ignore for name, _ in ddp.module.named_parameters())
    if ignores or getattr(trainer.strategy, "_model_averager", None) is not None:
        return
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, HyperSphereOptimizer) and optimizer.process_group is None:
            optimizer.process_group = ddp.process_group
