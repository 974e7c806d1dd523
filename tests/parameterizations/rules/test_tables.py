"""Cells of the papers' tables, typed by hand from the papers (docs/derivations), at ratios that tell every symbol apart."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.controls import moe_dmft_fan_in

from lightning_mue import MoELanguageModel, plan
from lightning_mue.parameterizations import RULES, Axes, Role, get_rule
from lightning_mue.parameterizations.rules.monomial import parse
from lightning_mue.parameterizations.rules.mssp import MSSP, choose_regime
from lightning_mue.parameterizations.rules.table import rules_for

ALPHA = 0.75
# The ratios target/base are different primes, so that no two monomials agree by chance.
D, L, H, H_EXPERT, E, TOP_K, A, K, T, B, FAN_IN, FAN_OUT = (
    3.0,
    5.0,
    7.0,
    11.0,
    13.0,
    2.0,
    17.0,
    19.0,
    23.0,
    29.0,
    31.0,
    37.0,
)
BASE = Axes(64, 2, 128, 128, 4, 2, 128, 16, tokens=1e6, batch_tokens=1e3)
TARGET = Axes(3 * 64, 5 * 2, 7 * 128, 11 * 128, 13 * 4, 2 * 2, 17 * 128, 19 * 16, tokens=23e6, batch_tokens=29e3)
KAPPA, ALPHA_FFN, S = TOP_K / E, H_EXPERT / D, math.sqrt(B / T)
SKIP = None  # the papers state no such cell
COLUMNS = ("init", "lr", "wd", "eps")

_CP_LR = L ** (ALPHA - 1) * S
_HYPERP_LR = L**-0.5 * T**-0.32 * B**0.5
_SPECTRAL = (FAN_OUT / FAN_IN) ** 0.5
_MATRICES = ("hidden", "ffn_up", "ffn_down", "expert_up", "expert_down", "shared_up", "shared_down")
_MUP_UP = (D**-0.5, 1 / D, D, 1 / D)
_MUP_DOWN = (FAN_IN**-0.5, 1 / FAN_IN, FAN_IN, 1 / D)
_CP_HIDDEN = (D**-0.5, _CP_LR / D, D * S, L**-ALPHA / (D * S))
_MUE_DOWN = (A**0.5 / D, _CP_LR / D, D * S)
_MUE_EPS = KAPPA * L**-ALPHA / (A * S)
_MSSP_HIDDEN = (FAN_IN**-0.5, 1 / FAN_IN, FAN_IN, 1 / D)
_MSSP_SAME = {  # the rows that the regimes share
    "embedding": (1.0, 1.0, 1.0, 1 / D),
    "norm": (1.0, 1.0, 1.0, 1 / D),
    "bias": (1.0, 1.0, 1.0, 1 / D),
    "hidden": _MSSP_HIDDEN,
    "unembedding": (1 / D, 1 / D, D, 1.0),
}
_MSSP_SGD = {"embedding": (SKIP, D, 1 / D), "unembedding": (1 / D, 1 / D, D), "hidden": (FAN_IN**-0.5, 1.0, 1.0)}

#: rule -> family -> role -> (init, lr, wd, eps)
GOLDEN = {
    "mup": {
        "adam": {
            "embedding": (1.0, 1.0, 1.0, 1 / D),
            "norm": (1.0, 1.0, 1.0, 1 / D),
            "bias": (1.0, 1.0, 1.0, 1 / D),
            "hidden": _MUP_UP,
            "ffn_up": _MUP_UP,
            "expert_up": _MUP_UP,
            "shared_up": _MUP_UP,
            "ffn_down": _MUP_DOWN,
            "expert_down": _MUP_DOWN,
            "shared_down": _MUP_DOWN,
            "router": (1 / D, 1 / D, D, 1.0),
            "unembedding": (1 / D, 1 / D, D, 1.0),
        },
        "sgd": {
            "embedding": (1.0, D),
            "norm": (1.0, D),
            # A vector's own growth: d for a bias of the residual stream, 1 for one of the logits.
            "bias": (1.0, FAN_OUT, 1 / FAN_OUT),
            "hidden": (D**-0.5, 1.0),
            "router": (1 / D, 1 / D),
            "unembedding": (1 / D, 1 / D),
        },
    },
    "complete-p": {
        "adam": {
            "embedding": (1.0, S, S, 1 / (D * S)),
            "hidden": _CP_HIDDEN,
            "ffn_up": _CP_HIDDEN,
            "ffn_down": (FAN_IN**-0.5, _CP_LR / FAN_IN, FAN_IN * S, L**-ALPHA / (D * S)),
            "bias": (1.0, _CP_LR, S, L**-ALPHA / (D * S)),
            "norm": (1.0, _CP_LR, S, L**-ALPHA / (D * S)),
            "qk_norm": (1.0, _CP_LR, S, L**-ALPHA / S),
            "final_norm": (1.0, S, S, 1 / S),
            "unembedding": (1 / D, S / D, D * S, 1 / S),
        },
    },
    # alpha = 1; S as in complete-p
    "moe-dmft": {
        "adam": {
            "router": (1 / D, S / D, D * S, 1 / (E * L * S)),
            "expert_up": (D**-0.5, S / D, D * S, 1 / (H_EXPERT * E * L * S)),
            "expert_down": (
                1 / (ALPHA_FFN * D**0.5),
                S / (ALPHA_FFN * D),
                ALPHA_FFN * D * S,
                1 / (D * E * L * S),
            ),
            "embedding": (1.0, S, S, 1 / (D * S)),
            "hidden": (D**-0.5, S / D, D * S, 1 / (D * L * S)),
            "ffn_up": (D**-0.5, S / D, D * S, 1 / (D * L * S)),
            "ffn_down": (FAN_IN**-0.5, S / FAN_IN, FAN_IN * S, 1 / (D * L * S)),
            "norm": (1.0, S, S, 1 / (D * L * S)),
            "bias": (1.0, S, S, 1 / (D * L * S)),
            "unembedding": (1 / D, S / D, D * S, 1 / S),
            "balance_bias": (1.0, 1.0, 1.0, 1.0),
        },
    },
    "moe-dmft-half": {"adam": {"router": (D**-0.5, S / D, D * S, 1 / (E * L * S))}},
    "mssp-I": {
        "adam": {
            **_MSSP_SAME,
            "router": (1 / D, 1 / D, D, 1.0),
            "expert_up": (D**-0.5, 1 / D, D, 1 / D),
            "expert_down": (H_EXPERT**-0.5, 1 / H_EXPERT, H_EXPERT, 1 / D),
        },
        "sgd": {
            **_MSSP_SGD,
            "router": (1 / D, 1 / D, D),
            "expert_up": (D**-0.5, 1.0, 1.0),
            "expert_down": (H_EXPERT**-0.5, 1.0, 1.0),
        },
    },
    "mssp-II": {
        "adam": {
            **_MSSP_SAME,
            "router": (D**-0.5, 1 / D, D, 1 / E),
            "expert_up": (D**-0.5, 1 / D, D, 1 / E),
            "expert_down": ((E / H_EXPERT) ** 0.5, 1 / H_EXPERT, H_EXPERT, 1 / (D * E)),
        },
        "sgd": {
            **_MSSP_SGD,
            "router": (D**-0.5, E / D, D / E),
            "expert_up": (D**-0.5, E / D, D / E),
            "expert_down": ((E / H_EXPERT) ** 0.5, E * D, 1 / (E * D)),
        },
    },
    "mssp-III": {
        "adam": {
            **_MSSP_SAME,
            "router": (D**-0.5, 1 / D, D, 1 / E),
            "expert_up": (D**-0.5, 1 / D, D, 1 / (D * E)),
            "expert_down": (H_EXPERT**-0.5, 1 / H_EXPERT, H_EXPERT, 1 / (D * E)),
        },
        "sgd": {
            **_MSSP_SGD,
            "router": (D**-0.5, 1.0, 1.0),
            "expert_up": (D**-0.5, E, 1 / E),
            "expert_down": (H_EXPERT**-0.5, E, 1 / E),
        },
    },
    "complete-mue": {
        "adam": {
            "ffn_up": (D**-0.5, _CP_LR / D, D * S, _MUE_EPS),
            "expert_up": (D**-0.5, _CP_LR / D, D * S, _MUE_EPS),
            "shared_up": (D**-0.5, _CP_LR / D, D * S, L**-ALPHA / (A * S)),
            "ffn_down": (*_MUE_DOWN, _MUE_EPS),
            "expert_down": (*_MUE_DOWN, _MUE_EPS),
            "shared_down": (*_MUE_DOWN, L**-ALPHA / (A * S)),
            "router": (1 / D, _CP_LR / D, D * S, L**-ALPHA / S),
            "embedding": (1.0, S, S, 1 / (D * S)),
            "hidden": _CP_HIDDEN,
            "norm": (1.0, _CP_LR, S, L**-ALPHA / (D * S)),
            "unembedding": (1 / D, S / D, D * S, 1 / S),
        },
    },
    # 4.7, 5.2
    "hyperp": {
        "sphere": {
            **dict.fromkeys(_MATRICES, (FAN_IN**-0.5, _HYPERP_LR, 1.0)),
            # Ours, see docs/derivations/hyperp.md; hyperp-paper has the printed cells.
            "router": (1 / D, _HYPERP_LR),
            "unembedding": (1 / D, _HYPERP_LR),
            "embedding": (1.0, _HYPERP_LR, 1.0),
            "norm": (1.0, _HYPERP_LR),
            "bias": (1.0, _HYPERP_LR),
        },
        "muon": {
            **dict.fromkeys((*_MATRICES, "router"), (FAN_IN**-0.5, _SPECTRAL * _HYPERP_LR, 1 / (_SPECTRAL * L))),
            "embedding": (1.0, _HYPERP_LR),
            "unembedding": (1 / D, _HYPERP_LR / D),
        },
        "adam": {"embedding": (1.0, _HYPERP_LR), "unembedding": (1 / D, _HYPERP_LR / D, D)},
    },
    "hyperp-paper": {
        "sphere": {
            **dict.fromkeys(_MATRICES, (FAN_IN**-0.5, _HYPERP_LR, 1.0)),
            "router": (FAN_IN**-0.5, _HYPERP_LR),
            "unembedding": (1.0, _HYPERP_LR),
            "embedding": (1.0, _HYPERP_LR, 1.0),
            "norm": (1.0, _HYPERP_LR),
            "bias": (1.0, _HYPERP_LR),
        },
    },
}

CELLS = [
    pytest.param(rule, family, role, column, value, id=f"{rule}-{family}-{role}-{column}")
    for rule, families in GOLDEN.items()
    for family, by_role in families.items()
    for role, values in by_role.items()
    for column, value in zip(COLUMNS, values, strict=False)
    if value is not SKIP
]
MULTIPLIERS = [
    ("mup", "attention", 1 / K),
    ("complete-p", "attention", 1 / K),
    ("complete-p", "residual", L**-ALPHA),
    ("moe-dmft", "attention", 1 / K),
    ("moe-dmft", "residual", 1 / L),
    ("moe-dmft", "route", 1 / TOP_K),
    ("mssp-II", "route", 1 / TOP_K),
    ("mssp-III", "route", 1 / TOP_K),
    ("complete-mue", "ffn", D / A),
    ("complete-mue", "route", TOP_K),
    ("complete-mue", "residual", L**-ALPHA),
    ("hyperp", "residual", L**-0.5),
]


def alpha_of(rule):
    """The exponent for which a rule is derived, else one that shows."""
    return ALPHA if get_rule(rule).alpha is None else get_rule(rule).alpha


#: Roles for which the papers' cells write d for sides between widths, where the code has the matrix's own fan-in and fan-out.
STREAM = {"hidden", "ffn_up", "expert_up", "shared_up", "unembedding"}


def cell(rule, family, role, column):
    sides = {"fan_in": FAN_IN, "fan_out": FAN_OUT}
    if (role in STREAM or (rule, role) == ("mup", "router")) and rule in (
        "mup",
        "complete-p",
        "complete-mue",
        "moe-dmft",
        "moe-dmft-half",
    ):
        sides = {"fan_in": D, "fan_out": D if role == "hidden" else FAN_OUT}
    ratios = {**TARGET.ratios(BASE), **sides}
    return parse(getattr(get_rule(rule).table(family)[Role(role)], column)).evaluate(ratios, alpha_of(rule))


@pytest.mark.parametrize(("rule", "family", "role", "column", "value"), CELLS)
def test_golden_cell(rule, family, role, column, value):
    assert cell(rule, family, role, column) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("rule", "kind", "value"), MULTIPLIERS)
def test_golden_multiplier(rule, kind, value):
    found = parse(get_rule(rule).multipliers[kind]).evaluate(TARGET.ratios(BASE), alpha_of(rule))
    assert found == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("paper", ["mup", "complete-p", "moe-dmft", "mssp", "complete-mue", "hyperp"])
def test_every_paper_has_thirty_golden_cells(paper):
    assert sum(param.values[0].startswith(paper) for param in CELLS) >= 30


def test_the_ratios_are_the_primes_that_the_golden_values_are_written_in():
    expected = {"d": D, "L": L, "H": H, "h": H_EXPERT, "E": E, "a": TOP_K, "A": A, "k": K, "T": T, "B": B}
    found = TARGET.ratios(BASE)
    assert {symbol: found[symbol] for symbol in expected} == expected
    assert {symbol: found[symbol] for symbol in ("kappa", "alpha_ffn", "S")} == pytest.approx(
        {"kappa": KAPPA, "alpha_ffn": ALPHA_FFN, "S": S}, rel=1e-14
    )
    assert len({*expected.values(), FAN_IN, FAN_OUT}) == len(expected) + 2


def test_a_wrong_cell_would_be_found():
    """Cells of the tables are either the same monomial or differ by far more than the golden tolerance."""
    tables = [table for rule in RULES.values() for table in rule.tables.values()]
    texts = {getattr(row, column) for table in tables for row in table.values() for column in COLUMNS}
    ratios = {**TARGET.ratios(BASE), "fan_in": FAN_IN, "fan_out": FAN_OUT}
    values = sorted({float(f"{parse(text).evaluate(ratios, ALPHA):.10g}") for text in texts})
    assert len(values) > 40
    assert min(b / a for a, b in pairwise(values)) > 1 + 1e-4


def test_regime_one_has_no_route_multiplier():
    """theta = 0 (docs/derivations/mssp.md), so adding experts' gates is left to the layer."""
    assert "route" not in get_rule("mssp-I").multipliers


