from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_mue.moe import FeedForward, MoELayer, router_z_loss, switch_loss
from lightning_mue.parameterizations.rules.roles import Role


def quiet_trainer(tmp_path, **settings):
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def regression_data(width, n=128, batch_size=32):
    x = torch.randn(n, width)
    return DataLoader(TensorDataset(x, torch.sin(2 * x).roll(1, dims=1)), batch_size=batch_size)


def fast_adam(params):
    return torch.optim.Adam(params, lr=1e-2)


class Losses(Callback):
    """Keeps train/loss of every batch."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, *args):
        self.values.append(trainer.callback_metrics["train/loss"].item())


@pytest.mark.parametrize("balance", ["none", "switch", "bias"])
def test_a_layer_alone_can_be_trained(tmp_path, balance):
    layer = MoELayer(8, 16, 4, shared_width=8, balance=balance, init_std=0.2, optimizer=fast_adam)
    losses = Losses()
    quiet_trainer(tmp_path, max_epochs=12, callbacks=[losses]).fit(layer, regression_data(8))
    assert sum(losses.values[-4:]) < 0.8 * sum(losses.values[:4])
    assert bool(layer.router.balance_bias.any()) == (balance == "bias")


def test_the_given_optimizer_is_used(tmp_path):
    layer = MoELayer(8, 16, 4, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    assert isinstance(layer.configure_optimizers(), torch.optim.SGD)
    assert "optimizer" not in layer.hparams
    assert layer.hparams["top_k"] == 2


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16_precisions_of_the_trainer(tmp_path, precision):
    layer = MoELayer(8, 16, 4, shared_width=8, balance="bias", bias_update_rate=1e-4, router_init_std=1.0)
    quiet_trainer(tmp_path, max_epochs=1, precision=precision).fit(layer, regression_data(8))
    assert all(p.isfinite().all() for p in layer.parameters())
    bias = layer.router.balance_bias
    assert bias.dtype == torch.float32
    assert not torch.equal(bias, bias.bfloat16().float())  # it was not rounded on the way


def test_activation_checkpointing_gives_the_same_gradients():
    layer, x = MoELayer(8, 16, 4, shared_width=8), torch.randn(20, 8, requires_grad=True)
    wanted = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    y = checkpoint(layer, x, use_reentrant=False)
    for found, expected in zip(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]), wanted, strict=True):
        torch.testing.assert_close(found, expected)


def test_nested_in_a_module_list_it_is_silent(tmp_path):
    class Model(LightningModule):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([MoELayer(8, 16, 4, z_loss_coef=0.1) for _ in range(2)])

        def training_step(self, batch, batch_idx):
            x, target = batch
            for block in self.blocks:
                x = x + block(x)
            loss = F.mse_loss(x, target) + sum(block.aux_loss for block in self.blocks)
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    trainer = quiet_trainer(tmp_path, max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", category=FutureWarning)  # Lightning's own use of torch
        trainer.fit(Model(), regression_data(8))
    assert set(trainer.callback_metrics) == {"train/loss"}


def test_aux_loss_is_the_sum_of_its_parts():
    layer = MoELayer(8, 16, 4, aux_loss_coef=0.3, z_loss_coef=0.7, router_init_std=1.0)
    layer(torch.randn(20, 8))
    logits, counts = layer.last_routing.logits, layer.last_routing.counts
    expected = 0.3 * switch_loss(logits, counts, 2) + 0.7 * router_z_loss(logits)
    torch.testing.assert_close(layer.aux_loss.detach(), expected)
    (grad,) = torch.autograd.grad(layer.aux_loss, layer.router.weight)
    assert grad.norm() > 0
    layer.eval()(torch.randn(20, 8))
    assert layer.aux_loss == 0


@pytest.mark.parametrize("balance", ["none", "bias"])
def test_no_switch_loss_unless_asked_for(balance):
    layer = MoELayer(8, 16, 4, balance=balance)
    layer(torch.randn(20, 8))
    assert layer.aux_loss == 0


def test_copies_after_a_forward_pass():
    layer = MoELayer(8, 16, 4, shared_width=8)
    x = torch.randn(6, 8)
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    for twin in copies:
        assert twin.last_routing is None
        assert twin.aux_loss == 0
        torch.testing.assert_close(twin(x), y)
    assert layer.last_routing is not None
    assert not any("last_routing" in key or "aux_loss" in key for key in layer.state_dict())
    assert layer.last_routing.gates.grad_fn is None


def test_multipliers_scale_the_output():
    layer = MoELayer(8, 16, 4, shared_width=8)
    x = torch.randn(6, 8)
    y, shared = layer(x), layer.shared(x)
    for name, attribute in layer.mue_multipliers.items():
        assert getattr(layer, attribute) == 1.0
        setattr(layer, attribute, 3.0)
        torch.testing.assert_close(layer(x), 3 * y if name == "ffn" else 3 * (y - shared) + shared)
        setattr(layer, attribute, 1.0)


def test_dense_moe_equals_a_dense_ffn():
    """One active expert with gate 1 is the dense FFN of the same weights (theory.md 4.6)."""
    layer, dense = MoELayer(8, 16, 1, 1), FeedForward(8, 16)
    dense.load_state_dict({name: w[0] for name, w in layer.experts.state_dict().items()})
    layer.output_multiplier = dense.output_multiplier = 0.5
    x = torch.randn(6, 8)
    torch.testing.assert_close(layer(x), dense(x))


def test_sqrt_gates_keep_the_output_rms_whatever_k():
    """Theory.md 5.3: E independent experts, all active; linear gates would shrink as K^-1/2."""
    rms = {}
    for gate in ("linear", "sqrt"):
        for k in (2, 32):
            torch.manual_seed(1)
            layer = MoELayer(64, 64, k, k, gate=gate, init_std=0.125, router_init_std=1e-3)
            rms[gate, k] = layer(torch.randn(200, 64)).square().mean().sqrt().item()
    assert rms["sqrt", 32] / rms["sqrt", 2] == pytest.approx(1, abs=0.1)
    assert rms["linear", 32] / rms["linear", 2] == pytest.approx(1 / 4, rel=0.1)


def test_roles_cover_every_parameter():
    layer = MoELayer(8, 16, 4, shared_width=8)
    for module in layer.modules():
        own = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
        assert own == set(getattr(module, "mue_roles", {}))
    assert layer.shared.mue_roles["w_down"] is Role.SHARED_DOWN
    assert not hasattr(layer.shared, "mue_branch")
    assert not hasattr(layer.shared, "mue_multipliers")
    assert FeedForward(8, 8).mue_roles["w_down"] is Role.FFN_DOWN
    assert FeedForward(8, 8).mue_branch == layer.mue_branch == "ffn"


def test_active_width():
    assert MoELayer(8, 16, 4, 3, shared_width=5).active_width == 53


def test_built_on_meta_and_filled_later():
    """What FSDP2 does: build without memory, materialize, reset each module."""
    with torch.device("meta"):
        layer = MoELayer(8, 400, 4, shared_width=400, init_std=0.1)
    layer = layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for p in layer.experts.parameters():
        assert p.std().item() == pytest.approx(0.1, rel=5 / math.sqrt(p.numel()))
    assert not layer.router.balance_bias.any()
    assert layer(torch.randn(3, 8)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"width": 0}, "width: found 0"),
        ({"expert_width": -4}, "expert_width: found -4"),
        ({"top_k": 9}, "top_k: found 9, expected at most n_experts=4"),
        ({"balance": "auxiliary"}, "balance: found 'auxiliary'.*'switch'"),
        ({"shared_width": -1}, "shared_width: found -1"),
        ({"aux_loss_coef": -0.1}, "aux_loss_coef: found -0.1"),
        ({"z_loss_coef": float("inf")}, "z_loss_coef: found inf"),
        ({"bias_update_rate": float("nan")}, "bias_update_rate: found nan"),
        ({"router_init_std": 0.0}, "router_init_std"),
        ({"init_std": -1.0}, "init_std: found -1"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        MoELayer(**{"width": 8, "expert_width": 16, "n_experts": 4} | arguments)


def test_a_wrong_width_is_named():
    with pytest.raises(ValueError, match=r"x: found shape \(2, 7\), expected .*width=8"):
        MoELayer(8, 16, 4)(torch.randn(2, 7))
