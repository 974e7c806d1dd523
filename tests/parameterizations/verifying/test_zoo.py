"""Models of many projects in width, depth and experts: the plan against tables written by hand, and against what they do."""

from __future__ import annotations

import re

import pytest
import torch

from helpers.zoo_layouts import LAYOUTS
from helpers.zoo_models import DENSE, MOE, OTHERS, ZooModel, wav2vec2
from helpers.zoo_tables import FOUND, REFUSED, TABLES, WIDTH
from lightning_mue import plan, verify_plan

ZOO = {**DENSE, **MOE, **OTHERS, **LAYOUTS}
BASE = (32, 2, 4)
TARGETS = {"width": (128, 2, 4), "depth": (32, 8, 4), "experts": (32, 2, 8)}
EXPERTS = {*MOE, "litgpt moe", "nanoMoE"}
AXES = {name: ("width", "depth", "experts") if name in EXPERTS else ("width", "depth") for name in ZOO}
CASES = [(name, axis) for name in ZOO for axis in AXES[name]]
#: Base of another class, or without experts: (base, target).
FROM_DENSE = {"litgpt moe": "litgpt moe", "nanoMoE": "nanoMoE", "Mixtral": "Llama"}


def make(name: str, sizes: tuple[int, int, int]) -> torch.nn.Module:
    torch.manual_seed(0)
    return ZOO[name].make(*sizes)


def lines(name: str) -> list[tuple[str, bool, str]]:
    """(role, whether it ends a branch, pattern)"""
    split = [line.split() for line in TABLES[name].splitlines() if line.strip()]
    return [(role.rstrip("!"), role.endswith("!"), pattern) for role, pattern in split]


def expected(name: str, axis: str, parameter: str) -> tuple[str, float, float]:
    """(role, learning rate, initial std) over the base's, by the table alone."""
    path = parameter.removesuffix(".weight")
    matches = [(role, ends) for role, ends, pattern in lines(name) if re.search(pattern, path)]
    assert len(matches) == 1, (parameter, matches)
    role, ends = matches[0]
    rate, std = (4**power if axis == "width" else 1.0 for power in WIDTH[role])
    branch = 0.25 if ends and axis == "depth" else 1.0
    return role, rate * branch, std * branch


@pytest.mark.slow
@pytest.mark.parametrize(("name", "axis"), [c for c in CASES if c not in REFUSED and c[0] in TABLES])
def test_plan_is_as_the_table_says(name, axis):
    scaling = plan(make(name, TARGETS[axis]), base=lambda: make(name, BASE))
    ratio = {key: value / scaling.base_axes[key] for key, value in scaling.axes.items()}
    grown = {
        "width": {"width", "ffn_width", "expert_width", "active_width"},
        "depth": {"depth"},
        "experts": {"n_experts"},
    }
    factor = 2 if axis == "experts" else 4
    assert ratio == {key: factor if key in grown[axis] else 1 for key in ratio}
    assert axis == "experts" or axis in ratio
    for p in scaling.parameters:
        if len(p.shape) < 2:
            continue
        role, rate, std = expected(name, axis, p.name)
        read = {"tied": "unembedding", "fixed": "hidden"}.get(role, role)
        assert (p.name, p.role, p.lr) == (p.name, read, pytest.approx(rate))
        assert p.init.kind in ("keep", "constant", "copies") or p.init_factor == pytest.approx(std), p.name
    ends = [pattern for _, is_end, pattern in lines(name) if is_end]
    for p in scaling.parameters:  # of vectors, those of a branch's end, and of the norm before a tied head, scale
        path = p.name.rpartition(".")[0]
        if len(p.shape) == 1 and p.role != "final_norm":
            at_end = axis == "depth" and any(re.search(pattern, path) for pattern in ends)
            assert (p.name, p.lr) == (p.name, 0.25 if at_end else 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "axis"), CASES)
def test_what_it_does_is_what_the_rule_keeps(name, axis):
    case, base = ZOO[name], lambda: make(name, BASE)
    if (name, axis) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, axis]):
            plan(make(name, TARGETS[axis]), base=base)
        return
    result = verify_plan(make(name, TARGETS[axis]), case.batch(), base=base, loss=case.loss)
    assert result.compared > 30
    if (name, axis) in FOUND:
        assert re.search(FOUND[name, axis], str(result))
    else:
        assert result.passed, str(result)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["complete-p", "mup"])
@pytest.mark.parametrize("name", ["GPT2", "Llama", "ViT", "Mamba", "minGPT", "DiT"])
def test_dense_models_under_other_rules(name, rule):
    case = ZOO[name]
    result = verify_plan(
        make(name, TARGETS["width"]), case.batch(), base=lambda: make(name, BASE), rule=rule, loss=case.loss
    )
    assert result.passed, str(result)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dense"), FROM_DENSE.items())
def test_experts_from_a_dense_base(name, dense):
    """A doubles, so the down matrices get 2^1/2 in std, and c r = 1/2 x 2; no layer is counted more than once."""
    case, base = ZOO[name], lambda: make(dense, (32, 2, 0))
    scaling = plan(make(name, (32, 2, 8)), base=base)
    assert {key: scaling.axes[key] / scaling.base_axes[key] for key in ("depth", "width", "active_width", "n_experts")} == {
        "depth": 1, "width": 1, "active_width": 2, "n_experts": 8,
    }  # fmt: skip
    for p in scaling.parameters:
        role = expected(name, "experts", p.name)[0] if len(p.shape) > 1 else p.role
        assert (p.name, p.role, p.lr) == (p.name, role, 1.0)
        assert p.init_factor == pytest.approx(2**0.5 if role == "expert_down" else 1.0) or p.base is None
    result = verify_plan(make(name, (32, 2, 8)), case.batch(), base=base, loss=case.loss)
    assert result.passed, str(result)


def test_weight_norm_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match=r"parts of a weight.*remove_parametrizations"):
        plan(wav2vec2(64, 2, 0), base=lambda: wav2vec2(32, 2, 0))


@pytest.mark.slow
def test_the_check_bites():
    """The table's control: a plan under another rule is not as the table says; verify's: the wrong role is found."""
    scaling = plan(make("Llama", TARGETS["width"]), base=lambda: make("Llama", BASE), rule="sp")
    assert expected("Llama", "width", "lm_head.weight")[1] == 0.25 != scaling["lm_head.weight"].lr
    case: ZooModel = ZOO["Llama"]
    found = verify_plan(
        make("Llama", TARGETS["width"]), case.batch(), base=lambda: make("Llama", BASE), loss=case.loss,
        roles={r"up_proj": "embedding"},
    )  # fmt: skip
    assert any("up_proj" in deviation.parameter for deviation in found.deviations)
