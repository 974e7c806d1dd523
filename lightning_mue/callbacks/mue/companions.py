"""What MuECallback tells others at fit start: weight averages the drawn weights, HyperSphereOptimizer names and replicas."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mue.optim import HyperSphereOptimizer


@torch.no_grad()
def copy_to_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Copies the drawn weights into Lightning's weight averages, which were copied from the module in ``setup``."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if isinstance(average, nn.Module):
            averaged = getattr(average, "module", average)
            for mine, drawn in zip(averaged.parameters(), pl_module.parameters(), strict=True):
                mine.copy_(drawn)


def copies_in_optimizers(trainer: Trainer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(copy, parameter): copies of the weights that optimizers made when they were built, such as Lookahead's slow weights."""
    found = []
    for optimizer in trainer.optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        for near, value in _tensors(vars(optimizer), seen=set(map(id, held))):
            nearest = [near] if near is not None else []  # the parameter whose state it is in
            for parameter in (*nearest, *held):
                # A zero may be a momentum's.
                if value.shape == parameter.shape and bool(value.any()) and torch.equal(value, parameter.detach()):
                    found.append((value, parameter))
                    break
    return found


def _tensors(value: Any, seen: set[int], near: Any = None) -> Iterator[tuple[Any, torch.Tensor]]:
    """(parameter in whose state it is, tensor), wherever an optimizer and those inside hold it."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield near, value
    elif isinstance(value, torch.optim.Optimizer):
        yield from _tensors(vars(value), seen)
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _tensors(one, seen, key if isinstance(key, torch.Tensor) else near)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one, seen, near)


@torch.no_grad()
def copy_to_optimizers(copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copies the drawn weights into what `copies_in_optimizers` found before; Lookahead would pull back to the old ones."""
    for mine, drawn in copies:
        mine.copy_(drawn)


def set_process_groups(trainer: Trainer) -> None:
    """Under DDP, sets ``process_group`` of each HyperSphereOptimizer that has none to DDP's own group (by default WORLD).

    The ranks of that group hold equal parameters and, after backward, equal gradients, so they can divide its work. That is
    not so, and nothing is set, where DDP ignores some of the parameters or averages weights instead of gradients (post-local
    SGD). The wrapped module is asked, not the strategy's class: ``pytorch_lightning`` has classes of its own.
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


def tell_optimizers(trainer: Trainer, pl_module: LightningModule) -> None:
    """Tells each HyperSphereOptimizer which ranks are replicas, and the names of what finetuning callbacks may add to it."""
    set_process_groups(trainer)
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, HyperSphereOptimizer):
            optimizer.note_names(pl_module)
