from __future__ import annotations

import copy
import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_mue.callbacks import RouterMonitor
from lightning_mue.moe import (
    GlobalBatchBalance,
    LossFreeBalance,
    MoELayer,
    Router,
    router_z_loss,
    switch_loss,
    update_balance_bias,
)


def test_switch_loss_is_one_when_uniform_and_top_k_does_not_matter():
    for top_k in (1, 2, 4):
        counts = torch.full((4,), 10 * top_k)
        assert switch_loss(torch.zeros(40, 4), counts, top_k).item() == pytest.approx(1)


def test_switch_loss_is_e_when_collapsed():
    logits = torch.tensor([[50.0, 0, 0, 0]]).expand(10, 4)
    assert switch_loss(logits, torch.tensor([10, 0, 0, 0]), 1).item() == pytest.approx(4)


def test_switch_loss_against_its_definition():
    logits, ids = torch.randn(30, 5, requires_grad=True), torch.randint(5, (30, 2))
    counts = torch.bincount(ids.flatten(), minlength=5)
    exact = logits.detach().double().requires_grad_()
    expected = sum(5 * counts[i] / 60 * exact.softmax(-1)[:, i].mean() for i in range(5))
    loss = switch_loss(logits, counts, 2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    found, wanted = torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, exact)[0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-8)


def test_z_loss_against_its_definition():
    logits = torch.randn(30, 5)
    expected = (logits.double().exp().sum(-1).log() ** 2).mean()
    assert router_z_loss(logits).item() == pytest.approx(expected.item(), rel=1e-6)


def test_no_tokens_give_zero_with_a_graph():
    logits = torch.zeros(0, 4, requires_grad=True)
    loss = switch_loss(logits, torch.zeros(4, dtype=torch.int64), 2) + router_z_loss(logits)
    assert loss == 0
    assert torch.autograd.grad(loss, logits)[0].shape == (0, 4)


def test_bias_update_is_the_published_rule():
    bias = torch.tensor([0.5, 0.0, 0.0, 0.0])
    update_balance_bias(bias, torch.tensor([10, 6, 4, 0]), top_k=2, rate=0.1)  # ten tokens
    torch.testing.assert_close(bias, torch.tensor([0.5 - 0.1 * 0.5, -0.1 * 0.1, 0.1 * 0.1, 0.1 * 0.5]))


def test_bias_update_by_sign():
    bias = torch.tensor([0.5, 0.0, 0.0, 0.0])
    update_balance_bias(bias, torch.tensor([10, 5, 5, 0]), top_k=2, rate=0.1, form="sign")
    torch.testing.assert_close(bias, torch.tensor([0.4, 0.0, 0.0, 0.1]))


@pytest.mark.parametrize("form", ["proportional", "sign"])
def test_bias_update_without_tokens_does_nothing(form):
    bias = torch.tensor([0.5, -0.5])
    update_balance_bias(bias, torch.tensor([0, 0]), top_k=1, rate=0.1, form=form)
    assert bias.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("scoring", ["topk-softmax", "sigmoid"])
def test_bias_updates_move_the_load_towards_balance(scoring):
    router, x = Router(16, 8, 2, scoring=scoring, init_std=0.3), torch.randn(512, 16) + 0.5

    def violation():
        load = router(x).counts / x.shape[0]
        return (load.max() / load.mean() - 1).item()

    before = violation()
    for _ in range(300):
        update_balance_bias(router.balance_bias, router(x).counts, 2, rate=0.02)
    assert before > 0.5
    assert violation() < 0.1


class TwoLayers(LightningModule):
    """Holds a balanced layer, one that only odd micro-batches reach, and one that is not balanced by bias."""

    def __init__(self):
        super().__init__()
        make = {"balance": "bias", "router_init_std": 1.0, "bias_update_rate": 0.1}
        self.layers = nn.ModuleList([MoELayer(8, 4, 4, 2, **make), MoELayer(8, 4, 6, 1, **make), MoELayer(8, 4, 4)])
        self.counts = []

    def training_step(self, batch, batch_idx):
        x = batch[0]
        used = [self.layers[0], self.layers[2]] + ([self.layers[1]] if batch_idx % 2 else [])
        loss = sum(layer(x).square().mean() for layer in used)
        self.counts.append([layer.last_routing.counts if layer in used else None for layer in self.layers])
        return loss

    def validation_step(self, batch, batch_idx):
        for layer in self.layers:
            layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class CountingStrategy(SingleDeviceStrategy):
    """Pretends that a second rank saw exactly the same tokens, and records each collective."""

    def __init__(self):
        super().__init__(device="cpu")
        self.reduced = []

    def reduce(self, tensor, *args, reduce_op=None, **kwargs):
        assert reduce_op == "sum"
        if tensor.ndim == 0:  # the number of validation batches, which Lightning itself sums
            return tensor
        self.reduced.append(tensor.clone())
        return 2 * tensor


def fit(model, tmp_path, callback, strategy="auto", **settings):
    batches = DataLoader(TensorDataset(torch.randn(48, 8)), batch_size=8)  # six micro-batches
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        strategy=strategy,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callback,
        max_epochs=1,
        **settings,
    )
    trainer.fit(model, batches, batches)
    return trainer