def test_one_minus_beta_scales_with_batch_over_tokens():
    for rule in ("complete-p", "moe-dmft", "complete-mue"):
        assert parse(get_rule(rule).betas).evaluate(TARGET.ratios(BASE), ALPHA) == pytest.approx(B / T, rel=1e-12)


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda rule: rule.name)
def test_every_row_names_its_source(rule):
    for table in rule.tables.values():
        for role, row in table.items():
            assert row.source, role
            assert row.status in ("paper", "code", "derived", "measured")
            assert rule.name == "sp" or (Path(__file__).parents[3] / row.page).is_file(), role


def test_rows_taken_over_keep_the_page_of_their_rule():
    table = get_rule("complete-mue").table("adam")
    assert table[Role.HIDDEN].citation == "2512.22382 Table 1; docs/derivations/complete-p.md"
    assert table[Role.SCALAR].citation == "2512.22382 Table 1 (derived); docs/derivations/complete-p.md"
    assert table[Role.ROUTER].page == get_rule("complete-mue").page == "docs/derivations/complete-mue.md"


@pytest.mark.parametrize("rule", RULES)
def test_at_base_size_every_cell_is_exactly_one(rule):
    same = {**BASE.ratios(BASE), "fan_in": 1.0, "fan_out": 1.0}
    for table in get_rule(rule).tables.values():
        for row in table.values():
            assert [parse(getattr(row, column)).evaluate(same, ALPHA) for column in COLUMNS] == [1.0] * 4
    for text in (*get_rule(rule).multipliers.values(), get_rule(rule).betas):
        assert parse(text).evaluate(same, ALPHA) == 1.0


