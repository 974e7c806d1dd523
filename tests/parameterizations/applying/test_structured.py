"""Initial values with a structure keep it when a plan draws the weights, at every size of the base."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mue import initialize, plan
from lightning_mue.parameterizations import Init, ParameterPlan, get_rule
from lightning_mue.parameterizations.applying.drawing import draw_, scale_
from lightning_mue.parameterizations.applying.initial_weights import check_draws, choose_draws


def waves(width):
    return (torch.arange(6.0)[:, None] / 10 ** torch.linspace(0, 2, width)).sin()


class Structured(nn.Module):
    """Orthogonal, identity, zero, wave-like and blockwise weights beside plain ones."""

    def __init__(self, width=4, more=1):
        super().__init__()
        self.hparams = {"width": width, "more": more}
        self.positions = nn.Embedding(6, width)
        self.stem, self.orthogonal, self.identity, self.plain, self.zero = (
            nn.Linear(i, width) for i in (3, width, width, width, width)
        )
        self.conv, self.rnn = nn.Conv1d(width, width, 3), nn.LSTM(width, width)
        self.blocks = nn.Parameter(torch.empty(2 * width, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)
        self.extra = nn.ModuleList(nn.Linear(width, width) for _ in range(more))
        with torch.no_grad():
            self.positions.weight.copy_(waves(width))
            self.blocks[:width].normal_(std=0.1)
            self.blocks[width:].normal_(std=0.3)
            self.rnn.bias_ih_l0[width : 2 * width].fill_(1.0)
        for layer in (self.stem, self.orthogonal, self.head):
            nn.init.orthogonal_(layer.weight)
        nn.init.eye_(self.identity.weight)
        nn.init.zeros_(self.zero.weight)
        nn.init.dirac_(self.conv.weight)


KEPT = ("positions.weight", "orthogonal.weight", "identity.weight", "zero.weight", "conv.weight", "rnn.bias_ih_l0")


def drawn(target, base, **kwargs):
    before = {name: p.detach().clone() for name, p in target.named_parameters()}
    made = plan(target, base=base, rule="mup", roles={"^blocks": "hidden"}, **kwargs)
    initialize(target, made)
    after = {name: p.detach() for name, p in target.named_parameters()}
    return before, after, made


@pytest.mark.parametrize("base", [{"width": 2}, {"width": 4}, {"width": 16}, {"width": 64, "more": 1}])
def test_structure_stays_at_every_size_of_the_base(base):
    torch.manual_seed(0)
    before, after, _ = drawn(Structured(64, more=2), base)
    for name in KEPT:
        assert torch.equal(before[name], after[name]), name
    for name in ("stem.weight", "head.weight"):  # scaled, and orthogonal still
        w = after[name]
        gram = w.T @ w if name == "stem.weight" else w @ w.T
        assert torch.allclose(gram, gram[0, 0] * torch.eye(3), atol=1e-5 * float(gram[0, 0]))
        assert torch.allclose(w / w.norm(), before[name] / before[name].norm(), atol=1e-6)
    for name in ("plain.weight", "rnn.weight_hh_l0"):  # control: plain draws are drawn anew
        assert not torch.equal(before[name], after[name])


def test_scaled_form_has_the_size_that_the_rule_asks_for():
    """mup: an input layer's entries keep their size, a head's fall as 1/width, hidden ones as width^-1/2."""
    torch.manual_seed(0)
    before, after, _ = drawn(Structured(64), {"width": 16})
    rms = {name: float(w.square().mean().sqrt()) for name, w in after.items()}
    assert rms["stem.weight"] == pytest.approx(16**-0.5, rel=1e-5)
    assert rms["head.weight"] == pytest.approx(16**-0.5 / 4, rel=1e-5)
    assert rms["orthogonal.weight"] == pytest.approx(64**-0.5, rel=1e-5)
    # Blocks of std 0.1 and 0.3, times 4^-1/2, in the same proportion.
    first, second = after["blocks"].chunk(2)
    assert rms["blocks"] == pytest.approx(0.05**0.5 / 2, rel=1e-5)
    assert float(first.std() / second.std()) == pytest.approx(
        float(before["blocks"][:64].std() / before["blocks"][64:].std())
    )


def test_drawing_twice_changes_nothing():
    target = Structured(64)
    _, once, made = drawn(target, {"width": 16})
    once = {name: w.clone() for name, w in once.items()}
    initialize(target, made)
    assert all(torch.equal(once[name], p) for name, p in target.named_parameters())


def entry(kind, value, shape):
    return ParameterPlan("w", "hidden", shape, "w", Init(kind, value), 1.0, 1.0, 1.0, "adamw", "")


def test_truncated_draws_end_at_two_standard_deviations():
    w = torch.empty(400, 500)
    draw_(w, entry("truncated", 0.3, (400, 500)), 0)
    sigma = 0.3 / 0.8796256610342398
    assert float(w.std()) == pytest.approx(0.3, rel=5 / (2 * w.numel()) ** 0.5)
    assert float(w.abs().max()) == pytest.approx(2 * sigma, rel=1e-3)
    # Of a normal distribution between -2 and 2, this part lies within one of its standard deviations.
    assert float((w.abs() < sigma).float().mean()) == pytest.approx(0.682689 / 0.954500, abs=0.005)
    draw_(v := torch.empty(400, 500), entry("normal", 0.3, (400, 500)), 0)
    assert float(v.abs().max()) > 1.5 * 2 * sigma


def test_scaling_leaves_zeros_and_what_fits():
    w = torch.zeros(3, 3)
    scale_(w, entry("scaled", 0.5, (3, 3)))
    assert not w.any()
    w = torch.randn(50, 50)
    before = w.clone()
    scale_(w, entry("scaled", float(w.square().mean().sqrt()) * 1.02, (50, 50)))  # within the noise of 2500 entries
    assert torch.equal(w, before)


def test_multiplier_is_not_folded_into_values_that_are_kept():
    class Deep(nn.Module):
        def __init__(self, depth=2, kept=True):
            super().__init__()
            self.hparams = {"depth": depth, "kept": kept}
            self.embed = nn.Embedding(7, 8)
            self.layers = nn.ModuleList(
                nn.ModuleDict({"norm": nn.LayerNorm(8), "fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})
                for _ in range(depth)
            )
            for layer in self.layers if kept else ():
                nn.init.eye_(layer["fc2"].weight)
            self.head = nn.Linear(8, 7)

    with pytest.raises(ValueError, match=r"residual multiplier.*layers\.0\.fc2\.weight, whose initial values are kept"):
        plan(Deep(4), base={"depth": 2}, rule="complete-p")
    assert plan(Deep(4, False), base={"depth": 2}, rule="complete-p")["layers.0.fc2.weight"].init_factor == 0.5


def test_experts_that_start_alike_cannot_each_keep_a_form():
    class Moe(nn.Module):
        def __init__(self, width=8, experts=4):
            super().__init__()
            self.hparams = {"width": width, "experts": experts}
            self.embed, self.norm, self.head = nn.Embedding(10, width), nn.LayerNorm(width), nn.Linear(width, 10)
            self.moe = nn.Module()
            self.moe.gate, self.moe.top_k = nn.Linear(width, experts, bias=False), 2
            self.moe.experts = nn.ModuleList(
                nn.ModuleDict({"fc1": nn.Linear(width, 12), "fc2": nn.Linear(12, width)}) for _ in range(experts)
            )
            for expert in self.moe.experts:
                nn.init.orthogonal_(expert["fc1"].weight)

    with pytest.raises(ValueError, match=r"experts of a layer start alike, and moe\.experts\.0\.fc1\.weight"):
        plan(Moe(16), base={"width": 8}, rule=get_rule("mssp-III"))


def test_only_what_changes_or_matches_is_drawn():
    made = plan(Structured(64, more=2), base={"width": 16}, rule="mup", roles={"^blocks": "hidden"})
    deeper = plan(Structured(8, more=2), base={"width": 8, "more": 1}, rule="mup", roles={"^blocks": "hidden"})

    def drawn_names(a_plan, draws):
        return {p.name for p in choose_draws(a_plan, draws).parameters if p.init.kind != "keep"}

    wide = drawn_names(made, "changed")
    assert {"plain.weight", "stem.weight", "head.weight"} <= wide
    assert "head.bias" not in wide  # of 3 entries at every width
    assert drawn_names(deeper, "changed") == set()
    assert drawn_names(made, ["^plain", r"head\.weight$"]) == {"plain.weight", "plain.bias", "head.weight"}
    assert (
        drawn_names(made, True)
        == drawn_names(made, False)
        == {p.name for p in made.parameters if p.init.kind != "keep"}
    )
    assert "as it is" in str(choose_draws(made, ["^plain"]))
    with pytest.raises(ValueError, match=r"initialize: found \['nothing'\], which match no parameter"):
        choose_draws(made, ["nothing"])


@pytest.mark.parametrize("wrong", ["head", 3, None, ["("], [3]])
def test_other_forms_are_refused(wrong):
    with pytest.raises(ValueError, match=r"initialize: found .*expected (true, false, 'changed' or a list|a regular)"):
        check_draws(wrong)
