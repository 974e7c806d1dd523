"""Run sizes in tokens, inferred from trainer, datamodule and module."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from lightning_mue import MoELanguageModel, MuECallback
from lightning_mue.callbacks._run import infer_run, known_to

BASE = {"width": 32, "n_heads": 2, "n_experts": 0}
MODULE = SimpleNamespace()


class Data(LightningDataModule):
    def __init__(self, **hparams):
        super().__init__()
        self.save_hyperparameters()
        for name, value in hparams.items():
            setattr(self, name, value)

    def train_dataloader(self):
        rows = torch.randint(0, 64, (64, 17), generator=torch.Generator().manual_seed(0))
        return DataLoader([{"tokens": row[:-1], "targets": row[1:]} for row in rows], batch_size=4)


def trainer(**kwargs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return Trainer(**{"accelerator": "cpu", "enable_model_summary": False, **quiet, **kwargs})


def make_model():
    torch.manual_seed(0)
    return MoELanguageModel(vocab_size=64, context_length=32, width=64, n_heads=4, depth=1, n_experts=2)


@pytest.mark.parametrize(
    ("settings", "replicas"),
    [
        ({}, 1),
        ({"accumulate_grad_batches": 3}, 3),
        ({"devices": 2, "strategy": DDPStrategy()}, 2),
        ({"devices": 4, "num_nodes": 2, "strategy": DDPStrategy()}, 8),
        ({"devices": 4, "strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=2)}, 2),
        ({"devices": 4, "strategy": ModelParallelStrategy()}, 1),  # its default: all of a node for tensor parallelism
    ],
)
def test_batch_counts_accumulation_and_replicas(settings, replicas):
    """On a trainer that is not set up, as `explain` has it."""
    run = infer_run(trainer(max_steps=10, **settings), MODULE, Data(batch_size=4, context_length=16))
    assert run == (10 * 4 * 16 * replicas, 4 * 16 * replicas)


@pytest.mark.parametrize("length", ["context_length", "sequence_length", "seq_len", "block_size", "max_length"])
def test_names_of_the_sequence_length(length):
    assert infer_run(trainer(max_steps=1), MODULE, Data(batch_size=4, **{length: 8}))[1] == 32


def test_where_sizes_are_looked_for():
    # The datamodule's length comes before the model's, which is only the longest that it can take.
    module = LightningModule()
    module.save_hyperparameters({"context_length": 99, "batch_size": 7})
    assert infer_run(trainer(max_steps=1), module, Data(batch_size=4, context_length=16))[1] == 64
    assert infer_run(trainer(max_steps=1), module, Data(batch_size=4))[1] == 4 * 99
    assert infer_run(trainer(max_steps=1), module, None)[1] == 7 * 99
    assert infer_run(trainer(max_steps=1), MODULE, Data(tokens_per_batch=1000, batch_size=4))[1] == 1000
    assert infer_run(trainer(max_steps=1), MODULE, Data(batch_size=4)) == (None, None)
    assert infer_run(None, MODULE, Data(batch_size=4, context_length=16)) == (None, None)


def test_epochs_count_where_the_data_is_loaded():
    data = Data(batch_size=4, context_length=16)
    assert infer_run(trainer(max_epochs=2), MODULE, data) == (None, 64)
    assert infer_run(trainer(max_epochs=2, max_steps=100), MODULE, data) == (None, 64)

    class Loads(MoELanguageModel):
        def configure_optimizers(self):
            steps.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    steps = []
    callback = MuECallback(base={**BASE, "tokens": 1024.0}, verbose=False)
    model = Loads(vocab_size=64, context_length=32, width=64, n_heads=4, depth=1, n_experts=2)
    trainer(max_epochs=2, callbacks=[callback], accumulate_grad_batches=2).fit(model, data)
    assert steps == [16]
    assert callback.plan.axes["tokens"] == 16 * 2 * 64


@pytest.mark.parametrize("limit", [{"max_steps": 6}, {"fast_dev_run": 2}])
def test_a_fit_takes_them(limit):
    callback = MuECallback(base={**BASE, "tokens": 128.0, "batch_tokens": 32.0}, verbose=False)
    trainer(callbacks=[callback], **limit).fit(make_model(), Data(batch_size=4, context_length=16))
    assert callback.plan.axes["batch_tokens"] == 64
    # A trial of the code is not the run's length.
    assert callback.plan.axes["tokens"] == (6 * 64 if "max_steps" in limit else 128)
    if "max_steps" in limit:
        ratio = (64 / 32) / (6 * 64 / 128)
        assert callback.plan["transformer.embedding.weight"].lr == pytest.approx(ratio**0.5)


def test_given_values_win():
    callback = MuECallback(base={**BASE, "tokens": 1e6, "batch_tokens": 1e3}, tokens=4e6, batch_tokens=2e3)
    plan = callback.make_plan(make_model(), [], trainer(max_steps=3), Data(batch_size=4, context_length=16))
    assert (plan.axes["tokens"], plan.axes["batch_tokens"]) == (4e6, 2e3)


def test_a_given_batch_counts_in_the_length():
    callback = MuECallback(base={**BASE, "tokens": 1e4, "batch_tokens": 100}, batch_tokens=500)
    plan = callback.make_plan(make_model(), [], trainer(max_steps=7), None)
    assert plan.axes["tokens"] == 3500


def test_explain_shows_them():
    callback = MuECallback(base={**BASE, "tokens": 1e4, "batch_tokens": 32})
    plan = callback.make_plan(make_model(), [], trainer(max_steps=100), Data(batch_size=4, context_length=16))
    assert "tokens 10000 -> 6400" in str(plan)
    assert "batch_tokens 32 -> 64" in str(plan)


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        (
            Data(batch_size=4),
            {"max_steps": 3},
            r"batch_tokens: base\.batch_tokens is given.*sequence length.*Data or Namespace",
        ),
        (Data(context_length=4), {"max_steps": 3}, r"no batch_size and no tokens_per_batch"),
        (Data(batch_size=4, context_length=4), {"max_epochs": 3}, r"tokens: .*max_epochs=3.*set max_steps"),
        (Data(batch_size=4, context_length=4), {"max_epochs": -1}, r"tokens: .*neither max_steps nor max_epochs"),
    ],
)
def test_what_cannot_be_told_is_asked_for(data, settings, message):
    class Namespace(torch.nn.Linear):
        pass

    callback = MuECallback(base={"tokens": 10.0, "batch_tokens": 10.0})
    with pytest.raises(ValueError, match=message):
        callback.make_plan(Namespace(3, 3), [], trainer(**settings), data)


def test_without_a_base_value_nothing_is_inferred():
    plan = MuECallback(base=BASE).make_plan(
        make_model(), [], trainer(max_steps=3), Data(batch_size=4, context_length=16)
    )
    assert "tokens" not in plan.axes
    assert "batch_tokens" not in plan.axes


def test_validation_alone_needs_no_run_sizes():
    model = make_model()
    callback = MuECallback(base={**BASE, "tokens": 10.0}, verbose=False)
    trainer(callbacks=[callback]).validate(model, Data().train_dataloader(), verbose=False)
    assert model.transformer.blocks[0].ffn.route_scale == 2.0


def test_what_a_base_holds(tmp_path):
    assert known_to(None) == {}
    assert known_to(torch.nn.Linear(2, 2)) == {}
    assert known_to({"width": 3, "tokens": 5.0}) == {"tokens": 5.0}
    from lightning_mue.parameterizations.record import save_base

    save_base(make_model(), tmp_path / "base.yaml", base={**BASE, "batch_tokens": 7.0})
    assert known_to(str(tmp_path / "base.yaml")) == {"batch_tokens": 7.0}