@pytest.mark.parametrize("rule", ["mssp-I", "mssp-II", "mssp-III", "mup"])
@pytest.mark.parametrize("family", ["adam", "sgd"])
def test_weight_decay_keeps_lr_times_wd(rule, family):
    for role in get_rule(rule).table(family):
        assert cell(rule, family, role, "lr") * cell(rule, family, role, "wd") == pytest.approx(1.0, rel=1e-12)


def test_only_regime_three_draws_experts_alike():
    tied = {
        (rule, role)
        for rule in RULES
        for table in get_rule(rule).tables.values()
        for role, row in table.items()
        if row.tied
    }
    assert tied == {("mssp-III", Role.EXPERT_UP), ("mssp-III", Role.EXPERT_DOWN)}


def test_at_the_reference_aspect_ratio_complete_mue_is_complete_p():
    """With A = d the down cell is d^-1/2 (docs/derivations/complete-mue.md)."""
    ratios = {**TARGET.ratios(BASE), "A": D, "fan_in": D, "kappa": 1.0}
    mue, p = get_rule("complete-mue").table("adam"), get_rule("complete-p").table("adam")
    for role in p:
        for column in COLUMNS:
            left, right = (parse(getattr(table[role], column)).evaluate(ratios, ALPHA) for table in (mue, p))
            assert left == pytest.approx(right, rel=1e-12), (role, column)


