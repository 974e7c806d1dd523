"""A small run on step-indexed text, with dropout, whose every step can be compared."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

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
    return trainer_in(tmp_path)


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory):
    """A folder with the checkpoints of steps 3 and 6."""
    folder = tmp_path_factory.mktemp("saved")
    trainer_in(folder)(SafeCheckpoint(folder / "safe", every_n_train_steps=3))
    return folder / "safe"


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """The folder of what _forked.py saw."""
    folder = tmp_path_factory.mktemp("forked")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name("_forked.py"), folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(saved_once, tmp_path / "saved")


def trainer_in(tmp_path):
    """A function that trains."""
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
