"""Run sizes in tokens, inferred from trainer, datamodule and module."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from lightning_mue import MoELanguageModel, MuECallback
from lightning_mue.callbacks.mue.run import infer_batch_tokens, known_to, run_sizes, steps

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
    run = trainer(max_steps=10, **settings), MODULE, Data(batch_size=4, context_length=16)
    assert infer_batch_tokens(*run) == 4 * 16 * replicas
    known = {"tokens": 1.0, "batch_tokens": 1.0}
    assert run_sizes(known, {}, *run) == {"tokens": 10 * 4 * 16 * replicas, "batch_tokens": 4 * 16 * replicas}


@pytest.mark.parametrize("length", ["context_length", "sequence_length", "seq_len", "block_size", "max_length"])
def test_names_of_the_sequence_length(length):
    assert infer_batch_tokens(trainer(max_steps=1), MODULE, Data(batch_size=4, **{length: 8})) == 32


def test_where_sizes_are_looked_for():
    # The datamodule's length comes before the model's, which is only the longest that it can take.
    module = LightningModule()
    module.save_hyperparameters({"context_length": 99, "batch_size": 7})
    assert infer_batch_tokens(trainer(max_steps=1), module, Data(batch_size=4, context_length=16)) == 64
    assert infer_batch_tokens(trainer(max_steps=1), module, Data(batch_size=4)) == 4 * 99
    assert infer_batch_tokens(trainer(max_steps=1), module, None) == 7 * 99
    assert infer_batch_tokens(trainer(max_steps=1), MODULE, Data(tokens_per_batch=1000, batch_size=4)) == 1000
    with pytest.raises(LookupError, match="datamodule: found no sequence length"):
        infer_batch_tokens(trainer(max_steps=1), MODULE, Data(batch_size=4))
    with pytest.raises(LookupError, match="trainer: found no trainer"):
        infer_batch_tokens(None, MODULE, Data(batch_size=4, context_length=16))


def test_epochs_count_where_the_data_is_loaded():
    data = Data(batch_size=4, context_length=16)
    for unknown in (trainer(max_epochs=2), trainer(max_epochs=2, max_steps=100)):
        assert infer_batch_tokens(unknown, MODULE, data) == 64
        with pytest.raises(LookupError, match="max_steps: found max_epochs=2"):
            steps(unknown)

    class Loads(MoELanguageModel):
        def configure_optimizers(self):
            counted.append(self.trainer.estimated_stepping_batches)
            return super().configure_optimizers()

    counted = []
    callback = MuECallback(base={**BASE, "tokens": 1024.0}, verbose=False)
    model = Loads(vocab_size=64, context_length=32, width=64, n_heads=4, depth=1, n_experts=2)
    trainer(max_epochs=2, callbacks=[callback], accumulate_grad_batches=2).fit(model, data)
    assert counted == [16]
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


class Several(LightningModule):
    """Steps some AdamWs in every batch, by hand."""

    batch_size, context_length = 4, 16

    def __init__(self, width=16, optimizers=2):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.net = torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.ReLU(), torch.nn.Linear(width, 1))
        self.batches = 0

    def training_step(self, batch, batch_idx):
        self.batches += 1
        optimizers = self.optimizers(use_pl_optimizer=True)
        self.manual_backward(self.net(batch["tokens"].float()).mean())
        for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
            optimizer.step()

    def configure_optimizers(self):
        parameters, n = list(self.parameters()), self.hparams.optimizers
        return [torch.optim.AdamW(parameters[i::n]) for i in range(n)]


@pytest.mark.parametrize(
    ("optimizers", "limit", "batches"),
    [
        (1, {"max_steps": 12}, 12),
        (2, {"max_steps": 12}, 6),
        (3, {"max_steps": 13}, 5),
        (2, {"max_epochs": 1}, 16),
        (2, {"max_epochs": 1, "max_steps": 30}, 15),
        (2, {"max_epochs": 1, "max_steps": 100}, 16),
    ],
)
def test_several_optimizers_count_as_one(optimizers, limit, batches):
    """Lightning's global_step counts each of them; `batches` of the run itself are what the plan has to say."""

    class Loads(Several):
        def configure_optimizers(self):
            self.trainer.estimated_stepping_batches  # noqa: B018  loads the data, so that the length of an epoch is known
            return super().configure_optimizers()

    model, callback = Loads(optimizers=optimizers), MuECallback(base={"width": 8, "tokens": 64.0}, verbose=False)
    run = trainer(callbacks=[callback], **limit)
    run.fit(model, Data().train_dataloader())
    assert model.batches == batches
    assert callback.plan.axes["tokens"] == batches * 4 * 16
    assert steps(run) == batches


def test_explain_counts_the_optimizers_that_it_is_given():
    model, callback = Several(), MuECallback(base={"width": 8, "tokens": 64.0})
    plan = callback.make_plan(model, model.configure_optimizers(), trainer(max_steps=12), None)
    assert plan.axes["tokens"] == 6 * 64


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
            r"base\.batch_tokens: found 10, while .* not given.*no sequence length.*Data or Namespace",
        ),
        (Data(context_length=4), {"max_steps": 3}, r"no batch_size and no tokens_per_batch"),
        (
            Data(batch_size=4, context_length=4),
            {"max_epochs": 3},
            r"base\.tokens: found 10.*max_steps: found max_epochs=3.*Set max_steps",
        ),
        (
            Data(batch_size=4, context_length=4),
            {"max_epochs": -1},
            r"base\.tokens: found 10.*neither max_steps nor max_epochs",
        ),
    ],
)
def test_what_cannot_be_inferred_is_asked_for(data, settings, message):
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
    from lightning_mue.parameterizations.reading.base import save_base

    save_base(make_model(), tmp_path / "base.yaml", base={**BASE, "batch_tokens": 7.0})
    assert known_to(str(tmp_path / "base.yaml")) == {"batch_tokens": 7.0}
