from __future__ import annotations

import copy

import pytest
import torch
from helpers.layers import Layers
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import SGD, AdamW

from lightning_mue import MoELanguageModel, initialize, param_groups, plan
from lightning_mue.moe import MoELayer
from lightning_mue.parameterizations import ScaledStep
from lightning_mue.parameterizations.applying.families import family_of
from lightning_mue.parameterizations.applying.initial_weights import set_multipliers
from lightning_mue.parameterizations.applying.keeps_multipliers import KeepsMultipliers
from lightning_mue.parameterizations.planning.multipliers import fold
from lightning_mue.parameterizations.reading.sites import read_multipliers

BASE = {"width": 32, "n_heads": 2, "n_experts": 0}


def make_model(**kwargs):
    return MoELanguageModel(**{"context_length": 16, "width": 64, "n_heads": 4, "depth": 2, "n_experts": 4, **kwargs})


def step(model, optimizer):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_weights_depend_on_seed_and_name_only():
    scaling = plan(make_model(), base=BASE)
    torch.manual_seed(1)
    first = make_model()
    initialize(first, scaling, seed=5)
    torch.manual_seed(2)
    second = make_model()
    torch.rand(100)
    initialize(second, scaling, seed=5)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    initialize(second, scaling, seed=6)
    assert not torch.equal(first.transformer.embedding.weight, second.transformer.embedding.weight)
    w_q = [block.attention.w_q for block in first.transformer.blocks]
    assert not torch.equal(w_q[0], w_q[1])


def test_weights_have_the_planned_spread():
    model = make_model()
    scaling = plan(model, base=BASE)
    initialize(model, scaling)
    for name, p in model.named_parameters():
        init = scaling[name].init
        if init.kind == "constant":
            assert bool((p == init.value).all())
        else:
            # Five standard errors of the sample standard deviation.
            assert p.detach().std().item() == pytest.approx(init.value, rel=5 / (2 * p.numel()) ** 0.5)


def test_plan_of_another_model_is_refused():
    with pytest.raises(ValueError, match=r"plan: found one of another model: \d+ parameter\(s\) differ.*w_up"):
        initialize(make_model(expert_width=16), plan(make_model(), base=BASE))


def test_groups_carry_the_factors():
    model = make_model()
    scaling = plan(model, base=BASE)
    groups = param_groups(model, scaling, lr=0.1, weight_decay=0.2, eps=1e-6)
    assert len({group["name"] for group in groups}) == len(groups)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = []
    for group in groups:
        for p in group["params"]:
            entry = scaling[names[id(p)]]
            assert group["lr"] == 0.1 * entry.lr
            assert group["weight_decay"] == 0.2 * entry.weight_decay
            assert group["eps"] == 1e-6 * entry.eps
            seen.append(entry.name)
    assert sorted(seen) == sorted(names.values())


