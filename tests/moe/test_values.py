"""MoELayer against the float64 loop of tests/helpers/moe_reference.py: output and every gradient."""

from __future__ import annotations

import random

import pytest
import torch

from lightning_mue.moe import MoELayer

SCORINGS = ("softmax-topk", "topk-softmax", "sigmoid", "sigmoid-normalized")
# float32 has unit roundoff 6e-8; sums of up to 64 products of random sign stay below 1e-6 of their norm.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make_layer(seed, scoring="topk-softmax", gate="linear", *, shared=None, dtype=torch.float32, **sizes):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    n_experts = sizes.get("n_experts", rng.randint(1, 9))
    width = sizes.get("width", rng.choice([1, 3, 8, 17, 32]))
    layer = MoELayer(
        width=width,
        expert_width=rng.choice([1, 5, 16, 33]),
        n_experts=n_experts,
        top_k=sizes.get("top_k", rng.randint(1, n_experts)),
        shared_width=rng.choice([0, 7]) if shared is None else shared,
        scoring=scoring,
        gate=gate,
        route_scale=rng.choice([1.0, 2.5]),
        init_std=0.3,
        router_init_std=width**-0.5,  # logits of order 1: a saturated gate's gradient is ill-conditioned
    ).to(dtype)
    layer.output_multiplier = rng.choice([1.0, 0.25])
    x = torch.randn(sizes.get("tokens", rng.randint(2, 14)), layer.width).to(dtype)
    return layer, x


def worst_error(reference, layer, x):
    """Largest relative error over the output and all gradients, with the tensor's name."""
    x = x.clone().requires_grad_()
    dy = torch.randn(x.shape).to(x.dtype)
    y = layer(x)
    y.backward(dy)
    assert y.dtype == x.dtype
    expected_y, expected = reference.moe_gradients(layer, x, dy)
    found = {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    # With one normalized gate the router's gradient is zero, which float64 misses by about 1e-16.
    zero = {name for name, g in expected.items() if g.norm() < 1e-13}
    errors = {name: reference.relative_error(found[name], g) for name, g in expected.items() if name not in zero}
    assert all(found[name].abs().max() < 1e-6 for name in zero)
    errors["y"] = reference.relative_error(y, expected_y)
    return max((error, name) for name, error in errors.items())


@pytest.mark.parametrize("gate", ["linear", "sqrt"])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_float32_on_random_shapes(reference, scoring, gate):
    for seed in range(20):
        error, name = worst_error(reference, *make_layer(seed, scoring, gate))
        assert error <= TOLERANCE[torch.float32], f"seed {seed}: {name} is off by {error:.1e}"


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_experts": 1, "top_k": 1},
        {"n_experts": 5, "top_k": 5},
        {"n_experts": 8, "top_k": 3, "tokens": 1},
        {"n_experts": 64, "top_k": 2, "tokens": 9},
    ],
    ids=["one expert", "all experts active", "one token", "most experts empty"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edge_shapes(reference, sizes, dtype):
    error, name = worst_error(reference, *make_layer(3, dtype=dtype, shared=7, width=32, **sizes))
    assert error <= TOLERANCE[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("favour", "empty"), [(100.0, None), (-100.0, 2)], ids=["all on one", "one empty"])
def test_skewed_loads(reference, favour, empty, dtype):
    layer, x = make_layer(1, n_experts=6, top_k=1, tokens=70, shared=0, dtype=dtype)
    layer.router.balance_bias[2] = favour
    error, name = worst_error(reference, layer, x)
    counts = layer.last_routing.counts.tolist()
    assert error <= TOLERANCE[dtype], name
    if empty is None:
        assert counts == [0, 0, 70, 0, 0, 0]
    else:
        assert counts[2] == 0
        assert all(w.grad[2].abs().max() == 0 for w in layer.experts.parameters())


@pytest.mark.parametrize("scoring", SCORINGS)
def test_bfloat16(reference, scoring):
    for seed in range(4):
        error, name = worst_error(reference, *make_layer(seed, scoring, "sqrt", dtype=torch.bfloat16, tokens=80))
        assert error <= TOLERANCE[torch.bfloat16], f"seed {seed}: {name} is off by {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_bites(reference, dtype, monkeypatch):
    """Negative control: the same comparison fails when one expert of nine is off by ten per cent in the reference."""
    layer, x = make_layer(5, n_experts=9, top_k=3, dtype=dtype, tokens=40)
    assert worst_error(reference, layer, x)[0] <= TOLERANCE[dtype]
    right = reference.ffn

    def wrong(x_d, p, activation):
        scale = 1.1 if torch.equal(p["w_up"], layer.experts.w_up[4].double()) else 1.0
        return scale * right(x_d, p, activation)

    monkeypatch.setattr(reference, "ffn", wrong)
    assert worst_error(reference, layer, x)[0] > TOLERANCE[dtype]


def test_zero_tokens():
    layer, _ = make_layer(0, shared=7)
    x = torch.empty(0, layer.width, requires_grad=True)
    y = layer(x)
    (y.sum() + layer.aux_loss).backward()
    assert y.shape == x.grad.shape == (0, layer.width)
    assert layer.aux_loss == 0
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_permuting_tokens_permutes_the_output():
    layer, x = make_layer(2, tokens=50)
    order = torch.randperm(50)
    torch.testing.assert_close(layer(x[order]), layer(x)[order], rtol=1e-5, atol=1e-6)


def test_permuting_experts_changes_nothing():
    layer, x = make_layer(2, n_experts=7, top_k=3, tokens=50)
    before, order = layer(x), torch.randperm(7)
    with torch.no_grad():
        for weight in (layer.router.weight, *layer.experts.parameters()):
            weight.copy_(weight[order].clone())
    torch.testing.assert_close(layer(x), before, rtol=1e-5, atol=1e-6)


def test_leading_dimensions_are_kept():
    layer, x = make_layer(2, tokens=24)
    torch.testing.assert_close(layer(x.view(2, 3, 4, -1)).view(24, -1), layer(x))


def test_a_nan_token_stays_alone():
    layer, x = make_layer(4, n_experts=6, top_k=2, tokens=20, shared=7)
    clean, clean_routing = layer(x), layer.last_routing
    x[7, 0] = float("nan")
    y, routing = layer(x), layer.last_routing
    others = torch.arange(20) != 7
    assert routing.gates[7].isnan().all()
    assert ((routing.expert_ids >= 0) & (routing.expert_ids < 6)).all()
    assert torch.equal(routing.expert_ids[others], clean_routing.expert_ids[others])
    assert torch.equal(routing.gates[others], clean_routing.gates[others])
    assert y[7].isnan().all()
    # The token may have changed experts, and with them the shapes of two GEMMs.
    torch.testing.assert_close(y[others], clean[others], rtol=1e-5, atol=1e-6)


def test_autocast_runs_experts_in_bfloat16_and_the_router_in_float32(reference):
    layer, x = make_layer(6, n_experts=6, top_k=2, tokens=40, shared=7)
    exact = layer(x)
    exact_routing = layer.last_routing
    with torch.autocast("cpu", torch.bfloat16):
        x = x.requires_grad_()
        y = layer(x)
        assert torch.equal(layer.last_routing.logits, exact_routing.logits)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
    error = reference.relative_error(y.detach(), exact.detach().double())
    assert 1e-4 < error < TOLERANCE[torch.bfloat16]  # exactly float32 would mean that autocast was ignored
