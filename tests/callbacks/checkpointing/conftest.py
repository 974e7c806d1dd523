"""A small run on step-indexed text, with dropout, whose every step can be compared."""

from __future__ import annotations

import pytest
import torch
from helpers.interruptions import SIZES, Noisy
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mue import MuECallback, SafeCheckpoint
from lightning_mue.data import TextDataModule


@pytest.fixture
def run(tmp_path):
    """Trains some steps, and returns all weights as one vector."""
    corpus = tmp_path / "text.txt"
    corpus.write_bytes(bytes(range(32, 127)) * 3)

    def fit(*callbacks, ckpt_path=None, **limits):
        torch.manual_seed(0)
        model = Noisy(**SIZES, balance="bias")
        data = TextDataModule(corpus, context_length=8, batch_size=2, val_fraction=0.2, cache_dir=tmp_path / "cache")
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=any(isinstance(each, (ModelCheckpoint, SafeCheckpoint)) for each in callbacks),
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[*callbacks, MuECallback(rule="sp")],
            **{"limit_val_batches": 0, "max_steps": 6, **limits},
        )
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return torch.cat([t.flatten().double() for t in model.state_dict().values()])

    return fit
