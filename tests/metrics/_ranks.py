"""What test_lightning.py runs on two CPU processes: every metric by hand, and both models by Lightning's DDP."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.metric_cases import CASES, batches_of, logits, predictions

from lightning_mue import MoELanguageModel, metrics


class Foreign(LightningModule):
    """A model of someone else: its batches are what the metrics read."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.z, self.entropy = metrics.ZValue(), metrics.RouterEntropy()

    def training_step(self, batch, batch_idx):
        self.z(batch)
        self.log("train_z", self.z, on_step=True, on_epoch=True)
        return self.weight.square()

    def validation_step(self, batch, batch_idx):
        self.entropy.update(batch)
        self.log("val_entropy", self.entropy)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def language_model():
    torch.manual_seed(0)
    return MoELanguageModel(vocab_size=9, context_length=4, width=16, depth=1, n_heads=2, bytes_per_token=3.5)


def text():
    """Uneven batches, and ever fewer scored targets in them."""
    rows = [predictions(n, seed)[1] for seed, n in enumerate((3, 5, 1, 2))]
    return [{"tokens": row.clamp(min=0), "targets": row} for row in rows]


def trainer(folder, **kwargs):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(accelerator="cpu", logger=False, default_root_dir=folder, **quiet, **kwargs)


def fit(folder, mine, **kwargs):
    """Metrics of the runs on the batches whose numbers are in ``mine``."""
    mine = list(mine)
    data = [logits(n, seed)[0] for seed, n in enumerate((3, 6, 40, 17)) if seed in mine]
    foreign = trainer(folder, max_epochs=2, log_every_n_steps=1, **kwargs)
    foreign.fit(Foreign(), DataLoader(data, batch_size=None), DataLoader(data, batch_size=None))
    batches = DataLoader([text()[i] for i in mine], batch_size=None)
    model, language = language_model(), trainer(folder, **kwargs)
    language.validate(model, batches, verbose=False)
    found = {**foreign.callback_metrics, **language.callback_metrics}
    language.test(model, batches, verbose=False)
    return {name: value.item() for name, value in {**found, **language.callback_metrics}.items()}


def report(rank, folder):
    by_hand = {}
    for name, (make, draw, _) in CASES.items():
        batches = batches_of(draw)
        for layout, mine in {"uneven": batches[rank::2], "one rank has nothing": batches if rank else []}.items():
            metric = make()
            for batch in mine:
                metric.update(*batch)
            by_hand[f"{name}, {layout}"] = metric.compute()  # of both ranks
            metric.update(*draw(7, 5))  # and goes on with its own
            by_hand[f"{name}, {layout}, more"] = metric.compute()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    by_lightning = fit(folder, range(rank, 4, 2), devices=2, strategy="ddp", use_distributed_sampler=False)
    return {"by hand": by_hand, "by Lightning": by_lightning}


if __name__ == "__main__":
    from helpers.processes import main  # not above: what collects doctests imports this file from elsewhere

    main({"report": report}, *sys.argv[1:])
