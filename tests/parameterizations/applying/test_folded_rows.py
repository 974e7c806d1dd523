"""Query rows that carry the multiplier of attention logits: drawn with it, and trained as if a module multiplied by it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lightning_mue import HyperSphereOptimizer
from lightning_mue.parameterizations import Init, ParameterPlan, ScaledStep, ScalingPlan, initialize, param_groups
from lightning_mue.parameterizations.applying.folded_rows import RowFolds
from lightning_mue.parameterizations.planning.parameter_plan import FoldedRows
from lightning_mue.sharded import local

M = 0.3
#: Layout -> (dimension of the rows, how many make queries, after how many that repeats) for two heads of 4.
LAYOUTS = {"q, k, v": (0, 8, 24), "transposed": (1, 8, 24), "head by head": (0, 4, 12)}


class Attention(nn.Module):
    """Causal attention with a fused matrix; ``factor`` multiplies its logits beside the usual 1 / sqrt(head_dim)."""

    def __init__(self, layout, bias=True):
        super().__init__()
        self.layout, self.factor = layout, 1.0
        self.weight = nn.Parameter(torch.empty((8, 24) if layout == "transposed" else (24, 8)))
        self.bias = nn.Parameter(torch.empty(24)) if bias else None
        self.out = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        qkv = F.linear(x, self.weight.T if self.layout == "transposed" else self.weight, self.bias)
        if self.layout == "head by head":
            q, k, v = qkv.unflatten(-1, (2, 3, 4)).permute(3, 0, 2, 1, 4)
        else:
            q, k, v = qkv.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q * self.factor, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def query_rows(layout):
    """Independent of the code under test: which of the 24 rows make queries."""
    return [*range(4), *range(12, 16)] if layout == "head by head" else list(range(8))


def make_plan(model, layout, kind, factor=M):
    dim, count, period = LAYOUTS[layout]
    entries = []
    for name, p in model.named_parameters():
        rows = FoldedRows(dim if p.dim() > 1 else 0, count, period, factor) if name in ("weight", "bias") else None
        update = kind if p.dim() > 1 or kind == "sgd" else "adamw"
        init = Init("normal", 0.8)
        entries.append(ParameterPlan(name, "hidden", tuple(p.shape), name, init, 0.5, 2.0, 0.5, update, "", rows=rows))
    return ScalingPlan("mup", "adam", 1.0, {"width": 8}, {"width": 4}, 1.0, tuple(entries))


def without_rows(plan):
    return replace(plan, parameters=tuple(replace(entry, rows=None) for entry in plan.parameters))


def named(parameters):
    return [(f"layers.0.{i}", p) for i, p in enumerate(parameters)]


OPTIMIZERS = {
    "adamw": ("adamw", lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.3, eps=0.01)),
    "foreach": ("adamw", lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.3, eps=0.01, foreach=True)),
    "fused": ("adamw", lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.3, eps=0.01, fused=True)),
    "sgd": ("sgd", lambda p: torch.optim.SGD(p, 0.5, momentum=0.9, weight_decay=0.05)),
    "sphere": ("sphere", lambda p: HyperSphereOptimizer(named(p), lr=0.05)),
    "muon of the package": ("muon", lambda p: HyperSphereOptimizer(named(p), lr=0.05, weight_decay=0.1, sphere=False)),
    "muon of torch": ("muon", lambda p: torch.optim.Muon(p, 0.05, weight_decay=0.1)),
}


def trained(model, plan, make, x, *, steps=4, closure=False):
    """The outputs before each step and after the last one."""
    optimizer = make(list(model.parameters()))
    step = ScaledStep(optimizer, plan, model)
    outputs = []

    def loss():
        optimizer.zero_grad()
        y = model(x)
        outputs.append(y.detach().clone())
        value = (y.tanh() - x.sin()).square().mean()
        value.backward()
        return value

    for _ in range(steps):
        if closure:
            optimizer.step(loss)
        else:
            loss()
            optimizer.step()
    step.remove()
    return torch.stack([*outputs, model(x).detach()])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rows_train_like_a_multiplier_in_the_module(name, layout):
    kind, make = OPTIMIZERS[name]
    model = Attention(layout, bias=kind in ("adamw", "sgd")).double()
    x = 2 * torch.randn(3, 5, 8, dtype=torch.float64)
    plan = make_plan(model, layout, kind)
    initialize(model, plan, seed=int(torch.randint(1 << 30, ())))
    explicit, wrong = copy.deepcopy(model), copy.deepcopy(model)
    explicit.factor = M
    with torch.no_grad():
        rows = query_rows(layout)
        if layout == "transposed":
            explicit.weight[:, rows] /= M
        else:
            explicit.weight[rows] /= M
        if explicit.bias is not None:
            explicit.bias[rows] /= M
    want = trained(explicit, without_rows(plan), make, x)
    torch.testing.assert_close(trained(model, plan, make, x, closure=name == "adamw"), want, rtol=1e-9, atol=1e-12)
    moved = (want[-1] - want[0]).abs().max()
    assert (trained(wrong, without_rows(plan), make, x)[-1] - want[-1]).abs().max() > 0.003 * moved


def test_rows_are_drawn_with_their_factor():
    model = Attention("head by head")
    plan = make_plan(model, "head by head", "adamw")
    initialize(model, plan, seed=3)
    plain = Attention("head by head")
    initialize(plain, without_rows(plan), seed=3)
    for name in ("weight", "bias"):
        factor = getattr(model, name) / getattr(plain, name)
        want = torch.ones(24)
        want[query_rows("head by head")] = M
        torch.testing.assert_close(factor.reshape(24, -1), want[:, None].expand(24, factor.numel() // 24))


def test_an_update_that_raises_leaves_weights_and_gradients_right():
    class Raising(torch.optim.SGD):
        def step(self, closure=None):
            self.param_groups[0]["params"][0].data.add_(1.0)  # half done
            raise RuntimeError

    model = Attention("q, k, v").double()
    plan = make_plan(model, "q, k, v", "sgd")
    initialize(model, plan)
    model(torch.randn(1, 3, 8, dtype=torch.float64)).sum().backward()
    before, slopes = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()]
    step = ScaledStep(Raising(model.parameters(), 0.1), plan, model)
    with pytest.raises(RuntimeError):
        step.optimizer.step()
    assert not torch.equal(model.bias, before["bias"])  # without its multiplier, as the optimizer sees it
    step.restore()
    torch.testing.assert_close(model.weight[:8], before["weight"][:8] + M)
    torch.testing.assert_close(model.bias, before["bias"])
    assert all(torch.equal(p.grad, slope) for p, slope in zip(model.parameters(), slopes, strict=True))


def test_bfloat16_rows_do_not_move_without_a_step():
    """Dividing and multiplying again would change them by rounding."""
    model = Attention("q, k, v").bfloat16()
    plan = make_plan(model, "q, k, v", "sgd", factor=0.6)
    nn.init.normal_(model.weight)
    before = model.weight.detach().clone()
    assert not torch.equal(before[:8] / 0.6 * 0.6, before[:8])
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ScaledStep(optimizer, plan, model)
    optimizer.step()
    assert torch.equal(model.weight, before)


def test_parameter_groups_refuse_what_no_group_can_hold():
    model = Attention("q, k, v")
    plan = make_plan(model, "q, k, v", "adamw")
    with pytest.raises(ValueError, match=r"0\.3.*query rows of weight, bias.*MuECallback.*ScaledStep"):
        param_groups(model, plan, lr=0.1)
    groups = param_groups(model, without_rows(plan), lr=0.1)
    assert groups[0]["lr"] == 0.05


def test_plans_keep_rows_when_they_are_saved(tmp_path):
    plan = make_plan(Attention("transposed"), "transposed", "adamw")
    plan.save(tmp_path / "plan.yaml")
    assert ScalingPlan.load(tmp_path / "plan.yaml") == plan
    assert any("rows" in line for line in plan.diff(without_rows(plan)))
    old = plan.to_dict()
    for entry in old["parameters"]:
        del entry["rows"], entry["trainable"]  # as older versions wrote them
    assert ScalingPlan.from_dict(old) == without_rows(plan)


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_finds_its_part_of_the_rows(layout, placement):
    """Uneven shards over 5 ranks, each rank played in turn: together they step as the whole weight does."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dim, count, period = LAYOUTS[layout]
    shape = (8, 24) if layout == "transposed" else (24, 8)
    entry = ParameterPlan(
        "w", "hidden", shape, "w", Init("normal", 1.0), 1, 1, 1, "sgd", "", rows=FoldedRows(dim, count, period, M)
    )
    whole = torch.randn(shape, dtype=torch.float64)
    factor = torch.ones(24, dtype=torch.float64)
    factor[query_rows(layout)] = M
    factor = factor if dim else factor[:, None]
    want_inside, want_after = whole / factor, whole + factor
    for rank in range(5):
        dist.init_process_group("fake", rank=rank, world_size=5, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (5,))
            part, inside, after = (
                distribute_tensor(t.clone(), mesh, [placement], src_data_rank=None)
                for t in (whole, want_inside, want_after)
            )
            parameter = part.requires_grad_()
            parameter.grad = torch.ones_like(part)
            folds = RowFolds([(parameter, entry)])
            folds.unfold()
            torch.testing.assert_close(local(parameter).detach(), local(inside))
            local(parameter).data.add_(1.0)
            folds.fold()
            torch.testing.assert_close(local(parameter).detach(), local(after))
            assert torch.equal(local(parameter.grad), torch.ones_like(local(part)))
        finally:
            dist.destroy_process_group()
