"""Run sizes against what a short fit really reads."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

from lightning_mue import MuECallback

ROWS = torch.zeros(40, 8)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(ROWS)


class Counts(LightningModule):
    seq_len = 8

    def __init__(self, width=16):
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))
        self.seen = 0

    def training_step(self, batch, batch_idx):
        batch = batch["a"] if isinstance(batch, dict) else batch
        self.seen += batch.numel()
        return self.net(batch).mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


def fit(loader, *callbacks, batch_tokens=None, **limits):
    base = {"width": 8, "tokens": 10.0, "batch_tokens": 5.0}
    mue, model = MuECallback("complete-p", base=base, verbose=False, batch_tokens=batch_tokens), Counts()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", callbacks=[mue, *callbacks], **quiet, **limits).fit(model, loader)
    return mue.plan.axes, model.seen


def plain():
    return DataLoader(ROWS, batch_size=4)


@pytest.mark.parametrize(
    ("loader", "limits", "batch"),
    [
        (plain, {"max_epochs": 2}, 32),
        (plain, {"max_epochs": 2, "accumulate_grad_batches": 3}, 96),
        (plain, {"max_steps": 7, "accumulate_grad_batches": 3}, 96),
        (plain, {"max_steps": 3, "accumulate_grad_batches": 64}, 320),
        (plain, {"max_epochs": 2, "limit_train_batches": 3}, 32),
        (plain, {"max_epochs": 2, "limit_train_batches": 0.5}, 32),
        (plain, {"max_epochs": 3, "overfit_batches": 2}, 32),
        (plain, {"max_epochs": 2, "max_steps": 13}, 32),
        (lambda: {"a": plain()}, {"max_epochs": 2}, 32),
        (lambda: DataLoader(Endless(), batch_size=4), {"max_steps": 7}, 32),
        (
            lambda: DataLoader(ROWS, batch_sampler=BatchSampler(SequentialSampler(ROWS), 5, False)),
            {"max_epochs": 1},
            40,
        ),
    ],
)
def test_tokens_are_those_that_the_fit_reads(loader, limits, batch):
    axes, seen = fit(loader(), **limits)
    assert (axes["tokens"], axes["batch_tokens"]) == (seen, batch)


def test_accumulation_by_epoch():
    axes, seen = fit(plain(), GradientAccumulationScheduler({0: 2, 1: 5}), batch_tokens=160, max_epochs=3)
    assert axes["tokens"] == seen == 3 * 320
    assert fit(plain(), GradientAccumulationScheduler({2: 5}), max_epochs=2)[0]["batch_tokens"] == 32
    with pytest.raises(ValueError, match="accumulate_grad_batches: found a GradientAccumulationScheduler"):
        fit(plain(), GradientAccumulationScheduler({0: 2, 1: 5}), max_epochs=3)


@pytest.mark.parametrize(
    ("loader", "limits", "found"),
    [
        (lambda: {"a": plain(), "b": plain()}, {"max_epochs": 1}, "2 training loaders"),
        (plain, {"max_time": "00:00:10:00"}, "max_time alone"),
        (lambda: DataLoader(Endless(), batch_size=4), {"max_epochs": 2}, "max_epochs=2"),
    ],
)
def test_what_cannot_be_counted_is_asked_for(loader, limits, found):
    with pytest.raises(ValueError, match=found):
        fit(loader(), **limits)
