"""A plan under HyperSphereOptimizer: its Muon off the sphere in every convention, its options, a given radius."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.layers import Layers
from torch import nn
from torch.optim import AdamW

from lightning_mue import HyperSphereOptimizer, MoELanguageModel, param_groups, plan
from lightning_mue.optim.matrices import as_matrices
from lightning_mue.parameterizations import Init, ParameterPlan, ScaledStep, ScalingPlan
from lightning_mue.parameterizations.applying.families import family_of
from lightning_mue.parameterizations.applying.groups import _MUON_FACTORS
from lightning_mue.parameterizations.rules.kinds import CONVENTIONS

BASE = {"width": 32, "n_heads": 2, "n_experts": 0}


def language_model(**sizes):
    torch.manual_seed(0)
    given = {"context_length": 16, "width": 64, "n_heads": 4, "depth": 2, "n_experts": 4, "gate": "sqrt", **sizes}
    return MoELanguageModel(**given)


def one_direction(model):
    """A gradient of rank one for every matrix: its only singular value is its norm for every shape, so that Newton-Schulz
    gives the same spectral norm at every size."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim < 2:
            p.grad = torch.ones_like(p)
            continue
        count, rows, columns = as_matrices(p.detach()).shape
        left, right = (
            torch.randn(count, rows, 1, generator=generator),
            torch.randn(count, 1, columns, generator=generator),
        )
        p.grad = (left @ right).reshape(p.shape)


