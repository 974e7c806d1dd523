"""StabilityGuard in one process: what is not finite is not stepped with, and leaves no trace."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from helpers.guarded import Fault, Regression, batches, furthest, train, weights
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_mue import HyperSphereOptimizer, StabilityGuard


def pair(fault, *, make=Regression, guard=None, accumulate=1, without=None, **options):
    """Weights and guard of a guarded run with a fault, and weights of a run that never saw the spoilt batches."""
    guard = guard or StabilityGuard()
    model, other = make(fault), make(None)
    data = partial(batches, 6 * accumulate)
    train(model, guard, data(), accumulate_grad_batches=accumulate, **options)
    if without is None:
        without = {n // accumulate * accumulate + i for n in fault.batches for i in range(accumulate)}
    train(other, None, data(without=without), accumulate_grad_batches=accumulate, **options)
    return weights(model), guard, weights(other), model, other


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skips_exactly_one_step(where, value, clip, accumulate):
    fault = Fault(where, value, (3 * accumulate,))
    found, guard, expected, *_ = pair(fault, accumulate=accumulate, gradient_clip_val=clip)
    assert guard.skipped_steps == 1
    assert [(d["step"], d["kind"]) for d in guard.decisions] == [(3, "nonfinite")]
    assert furthest(found, expected) == 0


def test_without_the_guard_the_weights_are_lost():
    """The control."""
    model = Regression(Fault("gradient", math.nan, (3,)))
    train(model, data=batches(6))
    assert not all(bool(w.isfinite().all()) for w in weights(model).values())


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, and moves weights without a gradient, as some public optimizers do."""

    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                p.data.mul_(0.99)
        super().step()
        return loss


OPTIMIZERS = {
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "fused": partial(torch.optim.AdamW, fused=True),
    "counting": Counting,
    "hypersphere": lambda params, lr: HyperSphereOptimizer(
        [("net.w", p) for p in params], lr=lr, compute_dtype="float32"
    ),
}


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_is_left_as_it_was(name, on_device):
    """Its state as well; at the first step, too, when there is none."""
    guard = StabilityGuard()
    guard.decides_on_device_everywhere = on_device
    make = partial(Regression, optimizer=OPTIMIZERS[name])
    found, guard, expected, model, other = pair(Fault("gradient", math.nan, (0, 3)), make=make, guard=guard)
    assert guard.skipped_steps == 2
    assert furthest(found, expected) == 0
    ours, theirs = (m.trainer.optimizers[0] for m in (model, other))
    assert "step" not in vars(ours)  # its own step is back
    assert ours.param_groups[0].get("k") == theirs.param_groups[0].get("k")
    for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in b)


def test_running_statistics_are_put_back():
    class WithStatistics(Regression):
        def __init__(self, fault):
            super().__init__()
            self.net.insert(0, nn.BatchNorm1d(4))
            self.bad = fault is not None

        def loss(self, batch, number):
            x = batch["x"][0] * (math.nan if self.bad and number == 3 else 1.0)
            return (self.net(x) - batch["y"][0]).square().mean()

    _, guard, _, model, other = pair(Fault("loss", math.nan, (3,)), make=WithStatistics)
    assert guard.skipped_steps == 1
    assert int(model.net[0].num_batches_tracked) == 5
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


class Manual(Regression):
    """Two optimizers, of which one steps every batch and one every second; or the optimizer itself, without Lightning's hooks."""

    def __init__(self, fault, raw=False):
        super().__init__(fault)
        self.automatic_optimization, self.raw = False, raw

    def training_step(self, batch, batch_idx):
        number = int(batch["number"])
        first, second = self.optimizers(use_pl_optimizer=not self.raw)
        loss = self.loss(batch, number)
        loss.backward() if self.raw else self.manual_backward(loss)
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            second.step()
            second.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.AdamW(part.parameters(), lr=0.02) for part in (self.net[:2], self.net[2:])]


@pytest.mark.parametrize("raw", [False, True])
def test_manual_optimization(raw):
    """A NaN gradient in batch 2 spoils its step of the first optimizer, and of the second the one after batch 3."""
    model, guard = Manual(Fault("gradient", math.nan, (2,)), raw), StabilityGuard()
    train(model, guard, batches(6))
    assert guard.skipped_steps == len(guard.decisions) == 2
    assert all(bool(w.isfinite().all()) for w in weights(model).values())
    assert model.trainer.optimizers[0].state[model.net[0].weight]["step"] == 5
    assert model.trainer.optimizers[1].state[model.net[3].weight]["step"] == 2


def test_manual_accumulation():
    """A loss counts for the steps that follow it until the next backward pass; gradients count always."""
    model, guard = Manual(Fault("loss", math.nan, (2,))), StabilityGuard()
    train(model, guard, batches(6))
    assert guard.skipped_steps == 1
    assert all(bool(w.isfinite().all()) for w in weights(model).values())


def scaled(**options):
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], **options}, scaler


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_grad_scaler(where, fused):
    model = Regression(Fault(where, math.nan, (3,)), fused=fused)
    options, scaler = scaled()
    guard = StabilityGuard()
    train(model, guard, batches(6), **options)
    other = Regression(fused=fused)
    train(other, None, batches(6, without=(3,)), **scaled()[0])
    assert guard.skipped_steps == 1
    assert furthest(weights(model), weights(other)) < 1e-3  # the scale was halved: other roundings of float16
    assert scaler.get_scale() == 128.0
    # An overflow while the scale is not right yet is the scaler's business, and no finding.
    assert len(guard.decisions) == (1 if where == "loss" else 0)
    assert abs(guard._reader.last.values[0] - model.losses[-1]) < 1e-5  # the loss without the scale


def test_a_run_that_only_skips_is_ended(tmp_path):
    model = Regression(Fault("loss", math.nan, tuple(range(2, 40))))
    guard = StabilityGuard(max_skips_in_row=5, dirpath=tmp_path)
    trainer = train(model, guard, batches(40), min_steps=30)
    assert trainer.global_step == 8
    assert guard.decisions[-1]["kind"] == "skips"
    assert [path.name for path in tmp_path.iterdir()] == ["stop-step=7.ckpt"]
    torch.load(tmp_path / "stop-step=7.ckpt", weights_only=True)


def test_the_bias_of_a_balanced_layer_and_its_counts():
    from lightning_mue import MoELanguageModel

    def run(bad, data):
        torch.manual_seed(0)
        model = MoELanguageModel(
            vocab_size=11, context_length=8, width=16, depth=1, n_heads=2, n_experts=4, balance="bias"
        )
        step = model.training_step
        model.training_step = lambda batch, batch_idx: step(batch, batch_idx) * (math.nan if batch_idx == bad else 1.0)
        guard = StabilityGuard()
        train(model, guard, data)
        return model, guard

    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, 11, (2, 9), generator=generator) for _ in range(6)]
    made = [{"tokens": t[:, :-1], "targets": t[:, 1:]} for t in tokens]
    loader = partial(torch.utils.data.DataLoader, batch_size=None)
    model, guard = run(3, loader(made))
    other, _ = run(None, loader(made[:3] + made[4:]))
    assert guard.skipped_steps == 1
    biases = [m.moe_layers[0].router.balance_bias for m in (model, other)]
    assert torch.equal(*biases)
    assert biases[0].abs().max() > 0
