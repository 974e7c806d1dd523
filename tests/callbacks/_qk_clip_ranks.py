"""What test_qk_clip.py runs on two CPU processes: QKClip's hooks, and under DDP, on ranks that see different logits."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from lightning.pytorch import LightningModule, Trainer

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.processes import main

from lightning_mue import HyperSphereOptimizer, QKClip
from lightning_mue.models.transformer import Attention, RotaryEmbedding


class Model(torch.nn.Module):
    def __init__(self, n_heads=4):
        super().__init__()
        torch.manual_seed(0)
        self.attention = Attention(16, n_heads, n_heads, 4, qk_norm=False, scale=0.5, init_std=None)
        self.rotary = RotaryEmbedding(4, 6)


def heads(model, x):
    """Largest logits by the whole matrix, in float64."""
    a = model.attention
    q, k = (model.rotary((x @ w.T).unflatten(-1, (-1, 4)).transpose(1, 2)).double() for w in (a.w_q, a.w_k))
    future = torch.ones(6, 6).triu(1).bool()
    return (a.core.scale * q @ k.mT).masked_fill(future, float("-inf")).amax((0, 2, 3)).detach()


def trainer_of(optimizer):
    return SimpleNamespace(world_size=2, optimizers=[optimizer])


def one(rank, *, forward):
    model = Model()
    optimizer = HyperSphereOptimizer(model.named_parameters(), lr=0.0, compute_dtype="float32")
    large = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(7))
    before = heads(model, large)
    clip = QKClip(float(before.sort().values[1:3].mean()))  # two heads above, two below
    clip.on_train_start(trainer_of(optimizer), model)
    if forward:
        x = large if rank == 0 else 0.1 * large
        model.attention(x, model.rotary).square().mean().backward()
    for p in model.parameters():  # what DDP would have averaged
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    optimizer.step()
    weights = {name: getattr(model.attention, name).detach().clone() for name in ("w_q", "w_k")}
    found = {"before": before, "after": heads(model, large), "threshold": clip.threshold, "clipped": clip.clipped}
    return {**weights, **found}


def clip(rank, folder):
    report = {"one rank above": one(rank, forward=True)}
    report["one rank without a forward"] = one(rank, forward=rank == 0)
    model = Model(4 if rank == 0 else 2)
    optimizer = HyperSphereOptimizer(model.named_parameters(), lr=0.0)
    try:
        QKClip(1.0).on_train_start(trainer_of(optimizer), model)
        report["refused"] = ""
    except ValueError as error:
        report["refused"] = str(error)
    return report


class Module(LightningModule):
    """A model of one attention, and what it saw: the largest logits of each batch."""

    def __init__(self, compiled):
        super().__init__()
        self.net, self.largest = Model(), []
        if compiled:
            self.net.attention.compile(backend="eager")
            x = torch.zeros(2, 6, 16)
            self.net.attention(x, self.net.rotary).sum().backward()  # code without hooks
            self.net.zero_grad()

    def training_step(self, x):
        self.largest.append(float(heads(self.net, x).max()))
        return -self.net.attention(x, self.net.rotary).square().mean()

    def configure_optimizers(self):
        return HyperSphereOptimizer(self.named_parameters(), lr=0.05, compute_dtype="float32")


def ddp(rank, folder):
    """Six steps of a real Trainer; rank 0's logits are larger."""
    reports = {}
    for compiled in (False, True):
        module = Module(compiled)
        generator = torch.Generator().manual_seed(7)
        batches = [torch.randn(2, 6, 16, generator=generator) for _ in range(6)]
        data = [batch * (1.0 if rank == 0 else 0.3) for batch in batches]
        clip = QKClip(0.5 * float(heads(module.net, batches[0]).max()))
        options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        options |= {
            "enable_model_summary": False,
            "default_root_dir": folder,
            "max_epochs": 1,
            "use_distributed_sampler": False,
        }
        Trainer(accelerator="cpu", devices=2, strategy="ddp", callbacks=[clip], **options).fit(
            module, torch.utils.data.DataLoader(data, batch_size=None)
        )
        weights = {name: p.detach().clone() for name, p in module.net.named_parameters()}
        own = {"clipped": clip.clipped, "threshold": clip.threshold, "largest": torch.tensor(module.largest)}
        reports["compiled" if compiled else "eager"] = {**weights, **own}
    return reports


if __name__ == "__main__":
    main({"clip": clip, "ddp": ddp}, *sys.argv[1:])