def moves(model, optimizer):
    """Parameter name -> spectral norm of its first update (the largest of a stack)."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    one_direction(model)
    optimizer.step()
    return {
        name: float(torch.linalg.matrix_norm(as_matrices(p.detach() - before[name]), 2).max())
        for name, p in model.named_parameters()
        if p.ndim > 1
    }


def test_conventions_are_the_optimizers_own():
    for name, factor in CONVENTIONS.items():
        for shape in ((3, 7), (7, 3), (5, 5)):
            assert _MUON_FACTORS[name](*shape) == factor(*shape)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_updates_of_a_wider_mixture_have_the_plans_ratio_to_the_dense_base(convention):
    """For every convention of docs/theory.md section 5.2. Swapped steps and explicit groups are the same, bit for bit."""
    options = {"lr": 0.02, "lr_convention": convention}
    base, target = language_model(**BASE), language_model()
    optimizer = HyperSphereOptimizer(target.named_parameters(), sphere=False, **options)
    assert family_of(optimizer) == "muon"
    scaling = plan(target, base=BASE, rule="hyperp", family="muon")
    explicit = copy.deepcopy(target)
    ScaledStep(optimizer, scaling, target)
    found = moves(target, optimizer)
    groups = HyperSphereOptimizer(param_groups(explicit, scaling, **options))
    assert family_of(groups) == "muon"
    assert moves(explicit, groups) == found
    reference = moves(base, HyperSphereOptimizer(base.named_parameters(), sphere=False, **options))
    matrices = [entry for entry in scaling.parameters if entry.kind == "muon"]
    roles = {"hidden", "router", "expert_up", "expert_down"}
    assert {entry.role for entry in matrices} == roles
    for entry in matrices:
        if entry.base is not None:
            # Float32 weights of order 0.1 and steps of order 0.01: rounding of 1e-6 of the step at most.
            assert found[entry.name] / reference[entry.base] == pytest.approx(entry.lr, rel=1e-4), entry.name
    routers = [entry for entry in matrices if entry.base is None]
    gain = found[routers[0].name] / routers[0].lr
    hidden = reference["transformer.blocks.0.attention.w_q"]  # a router that the base lacks: as its hidden matrices
    assert gain == pytest.approx(hidden, rel=1e-4)


def test_negative_control_without_the_correction_the_ratio_is_another(monkeypatch):
    monkeypatch.setattr("lightning_mue.parameterizations.applying.groups._MUON_FACTORS", {})
    target = language_model()
    scaling = plan(target, base=BASE, rule="hyperp", family="muon")
    optimizer = HyperSphereOptimizer(target.named_parameters(), lr=0.02, sphere=False, lr_convention="rms")
    ScaledStep(optimizer, scaling, target)
    base = language_model(**BASE)
    reference = moves(base, HyperSphereOptimizer(base.named_parameters(), lr=0.02, sphere=False, lr_convention="rms"))
    name = "transformer.blocks.0.attention.w_q"
    assert moves(target, optimizer)[name] / reference[name] == pytest.approx(2**0.5 * scaling[name].lr, rel=1e-4)


SHAPES = {
    "matrix": ((4, 8), (64, 16)),
    "stack": ((3, 4, 8), (6, 64, 16)),
    "matrix to stack": ((4, 8), (6, 64, 16)),
    "convolution": ((4, 2, 3, 3), (64, 4, 3, 3)),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=list(SHAPES))
def test_every_form_of_matrix_moves_and_decays_as_the_plan_says(convention, shapes):
    factor, found = 0.3, []
    for shape in shapes:
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(shape))
        entry = ParameterPlan(
            "weight", "hidden", shape, "weight", Init("normal", 1.0), factor, 2.0, 1.0, "muon", "", base_shape=shapes[0]
        )
        optimizer = HyperSphereOptimizer(
            model.named_parameters(), lr=0.01, weight_decay=0.5, sphere=False, lr_convention=convention
        )
        if shape == shapes[1]:
            scaled = ScaledStep(optimizer, ScalingPlan("hyperp", "muon", 1.0, {}, {}, 1.0, (entry,)), model)
        norm = moves(model, optimizer)["weight"]  # from zero, so without decay
        group = optimizer.param_groups[0] if shape == shapes[0] else scaled._scaled[0]
        found.append((norm, group["lr"] * group["weight_decay"]))
    assert found[1][0] / found[0][0] == pytest.approx(factor, rel=1e-5)
    assert found[1][1] / found[0][1] == pytest.approx(2.0 * factor, rel=1e-12)


@pytest.mark.parametrize(("convention", "adjust"), [("original", "original"), ("rms", "match_rms_adamw")])
def test_scaled_groups_are_those_of_torchs_muon_and_adamw(convention, adjust):
    model = Layers()
    hidden = {"up.weight", "down.weight"}
    families = {name: "muon" if name in hidden else "adam" for name, _ in model.named_parameters()}
    two = plan(model, base={"width": 8}, rule="hyperp", family=families)
    one = plan(model, base={"width": 8}, rule="hyperp", family="muon")
    ours = HyperSphereOptimizer(
        model.named_parameters(), lr=0.02, weight_decay=0.1, sphere=False, lr_convention=convention, preset="classic"
    )
    theirs = [
        torch.optim.Muon([model.up.weight, model.down.weight], lr=0.02, weight_decay=0.1, adjust_lr_fn=adjust),
        AdamW([p for name, p in model.named_parameters() if name not in hidden], lr=0.02, weight_decay=0.1),
    ]
    assert (family_of(ours), *map(family_of, theirs)) == ("muon", "muon", "adam")

    def settings(optimizers, scaling):
        steps = [ScaledStep(optimizer, scaling, model) for optimizer in optimizers]
        keys = ("lr", "weight_decay")
        return {p: [g[key] for key in keys] for step in steps for g in step._scaled for p in g["params"]}

    mine, torchs = settings([ours], one), settings(theirs, two)
    # The stem counts as a hidden matrix where one optimizer has all; torch's Muon was not given it.
    common = [p for name, p in model.named_parameters() if one[name].kind == two[name].kind]
    assert len(common) >= 6
    assert {model.up.weight, model.down.weight} <= set(common)
    for p in common:
        assert mine[p] == pytest.approx(torchs[p], rel=1e-12)
    explicit = [
        *param_groups(model, two, lr=0.02, kinds={"muon"}, weight_decay=0.1, adjust_lr_fn=adjust),
        *param_groups(model, two, lr=0.02, kinds={"adamw"}, weight_decay=0.1),
    ]
    for group in explicit:
        for p in set(group["params"]) & set(common):
            assert mine[p] == pytest.approx([group["lr"], group["weight_decay"]], rel=1e-12)


def test_which_muon_explicit_groups_are_for():
    model = language_model()
    scaling = plan(model, base=BASE, rule="hyperp", family="muon")
    ours = param_groups(model, scaling, lr=0.01)
    assert {group["kind"] for group in ours} == {"muon", "adamw"}
    assert {group["lr_convention"] for group in ours} == {"spectral"}
    HyperSphereOptimizer(ours, lr_convention="spectral").step()
    only = param_groups(model, scaling, lr=0.01, kinds={"muon"}, lr_convention="rms")
    assert {group["kind"] for group in only} == {"muon"}
    assert "adjust_lr_fn" not in only[0]
    for torchs in (
        param_groups(model, scaling, lr=0.01, kinds={"muon"}),
        param_groups(model, scaling, lr=0.01, kinds={"muon"}, adjust_lr_fn="original"),
    ):
        assert all("adjust_lr_fn" in group and "kind" not in group for group in torchs)


OPTIONS = {
    "momentum": 0.8,
    "nesterov": False,
    "betas": (0.8, 0.9),
    "preset": "classic",
    "compute_dtype": "float64",
    "state_dtype": "bfloat16",
    "retraction": "geodesic",
    "zero_gradient": "momentum",
    "normalize": "neuron",
    "split": None,
    "radius": None,
    "lr_convention": "unit",
    "maximize": True,
    "capturable": True,
    "compile": False,
}


@pytest.mark.parametrize("sphere", [True, False])
def test_all_options_survive_the_swap(sphere):
    model = language_model()
    optimizer = HyperSphereOptimizer(
        model.named_parameters(), lr=0.02, adamw_lr=0.005, weight_decay=0.1, sphere=sphere, **OPTIONS
    )
    assert set(optimizer.defaults) - set(OPTIONS) == {
        "lr",
        "adamw_lr",
        "adamw_weight_decay",
        "eps",
        "weight_decay",
        "sphere",
    }
    scaling = plan(model, base=BASE, rule="hyperp", family=family_of(optimizer))
    own = [dict(group) for group in optimizer.param_groups]
    step = ScaledStep(optimizer, scaling, model)
    rates = {group["kind"]: group["lr"] for group in own}
    assert len(step._scaled) >= len(own)
    for group in step._scaled:
        assert {key: group[key] for key in OPTIONS} == OPTIONS
        entry = scaling[step.names[group["params"][0]]]
        assert group["kind"] == entry.kind
        if entry.kind != "muon":
            assert group["lr"] == rates[entry.kind] * entry.lr
    moves(model, optimizer)
    assert [dict(group) for group in optimizer.param_groups] == own
    assert all(state["momentum"].dtype == torch.bfloat16 for state in optimizer.state.values() if "momentum" in state)


def test_a_row_of_another_kind_takes_the_settings_of_that_kinds_group():
    """The optimizer sees a matrix, the plan an embedding: it learns at the embedding's rate, not at the matrices'."""
    model = Layers()
    optimizer = HyperSphereOptimizer(model.named_parameters(), lr=0.02, adamw_lr=0.005, sphere=False)
    assert any(p is model.stem.weight for p in optimizer.param_groups[0]["params"])
    scaling = plan(model, base={"width": 8}, rule="hyperp", family="muon", roles={r"stem\.weight": "embedding"})
    assert scaling["stem.weight"].kind == "adamw"
    with pytest.warns(UserWarning, match=r"stem\.weight \(embedding\): muon -> adamw.*A run at the base"):
        step = ScaledStep(optimizer, scaling, model)
    (group,) = (g for g in step._scaled if any(p is model.stem.weight for p in g["params"]))
    assert (group["kind"], group["lr"]) == ("adamw", 0.005 * scaling["stem.weight"].lr)


def test_a_given_radius_is_refused_at_another_size_and_kept_at_the_base():
    model = language_model()
    optimizer = HyperSphereOptimizer(model.named_parameters(), radius=3.0)
    other = plan(model, base=BASE, rule="hyperp", family="sphere")
    with pytest.raises(ValueError, match=r"radius=3 .*Leave radius out"):
        ScaledStep(optimizer, other, model)
    with pytest.raises(ValueError, match=r"radius=3 .*Leave radius out"):
        param_groups(model, other, lr=0.01, radius=3.0)
    assert not optimizer._optimizer_step_pre_hooks
    same = plan(model, base=None, rule="hyperp", family="sphere")
    assert {group["radius"] for group in param_groups(model, same, lr=0.01, radius=3.0)} == {3.0}
    off = HyperSphereOptimizer(model.named_parameters(), radius=3.0, sphere=False)  # no radii, nothing to scale
    ScaledStep(off, plan(model, base=BASE, rule="hyperp", family="muon"), model)
