"""A small regression that goes wrong on request, and how it is trained, for the tests of StabilityGuard.

A batch is {"x": [R, B, 4], "y": [R, B, 1], "id": [R, B]}, of which each rank takes its row.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

STEPS = 12


@dataclass(frozen=True)
class Fault:
    """A value that is put into the loss (its gradient stays finite) or into a gradient (the loss stays finite)."""

    where: str
    value: float
    batches: tuple[int, ...]
    rank: int = 0


def rank():
    return int(os.environ.get("RANK", 0))


class Regression(LightningModule):
    def __init__(self, fault=None, optimizer=torch.optim.AdamW, scale=None, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 1))
        self.fault, self.scale = fault, scale or {}
        self.make = lambda params: optimizer(params, **{"lr": 0.02, **options})
        self.losses, self.rates, self.ids = [], [], []

    def loss(self, batch, number):
        row = min(rank(), len(batch["x"]) - 1)
        fault = self.fault
        here = fault is not None and number in fault.batches and rank() == fault.rank
        hook = None
        if here and fault.where == "gradient":
            hook = self.net[2].register_forward_hook(lambda module, x, y: self.spoil(y))
        loss = (self.net(batch["x"][row]) - batch["y"][row]).square().mean()
        if hook is not None:
            hook.remove()
        if here and fault.where == "loss":
            loss = loss + fault.value
        return loss * self.scale.get(number, 1.0)

    def spoil(self, hidden):
        hidden.register_hook(lambda g: g + self.fault.value)

    def training_step(self, batch, batch_idx):
        number = int(batch["number"])
        loss = self.loss(batch, number)
        self.losses.append(float(loss.detach()))
        self.ids.append(number)
        return loss

    def configure_model(self):
        if self.device_mesh is not None:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return self.make(self.parameters())


def batches(count=STEPS, without=(), size=8, seed=1):
    """Every batch is a function of its number."""
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(1000 * seed + number)
        x = torch.randn(2, size, 4, generator=generator)
        ids = torch.arange(2 * size).view(2, size) + 100 * number
        y = x.sum(-1, keepdim=True).sin() + 0.1 * torch.randn(2, size, 1, generator=generator)
        made.append({"x": x, "y": y, "id": ids, "number": torch.tensor(number)})
    return torch.utils.data.DataLoader([b for b in made if int(b["number"]) not in without], batch_size=None)


def trainer(callbacks=(), **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    defaults = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def train(model, guard=None, data=None, **options):
    """Trains, and returns the trainer."""
    made = trainer([] if guard is None else [guard], **options)
    made.fit(model, batches() if data is None else data)
    return made


def weights(model):
    """The whole of every parameter, float64 on the CPU."""
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone().double()
        for name, p in model.named_parameters()
    }


def furthest(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
