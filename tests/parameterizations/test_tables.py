"""Cells of the papers' tables (theory.md section 4), at ratios that tell every symbol apart."""

from __future__ import annotations

import math

import pytest

from lightning_mue.parameterizations import RULES, Axes, Role, get_rule
from lightning_mue.parameterizations.monomial import parse

ALPHA = 0.75
BASE = Axes(64, 2, 128, 128, 1, 1, 128, 16, tokens=1e6, batch_tokens=1e3)
TARGET = Axes(256, 6, 640, 96, 16, 4, 384, 32, tokens=5e6, batch_tokens=2e3)
D, DEPTH, A, K, S, KAPPA = 4.0, 3.0, 3.0, 2.0, math.sqrt(2 / 5), 0.25
FAN_IN, FAN_OUT = 7.0, 11.0


def cell(rule, family, role, column):
    ratios = {**TARGET.ratios(BASE), "fan_in": FAN_IN, "fan_out": FAN_OUT}
    return parse(getattr(get_rule(rule).table(family)[Role(role)], column)).evaluate(ratios, ALPHA)


GOLDEN = [
    # 4.2 mup, Adam and SGD
    ("mup", "adam", "embedding", "lr", 1.0),
    ("mup", "adam", "embedding", "eps", 1 / D),
    ("mup", "adam", "norm", "eps", 1 / D),
    ("mup", "adam", "hidden", "init", D**-0.5),
    ("mup", "adam", "hidden", "lr", 1 / D),
    ("mup", "adam", "hidden", "wd", D),
    ("mup", "adam", "ffn_down", "init", FAN_IN**-0.5),
    ("mup", "adam", "expert_down", "lr", 1 / FAN_IN),
    ("mup", "adam", "shared_down", "wd", FAN_IN),
    ("mup", "adam", "router", "init", 1 / D),
    ("mup", "adam", "router", "eps", 1.0),
    ("mup", "adam", "unembedding", "lr", 1 / D),
    ("mup", "adam", "unembedding", "init", 1 / D),
    ("mup", "sgd", "embedding", "lr", D),
    ("mup", "sgd", "hidden", "lr", 1.0),
    ("mup", "sgd", "unembedding", "lr", 1 / D),
    ("mup", "sgd", "router", "lr", 1 / D),
    # 4.3 complete-p
    ("complete-p", "adam", "embedding", "lr", S),
    ("complete-p", "adam", "embedding", "eps", 1 / (D * S)),
    ("complete-p", "adam", "hidden", "lr", DEPTH ** (ALPHA - 1) * S / D),
    ("complete-p", "adam", "hidden", "wd", D * S),
    ("complete-p", "adam", "hidden", "eps", DEPTH**-ALPHA / (D * S)),
    ("complete-p", "adam", "ffn_down", "lr", DEPTH ** (ALPHA - 1) * S / FAN_IN),
    ("complete-p", "adam", "norm", "lr", DEPTH ** (ALPHA - 1) * S),
    ("complete-p", "adam", "qk_norm", "eps", DEPTH**-ALPHA / S),
    ("complete-p", "adam", "final_norm", "eps", 1 / S),
    ("complete-p", "adam", "unembedding", "init", 1 / D),
    ("complete-p", "adam", "unembedding", "wd", D * S),
    # 4.6 complete-mue
    ("complete-mue", "adam", "expert_up", "init", D**-0.5),
    ("complete-mue", "adam", "expert_up", "lr", DEPTH ** (ALPHA - 1) * S / D),
    ("complete-mue", "adam", "expert_up", "wd", D * S),
    ("complete-mue", "adam", "expert_up", "eps", KAPPA * DEPTH**-ALPHA / (A * S)),
    ("complete-mue", "adam", "expert_down", "init", A**0.5 / D),
    ("complete-mue", "adam", "expert_down", "lr", DEPTH ** (ALPHA - 1) * S / D),
    ("complete-mue", "adam", "shared_down", "init", A**0.5 / D),
    ("complete-mue", "adam", "ffn_down", "init", A**0.5 / D),
    ("complete-mue", "adam", "router", "init", 1 / D),
    ("complete-mue", "adam", "router", "eps", DEPTH**-ALPHA / S),
    ("complete-mue", "adam", "embedding", "lr", S),
    # 4.7 hyperp
    ("hyperp", "sphere", "hidden", "lr", DEPTH**-0.5 * 5**-0.32 * 2**0.5),
    ("hyperp", "sphere", "embedding", "lr", DEPTH**-0.5 * 5**-0.32 * 2**0.5),
    ("hyperp", "sphere", "hidden", "wd", 1.0),
    ("hyperp", "sphere", "hidden", "init", FAN_IN**-0.5),
    ("hyperp", "sphere", "unembedding", "init", 1.0),
]


@pytest.mark.parametrize(("rule", "family", "role", "column", "value"), GOLDEN)
def test_golden_cell(rule, family, role, column, value):
    assert cell(rule, family, role, column) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("rule", "kind", "value"),
    [
        ("mup", "attention", 1 / K),
        ("complete-p", "attention", 1 / K),
        ("complete-p", "residual", DEPTH**-ALPHA),
        ("complete-mue", "ffn", D / A),
        ("complete-mue", "route", 4.0),
        ("complete-mue", "residual", DEPTH**-ALPHA),
        ("hyperp", "residual", DEPTH**-0.5),
    ],
)
def test_golden_multiplier(rule, kind, value):
    assert parse(get_rule(rule).multipliers[kind]).evaluate(TARGET.ratios(BASE), ALPHA) == pytest.approx(
        value, rel=1e-12
    )


def test_one_minus_beta_scales_with_batch_over_tokens():
    ratio = parse(get_rule("complete-p").betas).evaluate(TARGET.ratios(BASE), ALPHA)
    assert ratio == pytest.approx(2 / 5, rel=1e-12)


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_every_row_names_its_source(rule):
    for table in rule.tables.values():
        for role, row in table.items():
            assert row.source, role
            assert row.status in ("paper", "code", "derived", "measured")


def test_at_the_reference_aspect_ratio_complete_mue_is_complete_p():
    """Theory 4.6: with A = d the down cell is d^-1/2."""
    ratios = {**TARGET.ratios(BASE), "A": D, "fan_in": D, "kappa": 1.0}
    mue, p = get_rule("complete-mue").table("adam"), get_rule("complete-p").table("adam")
    for role in p:
        for column in ("init", "lr", "wd", "eps"):
            left, right = (parse(getattr(table[role], column)).evaluate(ratios, ALPHA) for table in (mue, p))
            assert left == pytest.approx(right, rel=1e-12), (role, column)


def test_rule_without_a_table_for_the_optimizer_names_those_that_have_one():
    with pytest.raises(ValueError, match=r"complete-mue.*no table.*'sphere'.*hyperp"):
        get_rule("complete-mue").table("sphere")


def test_unknown_rule_lists_the_known():
    with pytest.raises(ValueError, match=r"rule: found 'mue'.*complete-mue"):
        get_rule("mue")


def test_size_must_be_positive():
    with pytest.raises(ValueError, match="depth: found 0"):
        Axes(depth=0)
