"""What a MoELayer can be asked for beyond top-k of SwiGLU experts: values against a float64 loop, and bad combinations."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.kernels.dispatch.op import plan_dispatch
from lightning_mue.kernels.grouped_ffn.op import grouped_ffn
from lightning_mue.moe import FeedForward, MoELayer, switch_loss

BACKENDS = ("torch", "grouped_mm")


def errors_of(reference, layer, x, mask=None):
    """Relative error of the output and of every gradient."""
    x, dy = x.clone().requires_grad_(), torch.randn_like(x)
    y = layer(x, mask)
    y.backward(dy)
    expected_y, expected = reference.moe_gradients(layer, x, dy, mask)
    found = {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    errors = {name: reference.relative_error(found[name], g) for name, g in expected.items() if g.norm() > 1e-13}
    return errors | {"y": reference.relative_error(y, expected_y)}


def randomize_biases(layer):
    for name, parameter in layer.named_parameters():
        if name.split(".")[-1].startswith("b_"):
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_and_biases(reference, activation, bias, backend):
    settings = {"activation": activation, "bias": bias, "shared_width": 6, "shared_gate": True, "backend": backend}
    layer = MoELayer(9, 7, 5, 2, init_std=0.3, router_init_std=0.3, **settings)
    randomize_biases(layer)
    errors = errors_of(reference, layer, torch.randn(30, 9))
    assert max(errors.values()) <= 1e-5, errors
    assert len(errors) == 2 + len(list(layer.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_takes_tokens_out(reference, backend):
    """Masked tokens reach no expert, whatever they hold, and count nowhere."""
    layer = MoELayer(8, 16, 6, 2, bias=True, init_std=0.3, router_init_std=0.3, backend=backend, z_loss_coef=0.5)
    randomize_biases(layer)
    x, mask = torch.randn(40, 8), torch.rand(40) < 0.7
    errors = errors_of(reference, layer, x, mask)
    assert max(errors.values()) <= 1e-5, errors
    y, aux_loss, counts = layer(x, mask), layer.aux_loss, layer.last_routing.counts
    assert not y[~mask].any()
    kept = layer(x[mask])
    torch.testing.assert_close(y[mask], kept, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(aux_loss, layer.aux_loss)
    assert torch.equal(counts, layer.last_routing.counts)
    changed = x.clone()
    changed[~mask] = float("nan")
    torch.testing.assert_close(layer(changed, mask), y)


def test_all_tokens_masked():
    layer = MoELayer(8, 16, 6, 2, z_loss_coef=0.5)
    y = layer(torch.randn(3, 8), torch.zeros(3, dtype=torch.bool))
    (y.sum() + layer.aux_loss).backward()
    assert not y.any()
    assert layer.aux_loss == 0
    assert not layer.router.weight.grad.any()


def test_jitter_only_in_training():
    layer, x = MoELayer(8, 16, 6, 2, jitter=0.2), torch.randn(50, 8)
    layer(x)
    first = layer.last_routing.logits
    layer(x)
    noise = (layer.last_routing.logits - first).norm() / first.norm()
    assert 0.02 < noise < 0.4  # two draws of std 0.2 / sqrt(3), up to cancellation in the sum over 8 features
    layer.eval()
    layer(x)
    assert torch.equal(layer.last_routing.logits, x @ layer.router.weight.T)


def test_jitter_has_its_gradient():
    layer, x = MoELayer(8, 16, 4, 4, jitter=0.5).double(), torch.randn(6, 8, dtype=torch.float64, requires_grad=True)

    def run(x):
        torch.manual_seed(1)  # the same noise
        return layer(x)

    assert torch.autograd.gradcheck(run, x)


def test_sequence_scope_is_the_mean_of_the_sequences_own_losses():
    layer = MoELayer(8, 16, 6, 2, balance_scope="sequence", aux_loss_coef=1.0, router_init_std=1.0)
    x = torch.randn(3, 20, 8)
    layer(x)
    found = layer.aux_loss
    losses = []
    for sequence in x:
        logits = sequence @ layer.router.weight.T
        counts = torch.bincount(logits.topk(2).indices.flatten(), minlength=6)
        losses.append(switch_loss(logits, counts, 2))
    torch.testing.assert_close(found, torch.stack(losses).mean())
    whole = MoELayer(8, 16, 6, 2, aux_loss_coef=1.0)
    whole.load_state_dict(layer.state_dict())
    whole(x)
    assert not torch.isclose(whole.aux_loss, found, rtol=1e-3)
    (grad,) = torch.autograd.grad(found, layer.router.weight)
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), layer.router.weight)
    torch.testing.assert_close(grad, expected)


def expert_choice_by_loop(layer, x_Td):
    """Every expert takes its best tokens, in float64."""
    scores_TE = x_Td.double() @ layer.router.weight.double().T
    scores_TE = scores_TE.sigmoid() if layer.router.scoring == "sigmoid" else scores_TE.softmax(-1)
    n_tokens, n_experts = scores_TE.shape
    capacity = min(n_tokens, -(-n_tokens * layer.top_k // n_experts))
    y_Td = torch.zeros_like(x_Td.double())
    for e in range(n_experts):
        up, down = layer.experts.w_up[e].double(), layer.experts.w_down[e].double()
        for t in sorted(range(n_tokens), key=lambda t: -scores_TE[t, e].item())[:capacity]:
            gate = scores_TE[t, e].sqrt() if layer.router.gate == "sqrt" else scores_TE[t, e]
            y_Td[t] += gate * (down @ torch.relu(up @ x_Td[t].double()) ** 2)
    return y_Td


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", ["linear", "sqrt"])
@pytest.mark.parametrize("scoring", ["softmax-topk", "sigmoid"])
@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_expert_choice(reference, scoring, gate, tokens, backend):
    settings = {"scoring": scoring, "gate": gate, "choice": "expert", "balance": "none", "activation": "relu2"}
    layer = MoELayer(8, 16, 6, 2, init_std=0.3, router_init_std=0.3, backend=backend, **settings)
    x = torch.randn(tokens, 8, requires_grad=True)
    y, expected = layer(x), expert_choice_by_loop(layer, x)
    assert reference.relative_error(y, expected) <= 1e-5
    assert layer.last_routing.counts.tolist() == [min(tokens, -(-tokens // 3))] * 6
    variables, dy = [x, *layer.parameters()], torch.randn_like(y)
    found = torch.autograd.grad(y, variables, dy)
    for a, b in zip(found, torch.autograd.grad(expected, variables, dy.double()), strict=True):
        assert reference.relative_error(a, b) <= 1e-5


def test_expert_choice_leaves_masked_tokens_out():
    settings = {"scoring": "sigmoid", "choice": "expert", "balance": "none", "bias": True}
    layer, x = MoELayer(8, 16, 6, 3, **settings), torch.randn(12, 8)
    randomize_biases(layer)
    mask = torch.arange(12) % 3 > 0
    y = layer(x, mask)
    assert not y[~mask].any()
    assert y[mask].any()
    assert layer.last_routing.counts.tolist() == [6] * 6
    few = torch.arange(12) < 2  # fewer than an expert may take
    layer(x, few)
    assert layer.last_routing.counts.tolist() == [2] * 6


def test_the_experts_memory_is_what_is_saved():
    """`activation_memory` against the tensors that autograd holds, of the experts alone."""
    layer, saved = MoELayer(16, 24, 8, 3).bfloat16(), {}
    x = torch.randn(64, 16, dtype=torch.bfloat16, requires_grad=True)
    routing = layer.router(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        layer.experts(x, routing)
    weights = {p.data_ptr() for p in layer.parameters()}
    held = sum(t.numel() * t.itemsize for pointer, t in saved.items() if pointer not in weights) / 64
    predicted = layer.experts.activation_memory(3)
    assert held == pytest.approx(predicted["total"], abs=1)  # and offsets: 9 integers in all
    assert predicted["input"] + predicted["pre_activations"] == 2 * 16 + 4 * 3 * 24


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"activation": "tanh"}, "activation: found 'tanh'"),
        ({"backend": "cuda"}, "backend: found 'cuda'"),
        ({"choice": "expert", "scoring": "sigmoid"}, "Set balance='none'"),
        (
            {"choice": "expert", "balance": "none"},
            "scoring: found 'topk-softmax', expected one of 'softmax-topk', 'sigmoid'",
        ),
        (
            {"choice": "expert", "balance": "none", "scoring": "sigmoid", "n_groups": 2},
            "n_groups: found 2, expected 1 with choice='expert'",
        ),
        ({"shared_gate": True}, "shared_width: found 0, expected a shared expert"),
        ({"jitter": 1.0}, r"jitter: found 1\.0, expected a number in \[0, 1\)"),
        ({"balance_scope": "world"}, "balance_scope: found 'world'"),
        ({"shared_width": -1}, "shared_width: found -1"),
        ({"aux_loss_coef": -1.0}, "aux_loss_coef: found -1.0"),
        ({"route_scale": float("nan")}, "route_scale: found nan"),
    ],
)
def test_bad_settings_are_named(settings, match):
    with pytest.raises(ValueError, match=match):
        MoELayer(8, 16, 4, 2, **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shared_width", "8"),
        ("shared_width", 8.0),
        ("z_loss_coef", "0.1"),
        ("jitter", True),
        ("init_std", "auto"),
        ("router_init_std", "auto"),
        ("route_scale", "2"),
        ("n_groups", 1.0),
    ],
)
def test_bad_types_are_named(name, value):
    with pytest.raises(TypeError, match=f"^{name}: found {value!r} of type"):
        MoELayer(8, 16, 4, 2, **{name: value})


def test_bad_masks_are_named():
    layer = MoELayer(8, 16, 4)
    with pytest.raises(TypeError, match=r"mask: found torch\.float32, expected torch\.bool"):
        layer(torch.randn(2, 3, 8), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mask: found shape \(3, 2\), expected that of x's tokens, \(2, 3\)"):
        layer(torch.randn(2, 3, 8), torch.ones(3, 2, dtype=torch.bool))


def test_triton_without_a_device_is_explained():
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    layer = MoELayer(8, 16, 4, backend="triton").double()
    with pytest.raises(ValueError, match=r"backend: found 'triton', but .*, expected .*a CUDA device"):
        layer(torch.randn(2, 8, dtype=torch.float64))


def test_a_dense_network_of_any_activation(reference):
    for activation in ACTIVATIONS:
        network = FeedForward(6, 10, activation=activation, bias=True, init_std=0.5)
        randomize_biases(network)
        x = torch.randn(4, 6)
        p = {name: t.detach().double() for name, t in network.named_parameters()}
        expected = torch.stack([reference.ffn(x_d.double(), p, activation) for x_d in x])
        assert reference.relative_error(network(x), expected) < 1e-6


def test_reentrant_checkpointing_is_warned_of():
    """It would lose the auxiliary loss; the other form does not."""
    layer, x = MoELayer(8, 16, 4, 2, aux_loss_coef=1.0, router_init_std=1.0), torch.randn(20, 8, requires_grad=True)
    layer(x)
    (expected,) = torch.autograd.grad(layer.aux_loss, layer.router.weight)
    checkpoint(layer, x, use_reentrant=False)
    (found,) = torch.autograd.grad(layer.aux_loss, layer.router.weight)
    torch.testing.assert_close(found, expected)
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        checkpoint(layer, x, use_reentrant=True)


@pytest.mark.parametrize("choice", ["token", "expert"])
def test_padding_of_nan_leaves_the_gradients_alone(choice):
    settings = {"scoring": "sigmoid", "choice": choice, "balance": "none", "z_loss_coef": 0.1}
    layer, x = MoELayer(8, 16, 4, 2, **settings), torch.randn(12, 8)
    mask = torch.arange(12) != 5
    x[5] = float("nan")
    (layer(x, mask)[mask].sum() + layer.aux_loss).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_nan_token_takes_no_other_ones_place_in_expert_choice():
    layer = MoELayer(8, 16, 5, 2, scoring="sigmoid", choice="expert", balance="none", router_init_std=1.0)
    x = torch.randn(20, 8)
    x[3] = float("nan")
    layer(x)
    assert (layer.last_routing.token_ids != 3).all()


def test_no_tokens(triton_backend):
    """Widths that divide nothing, and a batch without sequences."""
    for backend in ("torch", "grouped_mm", "triton"):
        layer = MoELayer(13, 7, 4, 2, backend=backend, balance_scope="sequence", bias=True)
        x = torch.zeros(0, 3, 13, requires_grad=True)
        (layer(x).sum() + layer.aux_loss).backward()
        assert x.grad.shape == x.shape
        assert not any(p.grad.any() for p in layer.parameters())


def test_empty_sequences_do_not_count_in_the_mean():
    layer = MoELayer(8, 16, 6, 2, balance_scope="sequence", aux_loss_coef=1.0, router_init_std=1.0)
    x, mask = torch.randn(3, 10, 8), torch.ones(3, 10, dtype=torch.bool)
    mask[2] = False
    layer(x, mask)
    with_padding = layer.aux_loss
    layer(x[:2])
    torch.testing.assert_close(with_padding, layer.aux_loss)


def test_multipliers_are_kept_in_a_checkpoint(tmp_path):
    layer = MoELayer(8, 16, 4)
    layer.output_multiplier, layer.route_scale = 0.25, 3.0
    trainer = Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False)
    data = DataLoader(TensorDataset(torch.randn(8, 8), torch.randn(8, 8)), batch_size=4)
    trainer.fit(layer, data)
    trainer.save_checkpoint(tmp_path / "layer.ckpt")
    restored = MoELayer.load_from_checkpoint(tmp_path / "layer.ckpt")
    assert (restored.output_multiplier, restored.route_scale) == (0.25, 3.0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"gates": (30, 1)}, "gates: found shape"),
        ({"x": (31, 9)}, "inverse: found shape"),
        ({"w_gate": (5, 6, 9)}, "w_gate: found shape"),
        ({"w_down": (5, 7, 9)}, "w_down: found shape"),
        ({"w_up": (4, 7, 9), "w_gate": (4, 7, 9), "w_down": (4, 9, 7)}, "offsets: found shape"),
        ({"b_up": (5, 1)}, "b_up: found shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change, match):
    plan = plan_dispatch(torch.randint(5, (30, 2)), torch.full((5,), 12))
    shapes = {"x": (30, 9), "gates": (30, 2), "w_up": (5, 7, 9), "w_down": (5, 9, 7), "w_gate": (5, 7, 9)}
    arguments = {name: torch.randn(shape) for name, shape in (shapes | change).items()}
    with pytest.raises(ValueError, match=match):
        grouped_ffn(plan=plan, **arguments)
    fitting = {name: torch.randn(shape) for name, shape in shapes.items()}
    with pytest.raises(TypeError, match=r"gates: found torch\.bfloat16, expected torch\.float32"):
        grouped_ffn(plan=plan, **fitting | {"gates": fitting["gates"].bfloat16()})