def test_swapped_step_equals_explicit_groups():
    """What the callback does during the step is what param_groups gives to people who ask for it."""
    explicit = make_model()
    scaling = plan(explicit, base=BASE)
    swapped = copy.deepcopy(explicit)
    one = AdamW(param_groups(explicit, scaling, lr=0.01, weight_decay=0.1, eps=1e-8))
    other = AdamW(swapped.parameters(), lr=0.01, weight_decay=0.1, eps=1e-8)
    ScaledStep(other, scaling, swapped)
    for _ in range(3):
        step(explicit, one)
        step(swapped, other)
    for (name, a), b in zip(explicit.named_parameters(), swapped.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_groups_for_muon_and_adamw_equal_their_swapped_steps(adjust):
    explicit = Layers()
    hidden = {"up.weight", "down.weight"}
    families = {name: "muon" if name in hidden else "adam" for name, _ in explicit.named_parameters()}
    scaling = plan(explicit, base={"width": 8}, rule="hyperp", family=families)
    muon = param_groups(explicit, scaling, lr=0.02, kinds={"muon"}, weight_decay=0.1, adjust_lr_fn=adjust)
    adam = param_groups(explicit, scaling, lr=0.01, kinds={"adamw"}, weight_decay=0.1)
    assert [sum(len(group["params"]) for group in groups) for groups in (muon, adam)] == [2, 6]
    assert all("eps" not in group for group in muon)
    swapped = copy.deepcopy(explicit)
    own = [p for name, p in swapped.named_parameters() if name in hidden]
    rest = [p for name, p in swapped.named_parameters() if name not in hidden]
    pairs = [
        (torch.optim.Muon(muon), torch.optim.Muon(own, lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust)),
        (AdamW(adam), AdamW(rest, lr=0.01, weight_decay=0.1)),
    ]
    before = copy.deepcopy(explicit)
    for one, other in pairs:
        ScaledStep(other, scaling, swapped)
        for _ in range(2):
            step(explicit, one)
            step(swapped, other)
    for (name, a), b, c in zip(explicit.named_parameters(), swapped.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name


def test_betas_follow_batch_over_tokens():
    model = make_model()
    optimizer = AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95))
    ScaledStep(optimizer, plan(model, base={"tokens": 1e6}, tokens=4e6), model)
    seen = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(o.param_groups[0]["betas"]))
    step(model, optimizer)
    assert seen == [(pytest.approx(0.975), pytest.approx(0.9875))]
    with pytest.raises(ValueError, match=r"betas: found \(0\.9, 0\.95\), which become"):
        ScaledStep(optimizer, plan(model, base={"tokens": 1e9}, tokens=1e6), model)


def test_scaling_twice_is_refused():
    model = make_model()
    scaling = plan(model, base=BASE)
    optimizer = AdamW(param_groups(model, scaling, lr=0.01))
    with pytest.raises(ValueError, match="not both"):
        ScaledStep(optimizer, scaling, model)


