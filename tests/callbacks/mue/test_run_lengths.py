"""Run sizes against what a short fit really reads."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
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


class Random(IterableDataset):
    """Rows without an end, drawn from the global generator."""

    def __iter__(self):
        while True:
            yield ROWS[0] + torch.rand(())


class Places(DataLoader):
    """Goes on where it was saved, within an epoch."""

    place = 0

    def __iter__(self):
        start = self.place
        for place, batch in enumerate(super().__iter__(), 1):
            if place > start:
                self.place = place
                yield batch
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class Data(LightningDataModule):
    """Gives other rows at each call, so that a call too many is seen."""

    def __init__(self, loader=DataLoader, **settings):
        super().__init__()
        self.loader, self.settings, self.calls = loader, {"batch_size": 4, "shuffle": True, **settings}, 0

    def train_dataloader(self):
        self.calls += 1
        rows = self.calls + torch.linspace(0, 1, 24)[:, None].expand(24, 8)
        return self.loader(self.settings.pop("data", rows), **self.settings)


def what_is_read(folder, make_data, callbacks, settings):
    """(all batches of a run, those of a run resumed after 4 steps), with what the global generator gave in between."""

    class Keeps(Counts):
        def training_step(self, batch, batch_idx):
            read.append(torch.cat([batch.flatten(), torch.rand(1)]))
            return super().training_step(batch, batch_idx)

    runs = []
    for path in (None, folder / "step=4.ckpt"):
        read = []
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = Trainer(accelerator="cpu", callbacks=[saver, *callbacks()], **quiet, **settings)
        torch.manual_seed(1)
        trainer.fit(Keeps(), datamodule=make_data(), ckpt_path=path)
        runs.append(torch.cat(read))
    return runs


_WORKERS = {"num_workers": 2, "persistent_workers": True}


@pytest.mark.parametrize(
    ("make_data", "settings"),
    [
        (Data, {"max_epochs": 2}),
        (Data, {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1}),
        (lambda: Data(Places), {"max_epochs": 2}),
        (lambda: Data(data=Random(), shuffle=False), {"max_steps": 7}),
        pytest.param(lambda: Data(**_WORKERS), {"max_epochs": 2}, marks=pytest.mark.slow),
        pytest.param(lambda: Data(data=Random(), shuffle=False, **_WORKERS), {"max_steps": 7}, marks=pytest.mark.slow),
    ],
    ids=["shuffled", "reloaded", "stateful", "endless", "workers", "endless-workers"],
)
def test_counting_changes_no_batch(tmp_path, make_data, settings):
    """A fit reads, bit for bit, what it reads without the callback, and so does a resumed one."""

    def mue():
        base = {"width": 8, "tokens": 10.0, "batch_tokens": 5.0}
        return [MuECallback("complete-p", base=base, verbose=False, verify=False)]

    without = what_is_read(tmp_path / "without", make_data, list, settings)
    counted = what_is_read(tmp_path / "counted", make_data, mue, settings)
    assert len(without[0]) > len(without[1]) > 0
    assert all(map(torch.equal, without, counted))


@pytest.mark.parametrize(
    ("settings", "rows", "now"), [({"max_epochs": 3}, 4, "640.0 -> 960.0"), ({}, 5, r"batch_tokens: 32.0 -> 40.0")]
)
def test_a_resumed_run_of_another_length_is_refused(tmp_path, settings, rows, now):
    def resume(settings, rows, path=None):
        saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        mue = MuECallback("complete-p", base={"width": 8, "tokens": 10.0, "batch_tokens": 5.0}, verbose=False)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        run = Trainer(accelerator="cpu", callbacks=[mue, saver], **quiet, **{"max_epochs": 2, **settings})
        run.fit(Counts(), DataLoader(ROWS, batch_size=rows), ckpt_path=path)

    resume({}, 4)
    with pytest.raises(ValueError, match=rf"ckpt_path: found .*another plan(?s:.*){now}"):
        resume(settings, rows, tmp_path / "step=4.ckpt")
