"""Bad arguments, strategies and optimizers are refused by name before step 0."""

from __future__ import annotations

import pytest
import torch
from helpers.guarded import Regression, batches, train, trainer
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy

from lightning_mue import StabilityGuard
from lightning_mue.callbacks.guard import serving

BAD = {
    "nonfinite": [None, "ignore", 1],
    "spike": ["abort", True],
    "drift": ["skip", "no"],
    "threshold": ["skip", None],
    "thresholds": [{"a": "high"}, {"a": [1]}, {"a": [None, None]}, {"a": [2, 1]}, {"a": float("nan")}, {"(": 1.0}, 5],
    "drifts": ["loss", [1], ["("]],
    "spike_score": [0, "10", float("nan")],
    "drift_sum": [0.5, None],
    "window": [4, 10.5],
    "min_history": [2, 200],
    "max_skips_in_row": [0],
    "lr_factor": [0, 1, 2],
    "cool_down": [0, 1.5],
    "every_n_steps": [0],
    "max_rollbacks": [0],
    "keep": ["gpu"],
    "sample_ids": [3],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values], ids=str)
def test_bad_arguments_are_named(key, value):
    with pytest.raises((TypeError, ValueError), match=rf"^{key}.*: found .*expected "):
        StabilityGuard(**{key: value})


def test_two_guards_are_refused():
    """Lightning refuses two of one class when it makes the Trainer."""

    class Another(StabilityGuard):
        pass

    with pytest.raises(RuntimeError, match="more than one stateful callback of type `StabilityGuard`"):
        trainer([StabilityGuard(), StabilityGuard(spike=None)])
    with pytest.raises(ValueError, match=r"trainer\.callbacks: found 2 StabilityGuards, expected one"):
        trainer([StabilityGuard(), Another(spike=None)]).fit(Regression(), batches(2))


class DeepSpeedStrategy(SingleDeviceStrategy):
    """Stands for Lightning's, which needs its package; recognized by name and module."""


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_it_cannot_serve_is_refused(strategy):
    made = trainer()
    DeepSpeedStrategy.__module__ = "lightning.pytorch.strategies.deepspeed"
    made.strategy.__class__ = strategy
    with pytest.raises(ValueError, match=f"strategy: found {strategy.__name__}.* expected one device, DDP or FSDP2"):
        serving.refuse(made, StabilityGuard())


def test_an_optimizer_of_several_evaluations_is_refused_before_step_0():
    model = Regression(optimizer=torch.optim.LBFGS)
    with pytest.raises(ValueError, match="optimizer: found LBFGS"):
        train(model, StabilityGuard(), batches(2))
    assert not model.losses


def test_one_that_shows_it_only_in_its_step_is_refused_then():
    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    with pytest.raises(RuntimeError, match="optimizer: found Twice, whose step evaluates the closure more than once"):
        train(Regression(optimizer=Twice), StabilityGuard(), batches(2))


def test_the_optimizer_gets_its_step_back_when_a_batch_raises():
    class Fails(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            raise RuntimeError("stop here")

    model = Regression()
    made = trainer([StabilityGuard(), Fails()])
    with pytest.raises(RuntimeError, match="stop here"):
        made.fit(model, batches(2))
    assert "step" not in vars(made.optimizers[0])
