from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from torch import nn

from lightning_mue import MoELanguageModel, MoELayer, ScalingPlan, initialize, plan
from lightning_mue.parameterizations.reading.initial.initializer import measure_init

BASE = {"width": 32, "n_heads": 2, "n_experts": 0}


def make_model(**kwargs):
    return MoELanguageModel(**{"context_length": 16, "width": 64, "n_heads": 4, "depth": 2, "n_experts": 4, **kwargs})


class Net(nn.Module):
    """A module that declares nothing; `hparams` as a LightningModule has them."""

    def __init__(self, width=32, classes=10):
        super().__init__()
        self.hparams = {"width": width, "classes": classes}
        self.inner = nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, width))
        self.head = nn.Linear(width, classes)


def test_every_parameter_has_exactly_one_entry():
    model = make_model(shared_width=16, moe_every=2)
    names = [p.name for p in plan(model, base=BASE).parameters]
    assert names == [name for name, _ in model.named_parameters()]


def test_target_equal_to_base_is_the_identity():
    for base in (None, {}, {"width": 64}):
        scaling = plan(make_model(), base=base)
        assert scaling.same_size
        assert all((p.lr, p.weight_decay, p.eps) == (1.0, 1.0, 1.0) for p in scaling.parameters)


def test_making_a_plan_leaves_the_global_generator_alone():
    model = make_model()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    plan(model, base=BASE)
    assert torch.equal(torch.rand(4), expected)


def test_dense_base_to_experts():
    model = make_model()
    scaling = plan(model, base=BASE)
    down = scaling["transformer.blocks.1.ffn.experts.w_down"]
    assert down.base == "transformer.blocks.1.ffn.w_down"
    base_width, active = 96, 2 * model.expert_width
    # sigma_down = sqrt(A) / d times the base's own, fan_in^-1/2, measured: 3 standard errors of 3072 draws are 4 %.
    assert down.init.value == pytest.approx(base_width**-0.5 * math.sqrt(active / base_width) / 2, rel=0.04)
    assert scaling.multipliers["transformer.blocks.1.ffn.output_multiplier"] == pytest.approx(2 * base_width / active)
    assert scaling.multipliers["transformer.blocks.1.ffn.route_scale"] == 2.0


def test_zero_router_with_sparse_routing_is_refused_under_every_rule():
    def zeroed(**kwargs):
        model = make_model(**kwargs)
        for layer in model.moe_layers:
            nn.init.zeros_(layer.router.weight)
        return model

    soft = zeroed(width=32, n_heads=2, top_k=4)
    for rule in ("complete-mue", "moe-dmft", "mssp-II", "sp"):
        with pytest.raises(ValueError, match=r"base: found the router \S*router\.weight, which starts at exactly zero"):
            plan(make_model(), base=soft, rule=rule)
        entry = plan(make_model(top_k=4), base=soft, rule=rule)["transformer.blocks.0.ffn.router.weight"]
        assert (entry.init.kind, entry.init.value) == ("constant", 0.0)


def test_router_of_a_dense_base_gets_unit_variance_logits_at_the_base_width():
    router = plan(make_model(), base=BASE)["transformer.blocks.0.ffn.router.weight"]
    assert router.base is None
    assert router.init.kind == "normal"
    assert router.init.value == pytest.approx(math.sqrt(32) / 64, rel=1e-12)
    assert router.lr == pytest.approx(0.5)


def test_layers_are_matched_by_relative_position():
    scaling = plan(make_model(depth=6), base={"depth": 2})
    bases = [scaling[f"transformer.blocks.{i}.attention.w_q"].base.split(".")[2] for i in range(6)]
    assert bases == ["0", "0", "0", "1", "1", "1"]


def test_blocks_of_different_active_width_scale_by_their_own():
    """Every second block is MoE; the others are dense and must not take the MoE's active width."""
    model = make_model(moe_every=2, ffn_width=128, expert_width=32)
    scaling = plan(model, base={"n_experts": 0, "ffn_width": 64})
    assert scaling.multipliers["transformer.blocks.0.ffn.output_multiplier"] == pytest.approx(64 / 128)
    assert scaling.multipliers["transformer.blocks.1.ffn.output_multiplier"] == pytest.approx(64 / 64)


