"""MuECallback's `verify`: what it catches in a fit, and that it leaves the fit as it was."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_mue import MuECallback
from lightning_mue.parameterizations.reading.base import changes
from lightning_mue.parameterizations.verifying.sizes import small_batches, two_models

BASE = {"width": 16, "depth": 1}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Net(L.LightningModule):
    """Draws noise of all generators in its loss, and logs; its hyperparameters lie flat."""

    def __init__(self, width=64, depth=2, deeper=1):
        super().__init__()
        self.save_hyperparameters()
        self.stem, self.norm, self.head = nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])

    def mue_axes(self):
        return {"depth": self.hparams.depth * (self.hparams.deeper if self.hparams.depth > 1 else 1)}

    def training_step(self, batch, batch_idx):
        x = self.stem(batch + 1e-3 * (random.random() + np.random.rand()))  # noqa: NPY002
        for block in self.blocks:
            x = block(x)
        loss = F.mse_loss(self.head(self.norm(x)), torch.ones(len(batch), 4, dtype=batch.dtype))
        self.log("loss", loss)
        self.logger.log_metrics({"mine": float(loss)})
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Kept(L.pytorch.loggers.logger.DummyLogger):
    """Counts what a module logs by itself."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def log_metrics(self, metrics, step=None):
        self.seen += [metrics] if "mine" in metrics else []


def fit(model, verify, base=BASE, **trainer):
    """(weights after two steps, warnings of the verification, what the module logged by itself)."""
    L.seed_everything(1, verbose=False)
    logger = Kept()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        callback = MuECallback("complete-p", base=base, verify=verify, verbose=False)
        run = L.Trainer(accelerator="cpu", max_steps=2, callbacks=[callback], logger=logger, **quiet, **trainer)
        run.fit(model, torch.utils.data.DataLoader(torch.randn(16, 8), batch_size=8))
    told = [str(w.message) for w in caught if "verif" in str(w.message)]
    return {n: p.detach().clone() for n, p in model.named_parameters()}, told, logger.seen


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "64-true"])
def test_a_verified_run_is_the_same_bit_for_bit(precision):
    torch.manual_seed(0)
    plain, _, logged = fit(Net(), False, precision=precision)
    torch.manual_seed(0)
    verified, told, seen = fit(Net(), True, precision=precision)
    assert told == []
    assert seen == logged
    assert all(torch.equal(plain[name], verified[name]) for name in plain)


def test_a_wrong_depth_is_told_by_default_and_raised_if_asked():
    _, told, _ = fit(Net(deeper=8), None)
    assert len(told) == 1
    assert "the number of layers that run grows by" in told[0]
    with pytest.raises(ValueError, match="takes the depth"):
        fit(Net(deeper=8), "raise")


class Broken(Net):
    """Only its setup makes what its optimizer needs."""

    def setup(self, stage):
        self.rate = 1e-3

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.rate)


def test_what_cannot_be_verified_is_told_and_trained():
    _, told, _ = fit(Broken(), True)
    assert len(told) == 1
    assert "could not be verified (AttributeError" in told[0]
    with pytest.raises(ValueError, match="could not be verified"):
        fit(Broken(), "raise")


class Nested(L.LightningModule):
    def __init__(self, net=None, name="x"):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(net["width"], 4 * net["width"])


@pytest.mark.parametrize("base", [{"net.width": 16}, {"net": {"width": 16}}])
def test_nested_sizes_are_shrunk_like_flat_ones(base):
    model = Nested({"width": 4096, "kind": "a"})
    assert changes(model, base) == [("net.width", 4096, 16)]
    _, target, sizes = two_models(model, base)
    assert sizes == {"net.width": 64}
    assert target().layer.weight.shape == (256, 64)
    assert target().hparams.net["kind"] == "a"


@dataclass
class Batch:
    x: torch.Tensor
    y: list[torch.Tensor]


def test_batches_of_any_type_are_cut_and_cast():
    batch = {"a": Batch(torch.zeros(8, 3, dtype=torch.bfloat16), [torch.arange(160).view(8, 20)]), "text": ["t"] * 8}
    small = next(small_batches(batch, torch.float32))
    assert small["a"].x.dtype == torch.float32
    assert small["a"].x.shape == (2, 3)
    assert torch.equal(small["a"].y[0], torch.arange(160).view(8, 20)[:2, :16])
    assert batch["a"].x.shape == (8, 3)
