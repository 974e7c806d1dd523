"""What test_ranks.py runs on two CPU processes: groups added to sharded and to shared optimizers, saved and resumed."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from helpers.hypersphere_models import Model, fit, shard
from helpers.processes import main
from optim.hypersphere import _checkpoint_ranks as checkpoints

from lightning_mue.optim import HyperSphereOptimizer

ADD, STOP, END = 2, 4, 6


def head(model, **options):
    """An optimizer of the head, which knows the names of the rest."""
    held = model.lm_head.named_parameters("lm_head")
    optimizer = HyperSphereOptimizer(held, lr=0.02, adamw_lr=0.5, compute_dtype="float32", **options)
    optimizer.note_names(model)
    return optimizer


def add_rest(model, optimizer):
    """As a finetuning callback does it: without names, in one group."""
    params = [p for name, p in model.named_parameters() if not name.startswith("lm_head")]
    optimizer.add_param_group({"params": params, "lr": 0.01})


def train(model, optimizer, first, last, rank=0, world=1):
    """Train, with the rest from step ADD on and a rate that is set anew at each step."""
    for step in range(first, last):
        if step == ADD:
            add_rest(model, optimizer)
        if step >= ADD:
            optimizer.param_groups[-1]["lr"] = 0.01 / (1 + step - ADD)
        fit(model, optimizer, [step], rank, world)


def sharded(rank, folder):
    """FSDP2: a whole run, and runs resumed from torch's sharded and full checkpoints, on models of other weights."""
    model = shard(Model())
    optimizer = head(model)
    train(model, optimizer, 0, STOP, rank, 2)
    checkpoints.save_sharded(model, optimizer, folder / "sharded")
    full = checkpoints.full_state(model, optimizer)
    train(model, optimizer, STOP, END, rank, 2)
    report = {"kinds": [optimizer.param_groups[-1][key] for key in ("kind", "kinds", "param_names")]}
    report["end"] = checkpoints.state_of(model, optimizer)
    for way in ("sharded", "full"):
        again = shard(Model(seed=1 + rank))
        resumed = head(again)
        add_rest(again, resumed)
        if way == "sharded":
            checkpoints.load_sharded(again, resumed, folder / "sharded")
        else:
            checkpoints.set_full(again, resumed, full)
        train(again, resumed, STOP, END, rank, 2)
        report[way] = checkpoints.state_of(again, resumed)
    return report


def shared(rank, folder):
    """Replicas that share the work (every rank trains on the whole batch, so that gradients are equal)."""
    model = Model()
    optimizer = head(model, process_group=dist.group.WORLD)
    train(model, optimizer, 0, END)
    report = {"end": checkpoints.state_of(model, optimizer)}
    report["shared"] = [optimizer._layout(p).replicas for p in optimizer.param_groups[-1]["params"] if p.ndim > 1]
    late = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(late.weight, 1.0 + rank)
    optimizer.add_param_group({"params": list(late.named_parameters("late"))})
    late(torch.ones(4)).sum().backward()
    report["message"] = checkpoints.message_of(optimizer.step)
    return report


if __name__ == "__main__":
    main({"sharded": sharded, "shared": shared}, *sys.argv[1:])
