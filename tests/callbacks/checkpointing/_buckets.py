"""DDP on four ranks, for test_buckets.py (run by _forked.py). Why resumed runs differ in the last bit, and that ours do not."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_mue import SafeCheckpoint

STEPS, STOP = 6, 3


class Layers(LightningModule):
    """Layers that are used in the order of their names, so that gradients arrive in another order than DDP supposes at first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(29, 29) for _ in range(5))

    def forward(self, x):
        for layer in reversed(self.layers):
            x = layer(x).tanh()
        return x

    def training_step(self, batch, batch_idx):
        rank, step = self.trainer.global_rank, self.trainer.global_step
        return self(torch.randn(7, 29, generator=torch.Generator().manual_seed(100 * step + rank))).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(100), batch_size=None)


def passes(ranks, **options):
    """Gradients of the same batch in the first three passes of torch's own DDP."""
    group = dist.new_group(list(range(ranks)))
    if dist.get_rank() >= ranks:
        return None
    ddp = DistributedDataParallel(Layers(), process_group=group, **options)
    x = torch.randn(7, 29, generator=torch.Generator().manual_seed(dist.get_rank()))
    found = []
    for _ in range(3):
        ddp.zero_grad()
        ddp(x).square().mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in ddp.parameters()]))
    return torch.stack(found)


def fit(folder, steps=STEPS, ckpt_path=None, **options):
    """Trains, and returns the weights."""
    model = Layers()
    trainer = Trainer(
        accelerator="cpu",
        devices=4,
        strategy=DDPStrategy(process_group_backend="gloo", **options),
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[SafeCheckpoint(folder, every_n_train_steps=1, keep_last=9)],
    )
    trainer.fit(model, ckpt_path=ckpt_path)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def act(folder, rank):
    warnings.simplefilter("ignore")
    seen = {"two": passes(2), "four": passes(4), "unused": passes(4, find_unused_parameters=True)}
    for view in (False, True):
        where, options = folder / f"view={view}", {"gradient_as_bucket_view": view}
        saved = where / "whole" / f"step-{STOP:06d}" / "checkpoint.ckpt"
        without = where / "without.ckpt"
        seen["whole", view] = fit(where / "whole", **options)
        if rank == 0:
            state = torch.load(saved, weights_only=True)
            seen["order"] = state.pop("lightning_mue_bucket_order")
            torch.save(state, without)
        dist.barrier()
        seen["resumed", view] = fit(where / "resumed", ckpt_path=saved, **options)
        again = where / "resumed" / f"step-{STOP + 1:06d}" / "checkpoint.ckpt"
        seen["resumed again", view] = fit(where / "again", ckpt_path=again, **options)
        seen["without", view] = fit(where / "other", ckpt_path=without, **options)
    if rank == 0:
        torch.save(seen, folder / "seen.pt")