def test_experts_no_wider_than_at_the_base_are_drawn_by_fan_in_under_moe_dmft():
    """The down draw differs from fan-in by alpha_ffn^1/2, and only by it (docs/derivations/moe-dmft.md)."""
    rule, control = get_rule("moe-dmft").table("adam"), moe_dmft_fan_in().table("adam")
    assert {role for role in rule if rule[role] != control[role]} == {Role.EXPERT_DOWN}
    ratios = TARGET.ratios(BASE)
    ours, fan_in = (parse(t[Role.EXPERT_DOWN].init).evaluate(ratios, 1.0) for t in (rule, control))
    assert fan_in == pytest.approx(H_EXPERT**-0.5, rel=1e-12)
    assert ours / fan_in == pytest.approx(ALPHA_FFN**-0.5, rel=1e-12)
    lr = parse(control[Role.EXPERT_DOWN].lr).evaluate(ratios, 1.0)
    assert (fan_in, lr) == pytest.approx(((ALPHA_FFN * D) ** -0.5, S / (ALPHA_FFN * D)), rel=1e-12)


def test_moe_dmft_asks_for_fixed_sparsity_and_shows_its_invariant():
    rule = get_rule("moe-dmft")
    assert rule.fixed == {"kappa"}
    assert rule.alpha == 1.0
    sizes = Axes(64, 4, 256, 128, 8, 2, head_dim=16).sizes()
    assert parse(rule.invariants["alpha_star"]).evaluate(sizes) == pytest.approx(64 / (128 * 8 * 4))