def test_tied_embedding_is_drawn_and_learns_as_an_embedding():
    scaling = plan(make_model(tie_embeddings=True), base={**BASE, "tie_embeddings": True})
    entry = scaling["transformer.embedding.weight"]
    assert entry.role == "unembedding"
    assert entry.init.value == pytest.approx(0.02, rel=0.04)
    assert scaling.multipliers["transformer.unembedding.output_multiplier"] == 0.5
    assert entry.lr == 1.0
    assert "tied" in entry.source


def test_sde_factors_need_both_runs():
    with pytest.raises(ValueError, match=r"tokens: .*base\.tokens"):
        plan(make_model(), base={**BASE, "tokens": 1e6})
    with pytest.raises(ValueError, match=r"batch_tokens: "):
        plan(make_model(), base=BASE, batch_tokens=1e3)
    scaling = plan(make_model(), base={"tokens": 1e6}, tokens=4e6)
    assert not scaling.same_size
    assert scaling["transformer.embedding.weight"].lr == pytest.approx(0.5)
    assert scaling.betas == pytest.approx(0.25)
    assert {p.init.kind for p in scaling.parameters} == {"keep"}


def test_plan_survives_yaml_and_diffs(tmp_path):
    scaling = plan(make_model(), base=BASE)
    scaling.save(tmp_path / "plan.yaml")
    loaded = ScalingPlan.load(tmp_path / "plan.yaml")
    assert loaded == scaling
    assert loaded.diff(scaling) == []
    lines = plan(make_model(top_k=1), base=BASE).diff(scaling)
    assert any(line.startswith("transformer.blocks.0.ffn.route_scale: 1.0 -> 2.0") for line in lines)
    assert any("axes" in line for line in lines)


def test_plan_on_meta_equals_plan_on_cpu():
    with torch.device("meta"):
        model = make_model()
    assert plan(model, base=BASE) == plan(make_model(), base=BASE)


@pytest.mark.parametrize(
    ("width", "made_on_meta"), [(64, [True]), (32, [True, False])], ids=["same size", "another size"]
)
def test_real_weights_of_the_base_are_made_only_where_the_plan_changes_something(width, made_on_meta):
    made = []

    def base():
        net = Net(width)
        made.append(net.head.weight.is_meta)
        return net

    plan(Net(64), base=base, rule="mup")
    assert made == made_on_meta


def test_base_as_module_and_factory():
    expected = plan(make_model(), base=BASE)
    torch.manual_seed(0)
    by_factory = plan(make_model(), base=lambda: make_model(**BASE))
    assert by_factory == expected
    by_module = plan(make_model(), base=make_model(**BASE))
    assert [p.lr for p in by_module.parameters] == [p.lr for p in expected.parameters]


def test_roles_of_an_undeclared_module_come_from_what_grows():
    scaling = plan(Net(128), base={"width": 32}, rule="mup")
    roles = {p.name: p.role for p in scaling.parameters}
    assert roles == {
        "inner.0.weight": "embedding",
        "inner.0.bias": "bias",
        "inner.1.weight": "norm",
        "inner.1.bias": "norm",
        "inner.2.weight": "hidden",
        "inner.2.bias": "bias",
        "head.weight": "unembedding",
        "head.bias": "bias",
    }
    assert scaling["inner.2.weight"].lr == pytest.approx(1 / 4)
    assert scaling["inner.2.weight"].init.kind == "uniform"


def test_patterns_win_over_declarations_and_inference():
    scaling = plan(Net(128), base={"width": 32}, rule="mup", roles={r"head\.weight": "hidden"})
    assert scaling["head.weight"].role == "hidden"
    with pytest.raises(ValueError, match=r"roles: found pattern\(s\) \['lm_head'\], which match no parameter"):
        plan(Net(128), base={"width": 32}, rule="mup", roles={"lm_head": "hidden"})
    with pytest.raises(ValueError, match=r"roles\['head'\]: found 'matrix', expected one of 'embedding'"):
        plan(Net(128), base={"width": 32}, rule="mup", roles={"head": "matrix"})


