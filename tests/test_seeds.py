"""One `seed_everything` changes weights and batches of a run; a seed of one's own goes before it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lightning_mue import FlowMatchingTransformer, MoELanguageModel, MuECallback, TextDataModule


@pytest.fixture
def run(tmp_path):
    """First weight and first batch of a run."""
    (tmp_path / "text.txt").write_bytes(bytes(range(32, 127)) * 20)

    def begin(everything, **own):
        if everything is not None:
            seed_everything(everything, verbose=False)
        model = MoELanguageModel(context_length=8, width=16, depth=1, n_heads=2)
        data = TextDataModule(
            tmp_path / "text.txt", context_length=8, batch_size=2, cache_dir=tmp_path / "cache", **own
        )
        callback = MuECallback(rule="mup", base={"width": 8, "n_heads": 1}, verbose=False, **own)
        trainer = Trainer(
            accelerator="cpu", max_steps=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[callback],
        )  # fmt: skip
        trainer.fit(model, datamodule=data)
        return model.transformer.embedding.weight.detach().clone(), data.train_dataloader().batch(0)["tokens"]

    return begin


def test_the_seed_of_the_run_reaches_weights_and_batches(run):
    first, again, other, plain = run(3), run(3), run(4), run(4, seed=0)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(other[1], plain[1])


def test_without_one_it_is_zero(run, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    for mine, zero in zip(run(None), run(None, seed=0), strict=True):
        assert torch.equal(mine, zero)


def test_noise_of_training_follows_the_seed_of_the_run_and_that_of_validation_does_not(monkeypatch):
    def seeds(everything, **own):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(everything))
        model = FlowMatchingTransformer(width=16, depth=1, n_heads=2, **own)
        model._trainer = SimpleNamespace(distributed_sampler_kwargs=None)
        return [model._generator(stream, 0).initial_seed() for stream in ("train", "val")]

    (train, val), (other_train, other_val) = seeds(0), seeds(1)
    assert train != other_train
    assert val == other_val
    assert seeds(1, seed=0) == [train, val]
