"""FFNs, experts and routers of projects that name their matrices differently: roles by shape and position."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lightning_mue import plan

#: Layout -> (names in order of definition, the down matrix, whether the up matrix holds the gate too).
LAYOUTS = {
    "litgpt": ("fc_1 fc_2 proj", "proj", False),
    "dino": ("w12 w3", "w3", True),
    "xformers": ("w1 w2 w3", "w3", False),
    "llama": ("w1 w2 w3", "w2", False),
    "fused": ("gate_up down", "down", True),
    "fused by another name": ("wi wo_", "wo_", True),
    "gpt": ("c_fc c_fc2 c_proj", "c_proj", False),
    "t5": ("wi_0 wi_1 wo", "wo", False),
    "glu": ("linear_1 linear_v linear_2", "linear_2", False),
    "no names": ("a b c", "c", False),
    "plain": ("a b", "b", False),
    "down first": ("down_proj up_proj", "down_proj", False),
    "sequential": ("0 2", "2", False),
}
#: Square in target and base, shapes of w1, w2 and w3 do not tell which is the down matrix: the usual meaning is Llama's.
OPEN = {"xformers"}


def ffn(layout, width, hidden):
    names, down, fused = LAYOUTS[layout]
    made = nn.Module()
    for name in names.split():
        sides = (hidden, width) if name == down else (width, hidden * (2 if fused else 1))
        made.add_module(name, nn.Linear(*sides, bias=False))
    return made


class Stack(nn.Module):
    """Embedding, layers of a norm and an FFN (or of experts with a router), a norm, a head."""

    def __init__(
        self, layout="plain", width=32, hidden=64, experts=0, stored=None, router="gate", name="mlp", shared=False
    ):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
        self.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.layers:
            layer.norm1, layer.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            layer.attn = nn.ModuleDict({n: nn.Linear(width, width, bias=False) for n in "qkvo"})
            layer.add_module(name, self.block(layout, width, hidden, experts, stored, router, shared))
        self.norm = nn.LayerNorm(width)

    @staticmethod
    def block(layout, width, hidden, experts, stored, router, shared):
        if not experts:
            return ffn(layout, width, hidden)
        block = nn.Module()
        block.top_k = 2
        block.add_module(router, nn.Linear(width, experts, bias=False))
        block.experts = nn.ModuleList(ffn(layout, width, hidden) for _ in range(experts))
        if stored:
            block.experts = nn.Module()
            for n, part in ffn(layout, width, hidden).named_children():
                weight = part.weight if stored == "out in" else part.weight.T
                block.experts.register_parameter(n, nn.Parameter(torch.stack([torch.randn_like(weight)] * experts)))
        if shared:
            block.shared_experts = ffn(layout, width, hidden)
        return block


def ffn_entries(scaling, part="mlp."):
    return {
        p.name.split(part)[1].removesuffix(".weight"): p for p in scaling.parameters if f"layers.1.{part}" in p.name
    }


def expected_roles(layout, prefix):
    names, down, _ = LAYOUTS[layout]
    return {name: f"{prefix}_{'down' if name == down else 'up'}" for name in names.split()}


#: (width, hidden) of target and base: both differ in all four; equal in the target, the base, or both.
SHAPES = {"oblong": ((64, 192), (32, 64)), "square target": ((64, 64), (32, 64)), "square base": ((64, 128), (32, 32))}


@pytest.mark.parametrize("shapes", [*SHAPES, "square"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_down_matrix_is_known_by_shape_and_position(layout, shapes):
    if shapes == "square" and layout in OPEN:
        pytest.skip("shapes do not tell")
    (width, hidden), (base_width, base_hidden) = SHAPES.get(shapes, ((64, 64), (32, 32)))
    model, base = Stack(layout, width, hidden), Stack(layout, base_width, base_hidden)
    d, wide = width / base_width, hidden / base_hidden
    for rule in ("mup", "complete-p", "complete-mue"):
        entries = ffn_entries(plan(model, base=base, rule=rule))
        assert {name: p.role for name, p in entries.items()} == expected_roles(layout, "ffn")
        for name, p in entries.items():
            fan_in = wide if p.role == "ffn_down" else d
            assert p.base == f"layers.1.mlp.{name}.weight"
            # complete-mue's down cell: d^-1, and the branch multiplier c = d / A folded: A^-1 in all.
            assert (p.lr, p.weight_decay) == (pytest.approx(1 / fan_in), pytest.approx(fan_in))
            start = (base_hidden if p.role == "ffn_down" else base_width) ** -0.5 / math.sqrt(3)
            assert p.init.value == pytest.approx(start * fan_in**-0.5, rel=0.06)
    scaling = plan(model, base=base, rule="complete-mue")
    assert (scaling.axes["ffn_width"], scaling.base_axes["ffn_width"]) == (hidden, base_hidden)


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("stored", [None, "out in", "in out"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "sequential"])
def test_experts_of_any_names_from_a_dense_base(layout, stored, shapes):
    if stored and layout == "down first":
        pytest.skip("named otherwise below")
    (width, hidden), (base_width, base_hidden) = SHAPES[shapes]
    model = Stack(layout, width, hidden, experts=4, stored=stored, shared=True)
    if width == hidden and layout in OPEN:
        pytest.skip("shapes do not tell")
    scaling = plan(model, base=Stack("gpt", base_width, base_hidden, name="feed_forward"))
    entries = ffn_entries(scaling, "mlp.experts." if stored else "mlp.experts.3.")
    assert {name: p.role for name, p in entries.items()} == expected_roles(layout, "expert")
    shared = ffn_entries(scaling, "mlp.shared_experts.")
    assert {name: p.role for name, p in shared.items()} == expected_roles(layout, "shared")
    down = next(p for p in entries.values() if p.role == "expert_down")
    up = next(p for p in entries.values() if p.role == "expert_up")
    assert down.base == "layers.1.feed_forward.c_proj.weight"
    assert "c_proj" not in up.base
    d, active = width / base_width, 3 * hidden / base_hidden  # two routed experts and the shared one
    # Folded: c r = (d / A) a, a = 2; the down cell is A^1/2 d^-1 for init and d^-1 for lr.
    assert down.lr == pytest.approx(2 / active)
    assert down.init.value == pytest.approx((base_hidden * 3) ** -0.5 * 2 * active**-0.5, rel=0.06)
    assert up.lr == pytest.approx(1 / d)
    assert up.init.value == pytest.approx((base_width * 3) ** -0.5 * d**-0.5, rel=0.06)
    assert scaling["layers.1.mlp.gate.weight"].role == "router"
    assert (scaling.axes["expert_width"], scaling.axes["n_experts"], scaling.axes["active_width"]) == (
        hidden, 4, 3 * hidden
    )  # fmt: skip
