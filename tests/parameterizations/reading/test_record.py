"""Saved bases, presets, variants, several optimizer families, and rules side by side."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from lightning_mue import MoELanguageModel, initialize, plan
from lightning_mue.parameterizations import RULES, Role, ScalingPlan, get_rule
from lightning_mue.parameterizations.planning.compare import compare_rules
from lightning_mue.parameterizations.reading.base import save_base
from lightning_mue.parameterizations.reading.record import describe
from lightning_mue.parameterizations.rules.table import Preset

BASE = {"width": 32, "n_heads": 2, "n_experts": 0}
#: Files that earlier versions wrote.
DATA = Path(__file__).parents[1] / "data"


def make_model(**kwargs):
    return MoELanguageModel(**{"context_length": 16, "width": 64, "n_heads": 4, "depth": 2, "n_experts": 4, **kwargs})


class Mlp(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.hparams = {"width": width}
        self.first, self.inner, self.head = nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 10)


@pytest.mark.parametrize("make", [make_model, lambda: Mlp(64)], ids=["declared", "inferred"])
def test_saved_base_gives_the_same_plan(tmp_path, make):
    base = BASE if isinstance(make(), MoELanguageModel) else {"width": 32}
    save_base(make(), tmp_path / "base.yaml", base=base)
    assert plan(make(), base=tmp_path / "base.yaml") == plan(make(), base=base)
    assert plan(make(), base=str(tmp_path / "base.yaml")) == plan(make(), base=base)


def test_saved_base_needs_no_hyperparameters_of_the_target(tmp_path):
    class Closed(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 10))

    save_base(Closed(16), tmp_path / "base.yaml")
    scaling = plan(Closed(64), base=str(tmp_path / "base.yaml"), rule="mup")
    assert scaling["net.1.weight"].lr == 0.25
    model = Closed(64)
    initialize(model, scaling)
    assert float(model.net[2].weight.detach().std()) == pytest.approx(16**-0.5 / 3**0.5 / 4, rel=0.15)


def test_saved_base_knows_its_run(tmp_path):
    save_base(make_model(), tmp_path / "base.yaml", base={**BASE, "tokens": 1e6})
    assert plan(make_model(), base=str(tmp_path / "base.yaml"), tokens=4e6).betas == pytest.approx(0.25)
    with pytest.raises(ValueError, match=r"tokens: found base\.tokens without `tokens`"):
        plan(make_model(), base=str(tmp_path / "base.yaml"))


def test_files_of_earlier_versions_load():
    """A saved base and a plan, written by an earlier version, give the same plan, but for stds, which it measured on one draw."""
    base = {**BASE, "depth": 1, "tokens": 1e6}
    made = plan(make_model(shared_width=16, top_k=2), base=base, tokens=4e6)
    of_file = plan(make_model(shared_width=16, top_k=2), base=DATA / "base.yaml", tokens=4e6)
    old = ScalingPlan.load(DATA / "plan.yaml")
    assert of_file.diff(made, init=False) == old.diff(made, init=False) == []
    for p, q in zip(made.parameters, of_file.parameters, strict=True):
        assert (p.init.kind, p.init.value) == (q.init.kind, pytest.approx(q.init.value, rel=0.1))
    assert old.notes == made.notes
    assert str(old).startswith("complete-mue (adam, alpha=1)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"base: found the file '.*base\.yaml', which cannot be read.*--save-base"),
        ("width: 64", r"which is something else, expected a base of version 1"),
        ("just text", r"which is something else, expected a base of version 1"),
        ("a: [", r"which cannot be read"),
        ("lightning_mue_base: 1\nmodel: X", r"which is damaged"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "base.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        plan(make_model(), base=str(tmp_path / "base.yaml"))


def test_record_is_plain_yaml(tmp_path):
    record = describe(make_model(), measure=True)
    assert type(record).from_dict(yaml.safe_load(yaml.safe_dump(record.to_dict()))) == record


def test_constants_of_a_preset_apply_on_top_and_at_the_base_too():
    preset = Preset(
        "test", hyperparameters={"lr": 0.5}, factors={r"w_v$": {"init": 0.25, "lr": 0.125}, "w_down$": {"lr": 3.0}}
    )
    rule = replace(get_rule("complete-mue"), presets={"paper": preset})
    plain, scaling = plan(make_model(), base=BASE), plan(make_model(), base=BASE, rule=rule, preset="paper")
    for p, q in zip(plain.parameters, scaling.parameters, strict=True):
        init, lr = (0.25, 0.125) if p.name.endswith("w_v") else (1.0, 3.0 if p.name.endswith("w_down") else 1.0)
        assert (q.init.value, q.lr) == pytest.approx((p.init.value * init, p.lr * lr))
    assert any("lr 0.5" in note for note in scaling.notes)
    own = plan(make_model(), rule=rule, preset="paper")
    assert not own.same_size
    assert own["transformer.blocks.0.attention.w_v"].init.value == pytest.approx(0.25 * 64**-0.5, rel=0.05)
    with pytest.raises(ValueError, match=r"preset: found 'mine', expected a preset of complete-mue, which has 'paper'"):
        plan(make_model(), rule=rule, preset="mine")


def test_preset_brings_the_papers_base_where_none_is_given():
    rule = replace(get_rule("complete-mue"), presets={"paper": Preset("test", base=BASE)})
    assert plan(make_model(), rule=rule, preset="paper").parameters == plan(make_model(), base=BASE).parameters


def test_regime_is_inferred_from_the_axes_that_move_and_shown():
    moe = {"n_experts": 4, "top_k": 2, "expert_width": 32, "scoring": "sigmoid"}
    wider = plan(
        make_model(**{**moe, "expert_width": 64}), base={"width": 32, "n_heads": 2, "expert_width": 32}, rule="mssp"
    )
    assert wider.rule == "mssp-I"
    more = plan(
        make_model(**{**moe, "n_experts": 8, "top_k": 4}),
        base={"width": 32, "n_heads": 2, "n_experts": 4, "top_k": 2},
        rule="mssp",
    )
    assert more.rule == "mssp-II"
    both = plan(
        make_model(**{**moe, "n_experts": 8, "top_k": 4, "expert_width": 64}),
        base={"width": 32, "n_heads": 2, "n_experts": 4, "top_k": 2, "expert_width": 32},
        rule="mssp",
    )
    assert both.rule == "mssp-III"
    assert both["transformer.blocks.0.ffn.experts.w_up"].tied
    assert not more["transformer.blocks.0.ffn.experts.w_up"].tied
    given = plan(make_model(**moe), base={"width": 32, "n_heads": 2}, rule="mssp-III")
    assert given.rule == "mssp-III"


def test_change_of_sparsity_is_noted_where_the_rule_needs_it_fixed():
    sigmoid = {"scoring": "sigmoid", "expert_width": 64}
    same = plan(make_model(n_experts=8, top_k=4, **sigmoid), base={"n_experts": 4, "top_k": 2}, rule="moe-dmft")
    other = plan(make_model(n_experts=8, top_k=2, **sigmoid), base={"n_experts": 4}, rule="moe-dmft")
    assert not any("kappa" in note for note in same.notes)
    assert any("kappa changes by a factor of 0.5" in note for note in other.notes)
    assert any(note.startswith("alpha_star = ") and "another limit" in note for note in other.notes)
    deeper = plan(make_model(depth=4, **sigmoid), base={"depth": 2}, rule="moe-dmft", alpha=0.5)
    assert any("derived for alpha=1" in note for note in deeper.notes)


def test_parameters_of_several_optimizer_families():
    model = make_model()
    family = {
        name: "muon" if p.dim() > 1 and "embedding" not in name else "adam" for name, p in model.named_parameters()
    }
    scaling = plan(make_model(gate="sqrt", depth=8), base={"depth": 2}, rule="hyperp", family=_like(family, 8))
    kinds = {p.role: p.kind for p in scaling.parameters}
    assert scaling.family == "adam+muon"
    assert (kinds["hidden"], kinds["expert_up"], kinds["embedding"], kinds["norm"]) == (
        "muon",
        "muon",
        "adamw",
        "adamw",
    )
    assert scaling["transformer.blocks.7.attention.w_q"].base_shape == (64, 64)
    with pytest.raises(ValueError, match=r"no table for optimizers of the family 'sgd'"):
        plan(make_model(), base=BASE, rule="hyperp", family=dict.fromkeys(family, "sgd"))


def _like(family, depth):
    blocks = {name.split("blocks.0.")[1]: f for name, f in family.items() if "blocks.0." in name}
    rest = {name: f for name, f in family.items() if "blocks." not in name}
    return rest | {f"transformer.blocks.{i}.{name}": f for i in range(depth) for name, f in blocks.items()}


def test_rules_side_by_side():
    comparison = compare_rules(make_model(), ["sp", "mup", "complete-p", "complete-mue", "hyperp"], base=BASE)
    assert list(comparison.plans) == ["sp", "mup", "complete-mue", "hyperp"]
    assert "no row for the role 'router'" in comparison.failures["complete-p"]
    rows = comparison.rows("lr")
    assert rows["hidden  transformer.blocks.*.attention.w_q"] == {
        "sp": "1",
        "mup": "0.5",
        "complete-mue": "0.5",
        "hyperp": "1",
    }
    agreement = comparison.agreement("lr")
    assert agreement["embedding  transformer.embedding.weight"]
    assert not agreement["hidden  transformer.blocks.*.attention.w_q"]
    text = str(comparison)
    assert "learning" not in text
    for part in ("initial std", "lr x", "eps x", "forward multipliers", "note (hyperp): gate=linear"):
        assert part in text
    with pytest.raises(ValueError, match="rule: found 'nonsense'"):
        compare_rules(make_model(), ["sp", "nonsense"])
    with pytest.raises(ValueError, match=r"base\.widht"):
        compare_rules(make_model(), ["sp"], base={"widht": 2})


def test_every_rule_plans_a_model_with_every_role():
    model = make_model(shared_width=16, moe_every=2, scoring="sigmoid", tie_embeddings=False)
    for name, rule in RULES.items():
        for family in rule.tables:
            if not set(rule.tables[family]) >= {Role.HIDDEN, Role.ROUTER}:
                continue  # a dense rule, or the AdamW side of a pair of optimizers
            scaling = plan(model, base={"width": 32, "n_heads": 2}, rule=name, family=family)
            assert all(p.source and p.lr > 0 and p.init.value >= 0 for p in scaling.parameters), name


def test_plan_is_stable_under_a_dtype_and_device_that_are_not_the_defaults():
    assert plan(make_model().to(torch.bfloat16), base=BASE) == plan(make_model(), base=BASE)
