"""All backends of a MoELayer: each against a float64 loop, and with one another; Triton in its interpreter."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.kernels.routing.op import SCORINGS
from lightning_mue.moe import MoELayer

BACKENDS = ("torch", "grouped_mm", "triton")
pytestmark = pytest.mark.usefixtures("triton_backend")

# float32: unit roundoff 6e-8, sums of up to 64 products. bfloat16: 2e-3 for the inputs' rounding, a handful of roundings
# after it.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def draw_layer(seed, tokens=(1, 2, 30, 70)):
    """A layer of any kind, with tokens for it, whose widths divide nothing."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    groups = rng.choice([1, 1, 2])
    n_experts = groups * rng.choice([1, 2, 5, 9])
    top_k = groups * rng.randint(1, min(4, n_experts // groups))
    layer = MoELayer(
        width=rng.choice([3, 8, 17, 40]),
        expert_width=rng.choice([1, 5, 16, 33]),
        n_experts=n_experts,
        top_k=top_k,
        n_groups=groups,
        activation=rng.choice(sorted(ACTIVATIONS)),
        bias=rng.random() < 0.3,
        scoring=rng.choice(SCORINGS),
        gate=rng.choice(["linear", "sqrt"]),
        shared_width=rng.choice([0, 7]),
        route_scale=2.5,
        init_std=0.3,
        router_init_std=0.3,
    )
    layer.router.balance_bias.normal_(std=rng.choice([0.0, 0.05]))
    return layer, torch.randn(rng.choice(tokens), layer.width)


def use(layer, backend):
    layer.router.backend = layer.experts.backend = backend


def run(layer, x, dy, backend):
    """The output and all gradients by name."""
    use(layer, backend)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return {"y": y.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in layer.named_parameters()}


def errors(reference, layer, x, dy, backend):
    expected_y, expected = reference.moe_gradients(layer, x, dy)
    expected["y"] = expected_y
    found = run(layer, x, dy, backend)
    # A gate that is 1 whatever the router says has no gradient, which float64 misses by about 1e-16.
    large = {name: g for name, g in expected.items() if g.norm() > 1e-13}
    return {name: reference.relative_error(found[name], g) for name, g in large.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [*range(6), *(pytest.param(i, marks=pytest.mark.slow) for i in range(6, 40))])
def test_values_in_float32(reference, seed, backend):
    layer, x = draw_layer(seed)
    found = errors(reference, layer, x, torch.randn_like(x), backend)
    assert max(found.values()) <= TOLERANCE[torch.float32], found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", [1, 4, *(pytest.param(i, marks=pytest.mark.slow) for i in range(10, 30))])
def test_values_in_bfloat16(reference, seed, backend):
    """x and weights are rounded first, and the loop sees them so: else tokens would choose other experts.

    Not of one token alone: a gate's gradient is one inner product, which may cancel.
    """
    layer, x = draw_layer(seed, tokens=(30, 70))
    layer, x = layer.bfloat16(), x.bfloat16()
    found = errors(reference, layer, x, torch.randn_like(x), backend)
    assert max(found.values()) <= TOLERANCE[torch.bfloat16], found


@pytest.mark.slow  # faster: test_values_in_float32 holds each of them against the same loop
@settings(max_examples=4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(min_value=1000, max_value=10**6))
def test_backends_agree(seed):
    layer, x = draw_layer(seed)
    dy = torch.randn_like(x)
    first, *others = (run(layer, x, dy, backend) for backend in BACKENDS)
    for other in others:
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5 * float(1 + value.norm()), msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_tokens_permutes_the_output_exactly(backend):
    torch.manual_seed(2)
    layer, x, order = MoELayer(24, 20, 6, 2, init_std=0.3), torch.randn(50, 24), torch.randperm(50)
    use(layer, backend)
    assert torch.equal(layer(x[order]), layer(x)[order])


@pytest.mark.parametrize("backend", ["torch", "grouped_mm"])
@pytest.mark.parametrize(("tokens", "width", "experts"), [(1000, 72, 1), (1001, 57, 8)])
def test_permuting_tokens_is_exact_on_two_threads(two_threads, tokens, width, experts, backend):
    torch.manual_seed(2)
    layer, x = MoELayer(width, width, experts, 1, init_std=0.3, backend=backend), torch.randn(tokens, width)
    order = torch.randperm(tokens)
    assert torch.equal(layer(x[order]), layer(x)[order])


@pytest.mark.parametrize("backend", ["torch", "grouped_mm"])
@pytest.mark.parametrize("activation", ["swiglu", "geglu-tanh"])
def test_saturated_gates_are_accurate(reference, activation, backend):
    """Gates far below zero, where a form of the activation that cancels would lose its digits."""
    torch.manual_seed(0)
    layer, x = MoELayer(24, 19, 3, 1, init_std=0.2, bias=True, activation=activation), torch.randn(40, 24)
    with torch.no_grad():
        layer.experts.b_gate.fill_(-4.0 if activation != "swiglu" else -14.0)
    found = errors(reference, layer, x, torch.randn_like(x), backend)
    assert max(found[name] for name in ("y", "experts.w_down")) <= TOLERANCE[torch.float32], found


@pytest.mark.parametrize("backend", BACKENDS)
def test_permuting_experts_changes_nothing_but_rounding(reference, backend):
    """A product rounds some columns otherwise than others, so the router's logits may differ in their last bits."""
    torch.manual_seed(2)
    layer, x, order = MoELayer(24, 20, 6, 2, init_std=0.3), torch.randn(50, 24), torch.randperm(6)
    use(layer, backend)
    before = layer(x)
    with torch.no_grad():
        for weight in (layer.router.weight, *layer.experts.parameters()):
            weight.copy_(weight[order].clone())
    after = layer(x)
    assert reference.relative_error(after, before) < 1e-6
    with torch.no_grad():  # the control: two experts change places, but not their rows of the router
        layer.experts.w_down[:2] = layer.experts.w_down[:2].flip(0).clone()
    assert reference.relative_error(layer(x), after) > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_are_bitwise_equal(backend):
    layer, x = draw_layer(3)
    dy = torch.randn_like(x)
    first, second = run(layer, x, dy, backend), run(layer, x, dy, backend)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_checks_bite(reference, backend, monkeypatch):
    """Negative control: one expert of ten that is off by a thousandth is seen, in float32."""
    torch.manual_seed(0)
    layer, x = MoELayer(24, 20, 10, 2, init_std=0.3), torch.randn(50, 24)
    dy, right = torch.randn_like(x), reference.ffn
    assert max(errors(reference, layer, x, dy, backend).values()) <= TOLERANCE[torch.float32]

    def wrong(x_d, p, activation):
        return right(x_d, p, activation) * (1.001 if torch.equal(p["w_up"], layer.experts.w_up[4].double()) else 1)

    monkeypatch.setattr(reference, "ffn", wrong)
    assert errors(reference, layer, x, dy, backend)["y"] > TOLERANCE[torch.float32]