@pytest.mark.parametrize(
    ("moved", "regime", "reason"),
    [
        ({}, "mssp-I", "neither n_experts nor top_k moved"),
        ({"width": 128, "expert_width": 128}, "mssp-I", "neither n_experts nor top_k moved"),
        ({"width": 128}, "mssp-I", "neither n_experts nor top_k moved"),
        ({"width": 128, "n_experts": 16, "top_k": 4}, "mssp-II", "n_experts and top_k moved and expert_width did not"),
        ({"n_experts": 16}, "mssp-II", r"n_experts moved.*d x 1\), found E x 2"),
        (
            {"width": 128, "n_experts": 16, "top_k": 4, "expert_width": 128},
            "mssp-III",
            "n_experts and top_k moved and expert_width too",
        ),
        ({"top_k": 4, "expert_width": 256}, "mssp-III", r"top_k moved.*found h x 4"),
    ],
)
def test_mssp_resolves_its_regime_by_what_moved(moved, regime, reason):
    sizes = {"width": 64, "depth": 2, "n_experts": 8, "top_k": 2, "expert_width": 64, "active_width": 128}
    rule, why = get_rule("mssp").resolve(Axes(**{**sizes, **moved}), Axes(**sizes))
    assert rule.name == regime
    assert re.search(reason, why), why


def test_mssp_on_the_papers_path_has_no_reservation():
    base = Axes(width=64, n_experts=8, top_k=2, expert_width=64)
    _, why = choose_regime(Axes(width=128, n_experts=16, top_k=4, expert_width=128), base)
    assert "found" not in why
    _, why = choose_regime(Axes(width=128, n_experts=32, top_k=8, expert_width=128), base)
    assert why.endswith("the paper scales these with the width (d x 2), found E x 4")