def test_frozen_parameters_are_planned_but_not_drawn():
    model = make_model()
    weight = model.transformer.embedding.weight.requires_grad_(False)
    before = weight.clone()
    scaling = plan(model, base=BASE)
    assert scaling["transformer.embedding.weight"].role == "embedding"
    initialize(model, scaling)
    assert torch.equal(weight, before)
    assert plan(model, base={"width": 64}).same_size


def test_frozen_parameter_of_unknown_role_stays_outside():
    class Backbone(Net):
        def __init__(self, width=32):
            super().__init__(width)
            self.hparams = {"width": width}
            self.table = nn.Parameter(torch.zeros(3, 3, 3), requires_grad=False)

    model = Backbone(128)
    scaling = plan(model, base={"width": 32}, rule="mup")
    assert "table" not in [p.name for p in scaling.parameters]
    initialize(model, scaling)


def test_blocks_of_one_kind_scale_from_blocks_of_that_kind():
    """Only the depth changes: each output multiplier keeps its value, though dense and MoE blocks differ in width."""
    sizes = {"moe_every": 2, "ffn_width": 128, "expert_width": 128, "top_k": 2}
    scaling = plan(make_model(depth=4, **sizes), base={"depth": 2})
    multipliers = [scaling.multipliers[f"transformer.blocks.{i}.ffn.output_multiplier"] for i in range(4)]
    assert multipliers == [1.0] * 4
    assert {scaling[f"transformer.blocks.{i}.attention.w_q"].lr for i in range(4)} == {1.0}


def test_base_with_fewer_blocks_than_moe_every_is_a_dense_base():
    model = make_model(depth=4, moe_every=4)
    shallow, dense = (plan(model, base=base) for base in ({"depth": 2}, {"depth": 2, "n_experts": 0}))
    assert shallow == dense
    assert shallow.multipliers["transformer.blocks.3.ffn.route_scale"] == 2.0


def test_moe_base_to_dense_target_takes_the_route_scale_with_it():
    """The way back: a sum of two gated experts with route scale 2 becomes one dense FFN of the same active width."""
    base = {"n_experts": 4, "route_scale": 2.0}
    scaling = plan(make_model(n_experts=0), base=base)
    down = scaling["transformer.blocks.0.ffn.w_down"]
    plain = plan(make_model(n_experts=0), base={**base, "route_scale": 1.0})["transformer.blocks.0.ffn.w_down"]
    assert (down.lr, down.init.value) == (1.0, pytest.approx(2 * plain.init.value))
    assert scaling["transformer.blocks.0.ffn.w_up"].eps == pytest.approx(2.0)


