"""Saving and loading on CPU processes: `_checkpoint_ranks.py part rank world_size folder`.

`lightning` runs under torchrun, with the folder alone. The tests import this file too, and do the same in one process.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.hypersphere_models import Model, fit, optimizer_of, shard
from helpers.processes import main
from optim.hypersphere._ranks import whole, wholes
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from lightning_mue.optim import HyperSphereOptimizer

STOP, END = 5, 10
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_ZERO = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
LAYOUTS = ("rows", "columns")


def build(layout=None, seed=0, optimizer=optimizer_of):
    """A model, sharded where a layout is named, and its optimizer."""
    model = Model(seed=seed) if layout is None else shard(Model(seed=seed), layout)
    return model, optimizer(model)


def state_of(model, optimizer):
    """Whole weights and whole state, by name."""
    state = {
        f"{name}/{key}": whole(value)
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()  # asking by index would make an entry
    }
    return {"weights": wholes(dict(model.named_parameters())), "state": state}


def sharded_state(model, optimizer):
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}


def save_sharded(model, optimizer, path):
    dcp.save(sharded_state(model, optimizer), checkpoint_id=path)


def load_sharded(model, optimizer, path):
    """As the documentation of torch.distributed.checkpoint has it: make the state, fill it, set it."""
    saved = sharded_state(model, optimizer)
    dcp.load(saved, checkpoint_id=path)
    set_model_state_dict(model, saved["model"])
    set_optimizer_state_dict(model, optimizer, saved["optimizer"])


def full_state(model, optimizer):
    """Everything on rank 0, in plain tensors; empty elsewhere."""
    saved = {
        "model": get_model_state_dict(model, options=FULL),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=FULL),
    }
    return copy.deepcopy(saved)  # on CPU, what is not sharded is not copied


def set_full(model, optimizer, saved):
    set_model_state_dict(model, saved["model"], options=FROM_ZERO)
    set_optimizer_state_dict(model, optimizer, saved["optimizer"], options=FROM_ZERO)


def how_radii_lie(model, optimizer):
    """Shape of each radius and of this rank's part of it."""
    radii = {n: optimizer.state[p]["radius"] for n, p in model.named_parameters() if "radius" in optimizer.state[p]}
    return {
        name: [list(r.shape), list(r.to_local().shape) if isinstance(r, DTensor) else list(r.shape)]
        for name, r in radii.items()
    }


def message_of(function, *args):
    try:
        function(*args)
    except (ValueError, RuntimeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def two(rank, folder):
    """Train and save on two ranks; resume there from both kinds of checkpoint."""
    report = {}
    for layout in LAYOUTS:
        model, optimizer = build(layout)
        fit(model, optimizer, range(STOP), rank, 2)
        seen = {"saved": state_of(model, optimizer), "radii": how_radii_lie(model, optimizer)}
        seen["memory"] = optimizer.memory()
        save_sharded(model, optimizer, folder / f"two-{layout}")
        full = full_state(model, optimizer)
        if rank == 0:
            torch.save(full, folder / f"full-{layout}.pt")
        fit(model, optimizer, range(STOP, END), rank, 2)
        seen["end"] = state_of(model, optimizer)
        for way in ("sharded", "full"):
            again, restored = build(layout, seed=1 + rank)
            if way == "sharded":
                load_sharded(again, restored, folder / f"two-{layout}")
            else:
                set_full(again, restored, full)
            seen[f"{way} loaded"] = state_of(again, restored)
            seen[f"{way} radii"] = how_radii_lie(again, restored)
            fit(again, restored, range(STOP, END), rank, 2)
            seen[f"{way} end"] = state_of(again, restored)
        report[layout] = seen
    other, theirs = build("rows", optimizer=adamw)
    fit(other, theirs, range(1), rank, 2)
    for way, save, load in (
        ("sharded", lambda: get_optimizer_state_dict(other, theirs), set_optimizer_state_dict),
        ("full", lambda: full_state(other, theirs), set_full),
    ):
        report[f"refused {way}"] = message_of(load, *build("rows"), save())
    return report


def two_again(rank, folder):
    """Load on two ranks what one process has saved, which had loaded what two have saved."""
    report = {}
    for layout in LAYOUTS:
        model, optimizer = build(layout, seed=1 + rank)
        load_sharded(model, optimizer, folder / f"one-{layout}")
        report[layout] = {"loaded": state_of(model, optimizer)}
        fit(model, optimizer, range(STOP, END), rank, 2)
        report[layout]["end"] = state_of(model, optimizer)
    return report


def make_optimizer(strategy, params):
    """Called once the processes have met; under DDP they share the work."""
    group = dist.group.WORLD if strategy == "ddp" else None
    return HyperSphereOptimizer(params, lr=0.02, compute_dtype="float32", process_group=group)


def lightning(folder):
    """Fits of the project's model by Lightning's Trainer, under torchrun: a whole run and one resumed in the middle."""
    from callbacks.mue import _ranks as ranks

    def run(strategy, steps, **kwargs):
        model = ranks.make_model()
        model.optimizer = functools.partial(make_optimizer, strategy)
        _, record = ranks.fit(folder, strategy, model, steps, rule="hyperp", **kwargs)
        return model, model.trainer.optimizers[0], record.at["on_train_start"]["weights"]

    report = {}
    for strategy in ("ddp", "fsdp2", "fsdp2-full"):
        model, optimizer, start = run(strategy, ranks.STEPS, save=folder / strategy)
        path = folder / strategy / f"step={ranks.STOP}.ckpt"
        again, restored, middle = run(strategy, ranks.STEPS, ckpt_path=path)
        plain = [
            p
            for group in optimizer.param_groups
            if group["kind"] == "sphere"
            for p in group["params"]
            if not isinstance(p, DTensor)
        ]
        report[strategy] = {
            "start": start,
            "middle": middle,
            "end": state_of(model, optimizer),
            "resumed end": state_of(again, restored),
            "radii": how_radii_lie(model, optimizer),
            "kinds": [group["kind"] for group in optimizer.param_groups],
            "plain": len(plain),
            "shared": sum(optimizer._layout(p).replicas > 1 for p in plain),
        }
    return report


PARTS = {"two": two, "two_again": two_again}

if __name__ == "__main__":
    if len(sys.argv) == 2:  # under torchrun
        torch.set_num_threads(1)
        torch.save(lightning(Path(sys.argv[1])), Path(sys.argv[1]) / f"lightning{os.environ['RANK']}.pt")
    else:
        main(PARTS, *sys.argv[1:])
