"""The order in which DDP reduces gradients, which a resumed run takes up again.

DDP reduces its first backward pass in one bucket, parameters in the order of the module. Then it makes new buckets, in the order
in which gradients arrived. Where a number lies in a bucket decides in which order gloo and NCCL sum it over the ranks, so with
three ranks or more the last bit depends on it: a resumed run, whose first pass comes later, would differ.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class BucketOrder:
    """Notes in which order gradients arrive in the first backward pass of a run; a resumed one repeats the pass with zeros."""

    def __init__(self) -> None:
        #: Names of parameters; empty where nothing is to be kept.
        self.names: dict[str, None] = {}
        self._handles: list[Any] = []

    def begin(self, trainer: Trainer, group: Any) -> None:
        """Before the first batch: takes up the order of `names`, if all ranks of the group can; else notes it."""
        params = _reduced(trainer)
        can = torch.tensor(int(bool(params) and sorted(self.names) == sorted(params)))
        if group is not None:
            dist.all_reduce(can, op=dist.ReduceOp.MIN, group=group)
        if can:
            _repeat(trainer.strategy.model, [params[name] for name in self.names])
            return
        self.names = {}
        self._handles = [
            each.register_post_accumulate_grad_hook(partial(self._note, name)) for name, each in params.items()
        ]

    def end(self) -> None:
        """After the first batch."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note(self, name: str, _: Tensor) -> None:
        self.names[name] = None


def _reduced(trainer: Trainer) -> dict[str, Tensor]:
    """The parameters of a DDP module whose order matters and can be repeated without a side effect; else none."""
    ddp = trainer.strategy.model
    if not isinstance(ddp, DistributedDataParallel) or trainer.world_size <= 2:
        return {}
    if ddp.find_unused_parameters or ddp.static_graph or ddp._comm_hooks:
        return {}
    named = ddp.module.named_parameters()
    params = {name: each for name, each in named if each.requires_grad and name not in ddp.parameters_to_ignore}
    others = any(each._backward_hooks or each._post_accumulate_grad_hooks for each in params.values())
    return {} if others or any(each.grad is not None for each in params.values()) else params


def _repeat(ddp: Any, params: list[Tensor]) -> None:
    """A backward pass of zeros, after which DDP makes its buckets in this order."""
    ddp.reducer.prepare_for_backward([])
    for each in params:
        torch.autograd.backward(each, torch.zeros_like(each))
    for each in params:
        each.grad = None
