"""A model that records what it is fed, and small corpora."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_mue.data import TextDataModule


class Recorder(LightningModule):
    """Remembers the tokens of every training batch; `fail_at` raises in that training step, counted from 0."""

    def __init__(self, vocab_size=256, fail_at=None):
        super().__init__()
        self.vocab_size = vocab_size
        self.fail_at = fail_at
        self.embedding = torch.nn.Embedding(vocab_size, 4)
        self.head = torch.nn.Linear(4, vocab_size)
        self.seen: list[list[list[int]]] = []
        self.seen_in_validation: list[list[list[int]]] = []

    def loss(self, batch):
        logits = self.head(self.embedding(batch["tokens"]))
        return torch.nn.functional.cross_entropy(logits.view(-1, self.vocab_size), batch["targets"].view(-1))

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            raise RuntimeError("stop here")
        self.seen.append(batch["tokens"].tolist())
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.seen_in_validation.append(batch["tokens"].tolist())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return batch["tokens"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["n_seen"] = len(self.seen)


@pytest.fixture
def recorder():
    return Recorder


@pytest.fixture
def make_trainer(tmp_path):
    """A quiet CPU Trainer."""

    def make(**kwargs):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return Trainer(**{**defaults, **kwargs})

    return make


@pytest.fixture
def text_file(tmp_path):
    """120 bytes, no two windows alike: with val_fraction=0.2, 96 for training and 24 for validation."""
    path = tmp_path / "corpus.txt"
    path.write_bytes(np.random.Generator(np.random.PCG64(0)).permutation(np.arange(120, dtype=np.uint8)).tobytes())
    return path


@pytest.fixture
def folder(tmp_path):
    """Forty files of distinct text, three of them in subfolders, beside files that do not belong."""
    root = tmp_path / "corpus"
    for i in range(40):
        path = root / ("sub/deep" if i % 13 == 0 else "") / f"file{i:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of file {i} " * 20)
    for name in (".hidden.txt", ".git/config.txt", "__pycache__/a.txt", "site-packages/b.txt"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("must not be read")
    (root / "other.md").write_text("markdown")
    return root


@pytest.fixture
def make(tmp_path):
    def make(path, **kwargs):
        arguments = {"context_length": 16, "batch_size": 2, "val_fraction": 0.2, "cache_dir": tmp_path / "cache"}
        return TextDataModule(path, **{**arguments, **kwargs})

    return make


@pytest.fixture
def read():
    """Builds what must be built, and returns the bytes of both splits."""

    def read(data):
        data.prepare_data()
        return {name: part.tobytes() for name, part in data.load_splits()._asdict().items()}

    return read
