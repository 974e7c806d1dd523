"""DigitsDataModule: the split, batches as a function of the step, resume, what is refused, and the classifier."""

from __future__ import annotations

import builtins
import importlib.util

import numpy as np
import pytest
import torch

from lightning_mue.data import DigitsDataModule


@pytest.fixture(scope="module")
def data():
    made = DigitsDataModule(32)
    made.setup()
    return made


def rows(images):
    return {tuple(row) for row in images.flatten(1).tolist()}


def all_of(loader):
    return torch.cat([batch["image"] for batch in loader])


def test_images_are_scikit_learns(data):
    from sklearn.datasets import load_digits

    assert len(data._train["label"]) == 1438
    assert len(data._val["label"]) == 359
    both = torch.cat([data._train["image"], data._val["image"]])
    expected = torch.from_numpy(np.asarray(load_digits().images)).float()[:, None] / 8 - 1
    assert both.dtype == torch.float32
    assert (float(both.min()), float(both.max())) == (-1.0, 1.0)
    assert sorted(map(tuple, both.flatten(1).tolist())) == sorted(map(tuple, expected.flatten(1).tolist()))
    assert not rows(data._train["image"]) & rows(data._val["image"])


def test_the_split_is_fixed_whatever_the_order(data):
    other, another = DigitsDataModule(8, seed=5), DigitsDataModule(8, split_seed=1)
    for made in (other, another):
        made.setup()
    assert torch.equal(other._val["image"], data._val["image"])
    assert not torch.equal(another._val["image"], data._val["image"])
    assert not torch.equal(other.train_dataloader().batch(0)["label"], data.train_dataloader().batch(0)["label"][:8])
    assert data._val["label"][:8].tolist() == [2, 4, 5, 4, 8, 2, 0, 6], "the split must not change between versions"


def test_batches_are_a_function_of_the_step(data):
    loader = data.train_dataloader()
    first = [batch["image"] for batch in loader]
    assert len(first) == len(loader) == 1438 // 32
    assert torch.equal(loader.batch(3)["image"], first[3])
    assert loader.state_dict()["step"] == len(first)
    again = data.train_dataloader()
    again.load_state_dict({**loader.state_dict(), "step": 7})
    assert torch.equal(next(iter(again))["image"], first[7])
    assert loader.batch(0)["image"].shape == (32, 1, 8, 8)
    indices = torch.tensor([loader.sample_ids(step) for step in range(500)])
    assert (int(indices.min()), int(indices.max())) == (0, 1437), "the last image is drawn, too"


def test_validation_gives_every_image_once(data):
    batches = list(data.val_dataloader())
    assert [len(batch["label"]) for batch in batches] == [32] * 11 + [7]
    assert torch.equal(all_of(batches), data._val["image"])
    assert torch.equal(all_of(data.val_dataloader()), all_of(data.predict_dataloader()))


def test_ranks_share_validation_and_draw_apart(data, monkeypatch):
    parts, batches = [], []
    for rank in range(2):
        monkeypatch.setattr(data, "_data_parallel", lambda rank=rank: (rank, 2))
        parts.append(all_of(data.val_dataloader()))
        batches.append(data.train_dataloader().batch(0)["image"])
    assert len(parts[0]) == len(parts[1]) == 179
    assert rows(torch.cat(parts)) <= rows(data._val["image"])
    assert not torch.equal(*batches)


def test_classifier_of_real_digits(data):
    assert data.real_accuracy() > 0.95
    noise = torch.rand(359, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert float((data.classify(noise) == data._val["label"]).float().mean()) < 0.3
    inverted = (data.classify(-data._val["image"]) == data._val["label"]).float().mean()
    assert float(inverted) < 0.5


def test_without_scikit_learn_there_is_a_remedy(monkeypatch):
    monkeypatch.setattr("lightning_mue.data.digits.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"found no scikit-learn.*pip install 'lightning-mue\[diffusion\]'"):
        DigitsDataModule()


def test_import_does_not_need_scikit_learn(monkeypatch):
    load = builtins.__import__

    def refuse(name, *args, **kwargs):
        assert not name.startswith("sklearn")
        return load(name, *args, **kwargs)

    spec = importlib.util.find_spec("lightning_mue.data.digits")
    monkeypatch.setattr(builtins, "__import__", refuse)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"val_fraction": 1.0}, ValueError, "val_fraction"),
        ({"seed": -1}, ValueError, "seed"),
        ({"split_seed": 1.5}, TypeError, "split_seed"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        DigitsDataModule(**arguments)


def test_a_split_without_images_is_refused():
    with pytest.raises(ValueError, match=r"val_fraction: found 0\.0001, which leaves 1797 .* and 0 for validation"):
        DigitsDataModule(val_fraction=1e-4).setup()


def test_loaders_need_setup():
    with pytest.raises(RuntimeError, match=r"DigitsDataModule: .*Call setup\(\) first"):
        DigitsDataModule().train_dataloader()
