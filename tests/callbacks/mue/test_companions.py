"""MuECallback beside Lightning's own callbacks that copy weights or train before the fit, and with torch.compile."""

from __future__ import annotations

import pytest
import pytorch_optimizer as po
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader

from lightning_mue import MuECallback

BASE = {"width": 16}


class Net(LightningModule):
    """Exposes a multiplier, to see that it is right in averaged and compiled models too."""

    mue_multipliers = {"ffn": "gain"}  # noqa: RUF012

    def __init__(self, width=64, lr=0.01, compiled=False):
        super().__init__()
        self.save_hyperparameters()
        self.lr, self.batch_size, self.gain = lr, 8, 1.0
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 4)
        self.up.mue_roles, self.down.mue_roles = {"weight": "ffn_up"}, {"weight": "ffn_down"}
        if compiled:
            self.up = torch.compile(self.up, backend="eager")

    def mue_axes(self):
        return {"width": 16, "ffn_width": self.hparams.width}

    def forward(self, x):
        return self.gain * self.down(self.up(x).relu())

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.validated = weights(self)
        self.log("val/loss", self.training_step(batch, batch_idx))

    def train_dataloader(self):
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(list(zip(x, x[:, :4].argmax(1), strict=True)), batch_size=self.batch_size)

    val_dataloader = train_dataloader

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def weights(model):
    return {name.replace("_orig_mod.", ""): p.detach().clone() for name, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def make_trainer(callbacks, **kwargs):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = {"accelerator": "cpu", "enable_model_summary": False, "max_epochs": 2, **quiet, **kwargs}
    return Trainer(callbacks=callbacks, **settings)


def mue(**kwargs):
    return MuECallback(**{"rule": "complete-mue", "base": BASE, "verbose": False, **kwargs})


class Start(Callback):
    def on_train_start(self, trainer, pl_module):
        self.weights = weights(pl_module)


@pytest.mark.parametrize("first", [True, False], ids=["MuE first", "averaging first"])
@pytest.mark.parametrize("make", [WeightAveraging, lambda: EMAWeightAveraging(update_starting_at_step=10_000)])
def test_averages_start_from_the_drawn_weights(make, first):
    """The average is copied in setup, before the draw; validation swaps it in before the first update too."""
    model, averaging, start = Net(), make(), Start()
    before = weights(model)
    callbacks = [mue(), averaging, start] if first else [averaging, mue(), start]
    trainer = make_trainer(callbacks, max_steps=3, val_check_interval=1, num_sanity_val_steps=1)
    seen = []

    class Watch(Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            seen.append(pl_module.validated)

    trainer.callbacks.append(Watch())
    trainer.fit(model)
    assert equal(seen[0], start.weights)
    assert not equal(before, start.weights)
    assert model.gain == pytest.approx(1 / 4)
    if isinstance(averaging, EMAWeightAveraging):  # never updated: what it leaves behind is what it started from
        assert equal(weights(model), start.weights)
    else:
        assert not equal(weights(model), start.weights)


def test_average_of_a_run_is_the_mean_of_its_weights():
    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(weights(pl_module))

    seen, model = [], Net()
    make_trainer([mue(), WeightAveraging(), Watch()], max_steps=5, limit_val_batches=0).fit(model)
    for name, p in weights(model).items():
        mean = torch.stack([w[name] for w in seen]).mean(0)
        torch.testing.assert_close(p, mean, rtol=1e-5, atol=1e-6)


def test_stochastic_weight_averaging():
    model, start, swa = Net(), Start(), StochasticWeightAveraging(swa_lrs=0.004, swa_epoch_start=2, annealing_epochs=1)
    callback, copies = mue(), []

    class Watch(Callback):
        def on_fit_start(self, trainer, pl_module):
            copies.append(weights(swa._average_model))

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.lr = optimizer.param_groups[0]["lr"]

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rates.append((self.lr, callback.effective_rates()))

    rates = []
    trainer = make_trainer([callback, swa, Watch(), start], max_epochs=4, limit_val_batches=0)
    trainer.fit(model)
    assert equal(copies[0], start.weights)
    assert not equal(weights(model), start.weights)
    assert model.gain == pytest.approx(1 / 4)
    factor = callback.plan["down.weight"].lr
    assert {lr for lr, _ in rates} >= {0.01, 0.004}
    assert all(rate["mue/lr/ffn_down"] == pytest.approx(lr * factor, rel=1e-12) for lr, rate in rates)


@pytest.mark.parametrize("first", [True, False], ids=["MuE first", "finder first"])
@pytest.mark.parametrize(
    "make", [lambda: LearningRateFinder(num_training_steps=5), lambda: BatchSizeFinder(max_trials=1)]
)
def test_tuner_callbacks_are_warned_of_and_survived(make, first):
    """Their own checkpoint, which holds no plan, is not taken for a run to resume."""
    callback, start, finder = mue(), Start(), make()
    callbacks = [callback, finder, start] if first else [finder, callback, start]
    model = Net()
    before = weights(model)
    with pytest.warns(UserWarning, match="tuner callbacks train before the parameterization is applied"):
        make_trainer(callbacks, max_steps=60).fit(model)
    expected = Start()
    make_trainer([mue(), expected], max_steps=1).fit(Net())
    assert equal(start.weights, expected.weights)
    assert not equal(start.weights, before)
    assert len(callback.effective_rates()) == 0  # detached


def test_tuner_is_warned_of():
    trainer = make_trainer([mue()], max_steps=10)
    with pytest.warns(UserWarning, match="tuner callbacks"):
        Tuner(trainer).lr_find(Net(), num_training=5)


@pytest.mark.parametrize("how", ["submodule", "module.compile()"])
def test_compiled_modules_are_the_same_to_the_plan(how):
    plain, plain_start = Net(), Start()
    torch.manual_seed(0)
    make_trainer([mue(), plain_start], max_steps=3, limit_val_batches=0).fit(plain)
    model, start, callback = Net(compiled=how == "submodule"), Start(), mue()
    if how == "module.compile()":
        model.compile(backend="eager")
    make_trainer([callback, start], max_steps=3, limit_val_batches=0).fit(model)
    assert equal(start.weights, plain_start.weights)
    assert model.gain == plain.gain == pytest.approx(1 / 4)
    for name, p in weights(model).items():
        torch.testing.assert_close(p, weights(plain)[name], rtol=1e-6, atol=1e-7)
    assert "_orig_mod" not in str([entry.name for entry in callback.plan.parameters])


def test_a_compiled_lightning_module_is_warned_of():
    model, callback = Net(), mue()
    with pytest.warns(UserWarning, match=r"given to torch\.compile.*module\.compile\(\)"):
        make_trainer([callback], max_steps=2, limit_val_batches=0).fit(torch.compile(model, backend="eager"))
    assert model.gain == pytest.approx(1 / 4)
    assert "_orig_mod" not in str([entry.name for entry in callback.plan.parameters])


def test_a_multiplier_set_after_compilation_counts():
    """A compiled graph holds the multiplier as a constant, with a guard."""
    model = Net()
    model.compile(backend="eager")
    x = torch.ones(2, 8)
    model(x)
    make_trainer([mue()], max_steps=1, limit_val_batches=0).fit(model)
    assert model.gain == pytest.approx(1 / 4)
    torch.testing.assert_close(model(x), 0.25 * model.down(model.up(x).relu()))


def test_resume_with_an_average_is_exact(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole = Net()
    settings = {"max_epochs": -1, "max_steps": 16, "limit_val_batches": 0}
    make_trainer([mue(), EMAWeightAveraging(decay=0.5), Stop()], **settings).fit(whole)
    torch.load(tmp_path / "middle.ckpt", weights_only=True)
    resumed = Net()
    make_trainer([mue(), EMAWeightAveraging(decay=0.5)], **settings).fit(resumed, ckpt_path=tmp_path / "middle.ckpt")
    assert equal(weights(whole), weights(resumed))


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy, type("FSDPStrategy", (Strategy,), {})])
def test_flattening_strategies_are_refused(strategy):
    """By name too: pytorch_lightning has classes of its own."""
    trainer = make_trainer([mue()], max_steps=1)
    trainer.strategy.__class__ = type("FSDP", (strategy,), {})
    with pytest.raises(ValueError, match=r"strategy: found FSDP, which flattens.*ModelParallelStrategy"):
        mue().setup(trainer, Net(), "fit")


class ListedSlow(torch.optim.AdamW):
    """Keeps slow weights in a list of its own, as several public Lookaheads do."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in self.param_groups]


@pytest.mark.parametrize("make", [lambda p: po.Lookahead(torch.optim.AdamW(p)), ListedSlow], ids=["Lookahead", "list"])
def test_slow_weights_start_from_what_is_drawn(make):
    seen = {}

    class Sees(Callback):
        def on_train_start(self, trainer, pl_module):
            (optimizer,) = trainer.optimizers
            parameters = list(pl_module.parameters())
            slow = optimizer.slow[0] if isinstance(optimizer, ListedSlow) else None
            seen["slow"] = slow or [optimizer.state[p]["slow_params"].clone() for p in parameters]
            seen["weights"] = [p.detach().clone() for p in parameters]

    class Slow(Net):
        def configure_optimizers(self):
            return make(list(self.parameters()))

    net = Slow()
    old = weights(net)
    make_trainer([mue(), Sees()], max_steps=1).fit(net)
    assert any(not torch.equal(a, b) for a, b in zip(old.values(), seen["weights"], strict=True))
    assert all(map(torch.equal, seen["slow"], seen["weights"]))


def test_the_radius_of_sam_is_told():
    class Sharp(Net):
        automatic_optimization = False

        def configure_optimizers(self):
            return po.SAM(self.parameters(), base_optimizer=torch.optim.AdamW, lr=0.01, rho=0.05)

    with pytest.warns(UserWarning, match=r"SAM's rho=0.05 is not scaled"):
        make_trainer([mue()], max_steps=1, limit_train_batches=0).fit(Sharp())