@pytest.mark.parametrize("accumulate", [1, 2])
def test_one_update_and_one_collective_an_optimizer_step(tmp_path, accumulate):
    model, strategy = TwoLayers(), CountingStrategy()
    fit(model, tmp_path, LossFreeBalance(), strategy, accumulate_grad_batches=accumulate, val_check_interval=2)
    assert len(strategy.reduced) == 6 // accumulate
    for index, (n_experts, top_k) in enumerate([(4, 2), (6, 1)]):
        # The second rank doubles counts and tokens alike: the fractions stay.
        bias = torch.zeros(n_experts)
        for step in range(0, 6, accumulate):
            counts = [c[index] for c in model.counts[step : step + accumulate] if c[index] is not None]
            update_balance_bias(bias, sum(counts, torch.zeros(n_experts, dtype=torch.int64)), top_k, 0.1)
        torch.testing.assert_close(model.layers[index].router.balance_bias, bias)
        assert bias.any()
    assert not model.layers[2].router.balance_bias.any()


def test_a_layer_alone_brings_the_callback(tmp_path):
    layer = MoELayer(8, 4, 4, balance="bias")
    assert [type(c) for c in layer.configure_callbacks()] == [LossFreeBalance]
    assert MoELayer(8, 4, 4).configure_callbacks() == []
    assert [type(c) for c in MoELayer(8, 4, 4, balance_scope="global").configure_callbacks()] == [GlobalBatchBalance]


def test_a_balance_without_its_callback_is_warned_of(tmp_path):
    class Both(TwoLayers):
        def __init__(self):
            super().__init__()
            self.layers.append(MoELayer(8, 4, 4, balance_scope="global"))

    def found(*callbacks, **settings):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit(Both(), tmp_path, [RouterMonitor(), *callbacks], **settings)
        return [str(w.message).split(": without")[0] for w in caught if "trainer.callbacks" in str(w.message)]

    names = ("LossFreeBalance", "GlobalBatchBalance")
    loss_free, whole_step = (f"trainer.callbacks: found no {name}, expected one" for name in names)
    assert found() == [loss_free]
    assert found(accumulate_grad_batches=2) == [loss_free, whole_step]
    assert found(LossFreeBalance(), accumulate_grad_batches=2) == [whole_step]
    assert found(LossFreeBalance(), GlobalBatchBalance(), accumulate_grad_batches=2) == []


def test_pending_counts_of_an_earlier_version_survive(tmp_path):
    """They were in the callback's state, and the model's state dict did not name them."""
    model, callback = TwoLayers(), LossFreeBalance()
    callback.load_state_dict({"pending": {"layers.1": torch.tensor([8, 0, 0, 0, 0, 0])}})
    fit(
        model, tmp_path, callback, limit_train_batches=1, limit_val_batches=0
    )  # layer 1 does not run in the first batch
    expected = torch.zeros(6)
    update_balance_bias(expected, torch.tensor([8, 0, 0, 0, 0, 0]), 1, 0.1)
    torch.testing.assert_close(model.layers[1].router.balance_bias, expected)


class Saver(Callback):
    """A user's own, which runs before LossFreeBalance: saves the weights after every micro-batch."""

    def __init__(self):
        self.states = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.states.append(copy.deepcopy(pl_module.state_dict()))


@pytest.mark.parametrize("saved_after", [1, 2, 3])
def test_a_run_resumed_from_a_plain_state_dict_has_the_same_bias(tmp_path, saved_after):
    """Saved in the middle of an accumulation or at its end: bit for bit that of the run that was not interrupted."""

    def run(model, batches, *callbacks):
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            accumulate_grad_batches=2,
            callbacks=[*callbacks, LossFreeBalance()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, DataLoader(batches, batch_size=None))

    batches, saver = list(torch.randn(6, 1, 16, 8)), Saver()
    whole = TwoLayers()
    run(whole, batches, saver)
    resumed, state = TwoLayers(), saver.states[saved_after - 1]
    assert any("pending_counts" in name for name in state) == (saved_after % 2 == 1)
    resumed.load_state_dict(state)
    if saved_after % 2:  # the other half of the window alone: Lightning steps on a loader's last batch
        run(resumed, [batches[saved_after]])
    else:
        run(resumed, batches[saved_after : saved_after + 2])
    expected = saver.states[saved_after + saved_after % 2 + 1 - 2 * (saved_after % 2)]
    bias = "layers.0.router.balance_bias"
    assert torch.equal(resumed.state_dict()[bias], expected[bias])
    assert expected[bias].any()


class Recorder(LightningModule):
    """Two micro-batches an optimizer step; keeps what the layer's loss was, and what it should have been."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.found, self.expected, self.seen = layer, [], [], None

    def training_step(self, batch, batch_idx):
        (x,) = batch
        y = self.layer(x)
        logits = (x @ self.layer.router.weight.T).detach()
        counts = torch.bincount(logits.topk(2).indices.flatten(), minlength=6)
        self.seen = counts if batch_idx % 2 == 0 else self.seen + counts
        self.expected.append(6 * (self.seen / self.seen.sum() * logits.softmax(-1).mean(0)).sum().item())
        self.found.append(self.layer.aux_loss.item())
        return y.sum() + self.layer.aux_loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("with_callback", [True, False])
def test_the_global_load_adds_up_over_micro_batches(with_callback):
    model = Recorder(MoELayer(8, 4, 6, 2, balance_scope="global", aux_loss_coef=1.0, router_init_std=1.0))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        callbacks=[GlobalBatchBalance()] if with_callback else [],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(24, 8)), batch_size=4))
    assert model.layer.earlier_counts is None
    if with_callback:
        assert model.found == pytest.approx(model.expected, rel=1e-5)
    else:  # negative control: the second micro-batch of a step then sees its own load
        assert model.found[0::2] == pytest.approx(model.expected[0::2], rel=1e-5)
        assert model.found[1::2] != pytest.approx(model.expected[1::2], rel=1e-3)