def test_foreign_parameters_are_refused():
    model = make_model()
    optimizer = AdamW([*model.parameters(), nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match=r"shape \[3\].*does not know"):
        ScaledStep(optimizer, plan(model, base=BASE), model)


def test_optimizer_families():
    parameters = [nn.Parameter(torch.zeros(1))]
    assert family_of(AdamW(parameters)) == "adam"
    assert family_of(SGD(parameters, lr=1.0)) == "sgd"
    with pytest.raises(ValueError, match="found Adagrad"):
        family_of(torch.optim.Adagrad(parameters))


def test_frozen_parameters_in_the_optimizer_are_left_alone():
    model = make_model()
    model.transformer.embedding.weight.requires_grad_(False)
    optimizer = AdamW(model.parameters(), lr=0.01)
    ScaledStep(optimizer, plan(model, base=BASE), model)
    before = model.transformer.embedding.weight.clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    assert torch.equal(model.transformer.embedding.weight, before)


def test_padding_row_stays_zero():
    class Padded(nn.Module):
        def __init__(self, width=32):
            super().__init__()
            self.hparams = {"width": width}
            self.embed, self.head = nn.Embedding(50, width, padding_idx=3), nn.Linear(width, 50)

    model = Padded(128)
    initialize(model, plan(model, base={"width": 32}, rule="mup"))
    assert float(model.embed.weight.detach()[3].abs().max()) == 0.0
    assert float(model.embed.weight.detach()[4].abs().max()) > 0.0
    # A frozen embedding keeps even a padding row that somebody filled.
    model.embed.weight.requires_grad_(False).fill_(2.0)
    initialize(model, plan(model, base={"width": 32}, rule="mup"))
    assert bool((model.embed.weight == 2.0).all())


class Multiplied(nn.Module):
    """y = m V (W x): the multiplier m sits behind W."""

    def __init__(self, m, scale):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.m = m
        self.w = nn.Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64) * scale)
        self.v = nn.Parameter(torch.randn(2, 6, generator=generator, dtype=torch.float64))

    def forward(self, x):
        return torch.tanh(self.m * (x @ self.w.T)) @ self.v.T


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_folding_a_multiplier_keeps_the_trajectory(kind):
    """docs/theory.md section 2: the function trains alike, to float64 round-off over 30 steps."""
    m = 0.3
    factors = fold({"init": 1.0, "lr": 1.0, "wd": 1.0, "eps": 1.0}, m, kind)
    losses = []
    for folded in (False, True):
        model = Multiplied(1.0 if folded else m, factors["init"] if folded else 1.0)
        lr, wd, eps = 0.05, 0.1, 1e-3
        f = factors if folded else dict.fromkeys(factors, 1.0)
        settings = {"params": [model.w], "lr": lr * f["lr"], "weight_decay": wd * f["wd"]}
        if kind == "adamw":
            optimizer = AdamW([{**settings, "eps": eps * f["eps"]}, {"params": [model.v], "lr": lr}])
        else:
            optimizer = SGD([settings, {"params": [model.v], "lr": lr}], lr=lr, momentum=0.9)
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        trace = []
        for _ in range(30):
            loss = (model(x) - x[:, :2].sin()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trace.append(float(loss.detach()))
        losses.append(trace)
    assert losses[0] == pytest.approx(losses[1], rel=1e-11)
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_multipliers_are_read_set_and_checked():
    model = make_model()
    values = {path: value * 2 for path, value in read_multipliers(model).items()}
    set_multipliers(model, values)
    assert read_multipliers(model) == values
    assert model.transformer.blocks[0].residual_multiplier == 2.0
    with pytest.raises(
        ValueError,
        match=r"found transformer\.blocks\.0\.gain, expected paths that MoELanguageModel exposes",
    ):
        set_multipliers(model, {"transformer.blocks.0.gain": 1.0})


class Bare(nn.Module):
    """A residual block's FFN that exposes no multiplier."""

    def __init__(self, width=16, hidden=32):
        super().__init__()
        self.hparams = {"width": width, "hidden": hidden}
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.up.mue_roles = {"weight": "ffn_up"}
        self.down.mue_roles = {"weight": "ffn_down"}

    def mue_axes(self):
        return {"width": self.hparams["width"], "active_width": self.hparams["hidden"]}


def test_ffn_multiplier_is_folded_where_no_module_exposes_it():
    scaling = plan(Bare(32, 256), base={"width": 16, "hidden": 32})
    d, a = 2.0, 8.0
    c = d / a
    assert scaling["down.weight"].lr == pytest.approx(c / d)
    assert scaling["down.weight"].weight_decay == pytest.approx(d / c)
    assert scaling.multipliers == {}


def test_multiplier_that_cannot_be_folded_is_asked_for():
    class Deep(Bare):
        def mue_axes(self):
            return {**super().mue_axes(), "depth": 4 if self.hparams["width"] == 32 else 2}

    with pytest.raises(ValueError, match=r"needs the residual multiplier L\^-alpha = 0\.5.*mue_multipliers"):
        plan(Deep(32, 32), base={"width": 16, "hidden": 32})


def test_a_foreign_module_keeps_the_multipliers_of_its_layers():
    class Own(LightningModule):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["own"] = 3

        def on_load_checkpoint(self, checkpoint):
            self.loaded = checkpoint["own"]

    class Model(KeepsMultipliers, Own):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([MoELayer(8, 4, 4), MoELayer(8, 4, 4)])

    saved, restored, checkpoint = Model(), Model(), {}
    saved.layers[1].output_multiplier, saved.layers[0].route_scale = 0.25, 2.0
    saved.on_save_checkpoint(checkpoint)
    restored.on_load_checkpoint(checkpoint)
    assert restored.loaded == 3
    assert [layer.output_multiplier for layer in restored.layers] == [1.0, 0.25]
    assert [layer.route_scale for layer in restored.layers] == [2.0, 1.0]
