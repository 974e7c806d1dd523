"""The experts inside a layer: compiled, counted, frozen, and what they say of wrong types."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_mue.moe import Experts, MoELayer, Router


def test_frozen_weights_and_input():
    layer = MoELayer(8, 16, 4)
    layer.experts.requires_grad_(False)
    layer(torch.randn(6, 8)).sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.experts.w_up.grad is None


@pytest.mark.parametrize("backend", ["torch", "grouped_mm"])
@pytest.mark.parametrize(
    "settings",
    [
        {"shared_width": 8, "gate": "sqrt"},
        {"activation": "gelu", "bias": True, "balance_scope": "sequence", "z_loss_coef": 0.1},
        {"choice": "expert", "scoring": "sigmoid", "balance": "none"},
    ],
    ids=["sqrt", "gelu", "expert-choice"],
)
def test_compiles_without_a_graph_break(backend, settings):
    layer = MoELayer(8, 16, 4, backend=backend, **settings)
    compiled = torch.compile(copy.deepcopy(layer).forward, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(layer(x).square().sum(), x)[0])


def test_flops_are_counted_on_the_meta_device():
    with torch.device("meta"):
        router, experts, x = Router(64, 8, 2), Experts(64, 32, 8), torch.empty(100, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        experts(x, router(x)).sum().backward()
    expert_flops = 18 * 100 * 2 * 64 * 32
    router_flops = 6 * 100 * 64 * 8
    assert counter.get_total_flops() == expert_flops + router_flops


def test_dtype_mismatch_is_explained():
    layer = MoELayer(8, 16, 4)
    with pytest.raises(
        TypeError, match=r"x: found torch\.bfloat16, expected the dtype of the experts' weights, torch\.float32"
    ):
        layer(torch.randn(6, 8).bfloat16())
