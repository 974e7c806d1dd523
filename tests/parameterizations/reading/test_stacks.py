"""Which numbers in the names of parameters count layers, and how many experts a layer has."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_mue import plan


def linear(fan_in, fan_out):
    return nn.Linear(fan_in, fan_out, bias=False)


class Expert(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(d, 2 * d), linear(d, 2 * d), linear(2 * d, d)


class Attention(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.head_dim = 8
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(d, d) for _ in range(4))


def dense(d, n):
    return Expert(d)


def routed(d, n, top_k=2):
    moe = nn.Module()
    moe.gate, moe.top_k = linear(d, n), top_k
    return moe


def in_list(d, n):
    moe = routed(d, n)
    moe.experts = nn.ModuleList(Expert(d) for _ in range(n))
    return moe


def in_groups(d, n, name="groups"):
    moe, groups = routed(d, n), nn.ModuleList()
    for _ in range(2):
        group = nn.Module()
        group.experts = nn.ModuleList(Expert(d) for _ in range(n // 2))
        groups.append(group)
    setattr(moe, name, groups)
    return moe


def in_experts(d, n):
    return in_groups(d, n, name="experts")


def side_by_side(d, n):
    return nn.ModuleList(Expert(d) for _ in range(n))


class Model(nn.Module):
    """``layers.i`` of attention and an FFN made by ``ffn(width, n)``; ``first`` layers stay dense (DeepSeek)."""

    def __init__(self, ffn, d=16, depth=2, n=4, first=0):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(20, d), nn.LayerNorm(d), linear(d, 20)
        self.sizes = {"width": d, "depth": depth}
        self.layers = nn.ModuleList()
        for i in range(depth):
            layer = nn.Module()
            layer.norm1, layer.norm2, layer.self_attn = nn.LayerNorm(d), nn.LayerNorm(d), Attention(d)
            layer.mlp = dense(d, n) if i < first else ffn(d, n)
            self.layers.append(layer)


@pytest.mark.parametrize("ffn", [in_list, in_groups, in_experts])
def test_experts_are_no_layers(ffn):
    """2 layers, dense -> 8 experts: every branch as at the base but for the FFN's c r = (d / A) a = 1/2 * 2."""
    scaling = plan(Model(ffn, n=8), base=lambda: Model(dense))
    assert (scaling.base_axes["depth"], scaling.axes["depth"]) == (2, 2)
    assert (scaling.base_axes["n_experts"], scaling.axes["n_experts"]) == (1, 8)
    assert scaling.folded == {"ffn": 0.5, "route": 2.0}
    assert scaling["layers.1.self_attn.o_proj.weight"].lr == 1.0
    assert {p.lr for p in scaling.parameters if p.role == "expert_down"} == {1.0}


@pytest.mark.parametrize("ffn", [in_list, in_groups, in_experts])
def test_depth_and_experts_change_together(ffn):
    scaling = plan(Model(ffn, depth=6, n=8, first=1), base=lambda: Model(ffn, depth=2, n=4, first=1))
    assert (scaling.base_axes["depth"], scaling.axes["depth"]) == (2, 6)
    assert (scaling.base_axes["n_experts"], scaling.axes["n_experts"]) == (4, 8)
    downs = [p for p in scaling.parameters if p.role in ("expert_down", "ffn_down") or ".o_proj." in p.name]
    assert [p.lr for p in downs] == pytest.approx([1 / 3] * len(downs))


class Declared(Model):
    routed = False

    def mue_axes(self):
        d, n = self.sizes["width"], len(self.layers[0].mlp)
        experts = {"n_experts": n, "top_k": n, "expert_width": 2 * d, "active_width": 2 * d * n}
        return {**self.sizes, **(experts if self.routed else {})}


class DeclaredExperts(Declared):
    routed = True


def test_list_that_may_be_layers_or_branches_is_refused_where_it_grows():
    assert plan(Model(side_by_side, depth=4, n=3), base=lambda: Model(side_by_side, n=3)).folded == {"residual": 0.5}
    with pytest.raises(ValueError, match=r"mue_axes: found 1 -> 3 modules in layers\.\*\.mlp\.\*.*mue_axes\(\)"):
        plan(Model(side_by_side, n=3), base=lambda: Model(side_by_side, n=1))
    # Both remedies of the message.
    assert plan(Declared(side_by_side, n=3), base=lambda: Declared(side_by_side, n=1)).folded == {}
    roles = {"mlp.*(up|gate)_proj.*weight": "expert_up", "mlp.*down.*weight": "expert_down"}
    scaling = plan(DeclaredExperts(side_by_side, n=3), base=lambda: DeclaredExperts(side_by_side, n=1), roles=roles)
    assert scaling.folded == {"ffn": pytest.approx(1 / 3), "route": 3.0}


class Stages(nn.Module):
    """Swin's layout: blocks in stages, with a reduction between them."""

    def __init__(self, *blocks, d=16):
        super().__init__()
        self.embed, self.layers = nn.Conv2d(3, d, 4), nn.ModuleList()
        for n in blocks:
            stage = nn.Module()
            stage.blocks = Model(dense, d, n).layers
            stage.downsample = nn.Module()
            stage.downsample.reduction, stage.downsample.norm = linear(4 * d, d), nn.LayerNorm(4 * d)
            self.layers.append(stage)
        self.norm, self.head = nn.LayerNorm(d), linear(d, 10)


def test_blocks_of_all_stages_count():
    scaling = plan(Stages(2, 6), base=lambda: Stages(2, 2))
    assert (scaling.base_axes["depth"], scaling.axes["depth"]) == (4, 8)
    assert scaling["layers.0.downsample.reduction.weight"].lr == 1.0
    assert scaling["layers.1.blocks.5.self_attn.o_proj.weight"].lr == 0.5