def test_presets_name_real_columns_and_compile():
    factors = get_rule("moe-dmft").presets["paper"].factors
    names = {
        "blocks.0.attention.w_v": {"init": 1 / 16, "lr": 1 / 16},
        "model.layers.3.self_attn.v_proj.weight": {"init": 1 / 16, "lr": 1 / 16},
        "blocks.0.attention.w_q": {"lr": 1 / 16},
        "model.layers.3.self_attn.k_proj.weight": {"lr": 1 / 16},
        "blocks.1.ffn.experts.w_down": {"init": 1 / 4, "lr": 1 / 16},
        "model.layers.3.mlp.down_proj.weight": {"init": 1 / 4, "lr": 1 / 16},
        "blocks.1.ffn.experts.w_up": {},
        "blocks.0.attention.w_o": {},
        "model.embed_tokens.weight": {},
        "transformer.unembedding.weight": {},
    }
    for name, expected in names.items():
        found = [columns for pattern, columns in factors.items() if re.search(pattern, name)]
        assert len(found) <= 1, name
        assert (found[0] if found else {}) == expected, name
    preset = get_rule("hyperp").presets["paper"]
    assert preset.base == {"depth": 8, "width": 1024, "tokens": 10.4e9, "batch_tokens": 2097152}
    assert preset.hyperparameters == {"lr": 0.015, "momentum": 0.95}


def test_rule_without_a_table_for_the_optimizer_names_those_that_have_one():
    with pytest.raises(ValueError, match=r"complete-mue.*no table.*'sphere'.*hyperp"):
        get_rule("complete-mue").table("sphere")
    assert rules_for("muon") == ["hyperp"]


def test_unknown_rule_lists_the_known():
    with pytest.raises(ValueError, match=r"rule: found 'mue'.*complete-mue"):
        get_rule("mue")


def test_size_must_be_positive():
    with pytest.raises(ValueError, match="depth: found 0"):
        Axes(depth=0)


@pytest.mark.parametrize("rule", ["hyperp", "hyperp-paper"])
def test_hyperp_scales_attention_logits_by_the_head_size(rule):
    """Head size 8 -> 32: k^-1 of the base's scale, not the k^-1/2 that the module has by itself."""
    model = MoELanguageModel(width=64, depth=1, n_heads=2, n_experts=0, context_length=8)
    scaling = plan(model, base={"width": 16}, rule=rule, family="sphere")
    assert scaling.multipliers["transformer.blocks.0.attention.core.scale"] == pytest.approx(8**-0.5 / 4)


@pytest.mark.parametrize(
    ("preset", "regime", "E", "a", "h"), [("paper-II", "II", 32, 16, 32), ("paper-III", "III", 8, 4, 128)]
)
def test_the_tuned_constants_of_mssp(preset, regime, E, a, h):
    """At the authors' base: route 1/K, and the down matrix sqrt(E/h) in II; lr multipliers of their configurations."""
    sizes = {"n_experts": E, "top_k": a, "expert_width": h, "moe_every": 2 if regime == "II" else 1}
    with torch.device("meta"):
        options = {"width": 256, "depth": 2, "n_heads": 4, "scoring": "sigmoid", "router_init_std": 1 / 16, **sizes}
        model = MoELanguageModel(route_scale=1 / a, **options)
    base = {"depth": 2, "n_experts": E}
    scaling = plan(model, base=base, rule="mssp", preset=preset)
    down = next(p for p in scaling.parameters if p.name.endswith("experts.w_down"))
    expected = (E / h) ** 0.5 if regime == "II" else 4 * h**-0.5
    assert down.init.value == pytest.approx(expected, rel=0.02)
    assert down.lr == pytest.approx(256 if regime == "II" else 128)
    assert MSSP.presets[preset].base["route_scale"] == pytest.approx(1 / a)


def test_a_preset_is_refused_where_its_constants_reach_nothing():
    """Its patterns are the names of our model; on another, some or all constants would be left out without a word."""
    roles = {"stem": "embedding", "^h": "hidden", "head": "unembedding"}

    def other(width, stem="stem"):
        made = {
            stem: torch.nn.Embedding(8, width),
            "h": torch.nn.Linear(width, width),
            "head": torch.nn.Linear(width, 8),
        }
        return torch.nn.ModuleDict(made)

    with pytest.raises(
        ValueError, match=r"preset: found 'paper-II', whose constants .* none for stem.weight, h.weight"
    ):
        plan(other(64), base=lambda: other(32), rule="mssp", preset="paper-II", roles=roles)
    some = {"embedding": "embedding", "^h": "hidden", "head": "unembedding"}
    with pytest.raises(ValueError, match=r"preset: found 'paper-III'.* none for h.weight, head.weight"):
        plan(other(64, "embedding"), base=lambda: other(32, "embedding"), rule="mssp", preset="paper-III", roles=some)
    assert plan(other(64), base=lambda: other(32), rule="mssp", roles=roles)["h.weight"].lr == 0.5