class ForeignFFN(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.hparams = {"width": width}
        self.embed = nn.Embedding(10, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, 10)

    roles: ClassVar = {r"up\.weight": "ffn_up", r"down\.weight": "ffn_down"}


def test_ffn_that_declares_nothing_scales_by_its_own_sides():
    mue, p = (
        plan(ForeignFFN(128), base={"width": 32}, rule=r, roles=ForeignFFN.roles)
        for r in ("complete-mue", "complete-p")
    )
    for name in ("up.weight", "down.weight", "head.weight", "embed.weight"):
        assert (mue[name].lr, mue[name].weight_decay) == pytest.approx((p[name].lr, p[name].weight_decay))
        assert mue[name].init.value == pytest.approx(p[name].init.value)
    assert mue["down.weight"].lr == pytest.approx(1 / 4)


def test_default_rule_works_on_a_module_without_ffn():
    scaling = plan(Net(128), base={"width": 32})
    assert scaling["inner.2.weight"].lr == pytest.approx(1 / 4)
    assert "width 32 -> 128" in str(scaling)


def test_linear_layer_on_an_embedding_is_a_tied_unembedding():
    class Tied(nn.Module):
        def __init__(self, width=32):
            super().__init__()
            self.hparams = {"width": width}
            self.wte, self.norm = nn.Embedding(50, width), nn.LayerNorm(width)
            self.lm_head = nn.Linear(width, 50, bias=False)
            self.lm_head.weight = self.wte.weight

    scaling = plan(Tied(128), base={"width": 32}, rule="mup")
    entry = scaling["wte.weight"]
    assert entry.role == "unembedding"
    assert entry.lr == 1.0
    assert entry.init.value == pytest.approx(1, rel=0.1)
    assert scaling["norm.weight"].init.value == 1 / 4


def test_raw_parameter_needs_a_role():
    class Positions(Net):
        def __init__(self, width=32):
            super().__init__(width)
            self.hparams = {"width": width}
            self.table = nn.Parameter(torch.randn(16, width))  # looked up, or multiplied with: who knows?

    with pytest.raises(ValueError, match=r"roles: found no role for table \[16, 128\]"):
        plan(Positions(128), base={"width": 32}, rule="mup")


def test_layer_alone():
    scaling = plan(MoELayer(32, 64, 8, 2), base={"n_experts": 4})
    assert scaling["router.weight"].lr == 1.0
    assert scaling["experts.w_up"].lr == 1.0
    assert scaling.axes["n_experts"] == 8


def test_router_for_which_the_rule_claims_nothing_is_noted():
    assert any("gate=sqrt" in note for note in plan(make_model(gate="sqrt"), base=BASE).notes)
    assert any("scoring=sigmoid" in note for note in plan(make_model(scoring="sigmoid"), base=BASE).notes)
    assert any("gate=linear" in note for note in plan(make_model(), base=BASE, rule="hyperp", family="sphere").notes)
    assert plan(make_model(gate="sqrt"), base=BASE, rule="hyperp", family="sphere").notes == ()


def test_compiled_layers_keep_their_names():
    model, plain = make_model(), plan(make_model(), base=BASE)
    for block in model.transformer.blocks:
        block.ffn = torch.compile(block.ffn)
    assert plan(model, base=BASE) == plain


def test_axis_that_the_rule_does_not_claim_is_noted():
    notes = plan(make_model(depth=4), base={"depth": 2}, rule="mup").notes
    assert len(notes) == 1
    assert "depth" in notes[0]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"base": {"widht": 32}}, r"base\.widht: .*Did you mean 'width'"),
        ({"base": {"width": 30, "n_heads": 4}}, r"base: .*n_heads"),
        ({"base": BASE, "alpha": 0.3}, r"alpha: found 0\.3"),
        ({"base": BASE, "rule": "complete-p"}, r"no row for the role 'router'.*complete-mue"),
        ({"base": BASE, "family": "sgd"}, r"no table.*'sgd'"),
        ({"base": lambda: 3}, r"base: found a function that returned int"),
    ],
)
def test_bad_input(kwargs, message):
    with pytest.raises(ValueError, match=message):
        plan(make_model(), **kwargs)


def test_module_without_hyperparameters_is_told_what_to_do():
    class Closed(nn.Module):
        def __init__(self, width, depth=1):
            super().__init__()
            self.layer = nn.Linear(width, width)

    with pytest.raises(ValueError, match=r"its argument\(s\) width are not known.*save_hyperparameters"):
        plan(Closed(8), base={"depth": 2})


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.randn(64, 64) * 0.3, "normal"),
        (lambda: torch.rand(64, 64) - 0.5, "uniform"),
        (lambda: torch.ones(64), "constant"),
        (lambda: torch.zeros(3, 3), "constant"),
        (lambda: torch.arange(64.0), "keep"),
        (lambda: torch.empty(0), "keep"),
    ],
)
def test_recognises_distributions(make, kind):
    torch.manual_seed(0)
    tensor = make()
    init = measure_init(tensor)
    assert init.kind == kind
    if kind in ("normal", "uniform"):
        assert init.value == pytest.approx(float(tensor.std()), rel=0.01)


def test_table_shows_each_role_once_with_equal_layers_on_one_line():
    text = str(plan(make_model(), base=BASE))
    assert "complete-mue (adam, alpha=1)" in text
    assert "width 32 -> 64" in text
    assert "8 x transformer.blocks.*.attention.{w_q, w_k, w_v, w_o}" in text
    assert "forward multiplier  transformer.blocks.*.ffn.route_scale = 2" in text
