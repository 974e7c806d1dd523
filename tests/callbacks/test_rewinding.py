"""A run resumed from a checkpoint saved in the middle of an accumulation goes on as a run that was never stopped."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_mue import MoELanguageModel, MuECallback
from lightning_mue.data import TextDataModule

SIZES = {"context_length": 8, "width": 16, "depth": 1, "n_heads": 2, "n_experts": 2, "top_k": 1, "scoring": "sigmoid"}


class SaveAtBatches(Callback):
    """A user's own saver: after every micro-batch, or when an exception ends the run."""

    def __init__(self, folder, fail_at=None):
        self.folder, self.fail_at, self.batches = folder, fail_at, 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.batches == self.fail_at:
            raise RuntimeError("stop here")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1
        if self.fail_at is None:
            trainer.save_checkpoint(self.folder / f"{self.batches}.ckpt")

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.folder / "exception.ckpt")


class Losses(Callback):
    """Loss of each micro-batch; of one that is repeated, the last."""

    def __init__(self):
        self.losses = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[tuple(batch["tokens"].flatten().tolist())] = float(outputs["loss"])


@pytest.fixture
def run(tmp_path):
    """Trains on a corpus of 14 batches an epoch, with the loads of experts balanced by a bias."""
    corpus = tmp_path / "text.txt"
    corpus.write_bytes(bytes(range(32, 127)) * 3)
    losses = Losses()

    def fit(*callbacks, ckpt_path=None, **limits):
        stops = any(getattr(each, "fail_at", None) is not None for each in callbacks)
        torch.manual_seed(0)
        model = MoELanguageModel(**SIZES, balance="bias")
        data = TextDataModule(corpus, context_length=8, batch_size=2, val_fraction=0.2, cache_dir=tmp_path / "cache")
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[MuECallback(rule="sp"), *callbacks, losses],
            **{"limit_val_batches": 0, **limits},
        )
        with pytest.raises(RuntimeError, match="stop here") if stops else nullcontext():
            trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return torch.cat([t.flatten().double() for t in model.state_dict().values()]), losses.losses

    return fit


LIMITS = {
    "steps": {"max_steps": 5, "accumulate_grad_batches": 3},
    "epochs": {"max_epochs": 2, "accumulate_grad_batches": 5},
    "validation": {"max_steps": 6, "accumulate_grad_batches": 2, "val_check_interval": 4, "limit_val_batches": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("limits", LIMITS)
def test_a_checkpoint_after_any_micro_batch_resumes_exactly(run, tmp_path, limits):
    reference, losses = run(SaveAtBatches(tmp_path), **LIMITS[limits])
    wanted, saved = dict(losses), sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem))
    assert len(saved) >= 10
    for path in saved[:11]:
        weights, losses = run(ckpt_path=path, **LIMITS[limits])
        assert torch.equal(weights, reference), path.name
        assert losses == wanted


def test_without_it_a_window_is_lost(run, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_mue.callbacks.mue.callback.rewind_to_step", lambda trainer, checkpoint: None)
    reference, _ = run(SaveAtBatches(tmp_path), **LIMITS["steps"])
    weights, _ = run(ckpt_path=tmp_path / "4.ckpt", **LIMITS["steps"])
    assert not torch.equal(weights, reference)


@pytest.mark.parametrize("fail_at", [6, 8])
def test_a_checkpoint_of_an_exception_resumes_exactly(run, tmp_path, fail_at):
    reference, _ = run(**LIMITS["steps"])
    run(SaveAtBatches(tmp_path, fail_at), **LIMITS["steps"])
    weights, _ = run(ckpt_path=tmp_path / "exception.ckpt", **LIMITS["steps"])
    assert torch.equal(weights, reference)


@pytest.mark.slow
def test_repeated_resumes_with_lightnings_own_saver_lose_nothing(run, tmp_path):
    """ModelCheckpoint saves again on the first micro-batch after a resume, in the middle of an accumulation."""

    def saver():
        return ModelCheckpoint(tmp_path / "own", save_last=True, every_n_train_steps=1, enable_version_counter=False)

    reference, losses = run(**LIMITS["steps"])
    wanted, path = dict(losses), None
    for fail_at in (4, 3, 4, 2, 4):
        run(SaveAtBatches(tmp_path, fail_at), saver(), ckpt_path=path, **LIMITS["steps"])
        path = tmp_path / "own" / "last.ckpt"
    weights, losses = run(saver(), ckpt_path=path, **LIMITS["steps"])
    assert torch.equal(weights, reference)
    assert losses == wanted


class Plain(LightningModule):
    """A module on somebody else's loader."""

    def __init__(self, loader):
        super().__init__()
        self.net, self.loader = torch.nn.Linear(2, 2), loader

    def train_dataloader(self):
        return self.loader

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stateful(DataLoader):
    """A loader with a state of its own."""

    def state_dict(self):
        return {"position": 3}

    def load_state_dict(self, state):
        pass


def test_a_foreign_state_that_cannot_be_taken_back_is_warned_of(tmp_path):
    saver = SaveAtBatches(tmp_path)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, max_steps=1,
        callbacks=[MuECallback(rule="sp"), saver], accumulate_grad_batches=2, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"checkpoint: found 1 micro-batch\(es\) since .* training data of Stateful"):
        trainer.fit(Plain(Stateful(torch.randn(8, 2), batch_size=2)))
