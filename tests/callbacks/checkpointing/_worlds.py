"""Distributed checkpoints from 4 to 2 to 3 ranks, for test_worlds.py (run by _forked.py).

Each world trains on the same tokens, divided among its ranks, and notes whole weights and whole optimizer state, all
in float64, so that sums in another order agree to far less than 1e-6.
"""

from __future__ import annotations

import functools
import shutil
import warnings

import pytest
import torch
import torch.distributed as dist
from helpers.sharded_models import ShardedLanguageModel
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_mue import SafeCheckpoint
from lightning_mue.optim import HyperSphereOptimizer
from lightning_mue.sharded import whole

#: 257 tokens, 5 experts and width 14 do not divide by the numbers of ranks.
SIZES = {"vocab_size": 257, "context_length": 8, "width": 14, "depth": 1, "n_heads": 1, "n_experts": 5, "top_k": 2}
OPTIMIZERS = {
    "AdamW": functools.partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
    "HyperSphereOptimizer": functools.partial(HyperSphereOptimizer, lr=1e-2),
}
KINDS = ("SafeCheckpoint", "Lightning")
#: Steps done: 4 ranks save after the third, 2 ranks go on from there and save after the fourth, 3 ranks take the fifth.
FIRST, SECOND, LAST = 3, 4, 5


class Divided(ShardedLanguageModel):
    """Every world sees the same 12 sequences in a step; a loss that is a mean over tokens is the same for all of them."""

    def training_step(self, batch, batch_idx):
        draw = torch.Generator().manual_seed(self.trainer.global_step)
        tokens = torch.randint(0, 257, (12, 9), generator=draw).chunk(self.trainer.world_size)[self.trainer.global_rank]
        return super().training_step({"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}, batch_idx)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(100), batch_size=None)


def state_of(trainer, model):
    """Whole weights, buffers and optimizer state by name."""
    found = {name: whole(tensor).detach().clone() for name, tensor in model.state_dict().items()}
    state = trainer.optimizers[0].state
    for name, p in model.named_parameters():
        found |= {f"{name}/{key}": whole(value).clone() for key, value in state[p].items() if torch.is_tensor(value)}
    return found


class Notes(Callback):
    """The state at the start, and after each step."""

    def __init__(self):
        self.at = {}

    def on_train_start(self, trainer, pl_module):
        self.at["start"] = state_of(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.at[trainer.global_step] = state_of(trainer, pl_module)


def fit(folder, optimizer, world, steps, saved, ckpt_path=None):
    """Trains up to a step, and returns the states; the folder gets checkpoints of both kinds of one step."""
    torch.manual_seed(world)  # other weights at the start
    model = Divided(**SIZES, scoring="sigmoid", balance="none", optimizer=OPTIMIZERS[optimizer])
    notes = Notes()
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy=ModelParallelStrategy(world, 1, process_group_backend="gloo"),
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            SafeCheckpoint(folder / "SafeCheckpoint", every_n_train_steps=saved, keep_last=9),
            ModelCheckpoint(folder / "Lightning", filename="{step}", every_n_train_steps=saved, save_top_k=-1),
            notes,
        ],
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    return notes.at


def checkpoint(folder, kind, step):
    """Where a step was saved."""
    return folder / kind / (f"step-{step:06d}" if kind == "SafeCheckpoint" else f"step={step}.ckpt")


def of_world(folder, world):
    """What a world does, for each optimizer and each kind of checkpoint."""
    found = {}
    for name in OPTIMIZERS:
        if world == 4:
            found[name] = fit(folder / f"{name}-4", name, 4, LAST, FIRST)
            continue
        source, step, end = (4, FIRST, SECOND) if world == 2 else (2, SECOND, LAST)
        for kind in KINDS:
            # Each kind of checkpoint has a line of its own; 4 ranks have written both.
            source_folder = folder / (f"{name}-4" if source == 4 else f"{name}-2-{kind}")
            path = checkpoint(source_folder, kind, step)
            found[name, kind] = fit(folder / f"{name}-{world}-{kind}", name, world, end, SECOND, path)
    return found


def refused(folder):
    """What each of two ranks says of a checkpoint whose second part has another byte."""
    damaged = folder / "damaged" / f"step-{FIRST:06d}"
    if dist.get_rank() == 0:
        shutil.copytree(checkpoint(folder / "AdamW-4", "SafeCheckpoint", FIRST), damaged)
        data = bytearray((damaged / "__1_0.distcp").read_bytes())
        data[len(data) // 2] ^= 1
        (damaged / "__1_0.distcp").write_bytes(data)
    dist.barrier()
    with pytest.raises(ValueError, match="checkpoint: found") as error:
        fit(folder / "never", "AdamW", 2, SECOND, SECOND, damaged)
    told = [None, None]
    dist.all_gather_object(told, str(error.value))
    return told


def act(folder, rank):
    """One rank of a world."""
    warnings.simplefilter("ignore")
    torch.set_default_dtype(torch.float64)
    world = dist.get_world_size()
    found = of_world(folder, world)
    if world == 2:
        found["refused"] = refused(folder)
    if rank == 0:
        torch.save(found, folder / f"world{world}.pt")
