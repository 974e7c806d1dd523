"""Group-balanced routing (arXiv:2605.23893): values against a float64 loop, errors, and that no rule sees the groups."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mue.models import MoELanguageModel
from lightning_mue.moe import MoELayer, Router
from lightning_mue.parameterizations import plan

SCORINGS = ("softmax-topk", "topk-softmax", "sigmoid", "sigmoid-normalized")


def chosen_by_loop(scores_E, top_k, n_groups):
    """Group by group, the experts of highest score; then the whole set by descending score."""
    size, chosen = len(scores_E) // n_groups, []
    for g in range(n_groups):
        members = sorted(range(g * size, (g + 1) * size), key=lambda i: -scores_E[i])
        chosen += members[: top_k // n_groups]
    return sorted(chosen, key=lambda i: -scores_E[i])


def layer_by_loop(layer, x_Td, n_groups):
    """y [T, d] in float64, token by token, and the chosen experts."""
    router = layer.router
    weights = {name: p.detach().double() for name, p in layer.named_parameters()}
    rows, ids = [], []
    for x_d in x_Td.double():
        logits = weights["router.weight"] @ x_d
        sigmoid = router.scoring.startswith("sigmoid")
        score = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, 0)
        selection = (score + router.balance_bias.double()).tolist()
        chosen = chosen_by_loop(selection, router.top_k, n_groups)
        gates = score[chosen]
        if router.scoring in ("topk-softmax", "sigmoid-normalized"):
            gates = gates / gates.sum()
        if router.gate == "sqrt":
            gates = gates.sqrt()
        y_d = torch.zeros_like(x_d)
        for i, gate in zip(chosen, gates, strict=True):
            up, through = weights["experts.w_up"][i] @ x_d, weights["experts.w_gate"][i] @ x_d
            y_d += layer.route_scale * gate * (weights["experts.w_down"][i] @ (through * torch.sigmoid(through) * up))
        rows.append(y_d)
        ids.append(chosen)
    return torch.stack(rows), torch.tensor(ids)


def make_layer(n_groups, **settings):
    layer = MoELayer(16, 8, 12, 6, n_groups=n_groups, init_std=0.3, route_scale=2.0, **settings)
    layer.router.balance_bias.copy_(torch.linspace(-0.02, 0.02, 12))
    return layer


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("gate", ["linear", "sqrt"])
@pytest.mark.parametrize("n_groups", [1, 2, 3, 6])
def test_values_equal_a_float64_loop(scoring, gate, n_groups):
    layer, x = make_layer(n_groups, scoring=scoring, gate=gate), torch.randn(40, 16)
    expected, ids = layer_by_loop(layer, x, n_groups)
    y = layer(x)
    assert layer.last_routing.expert_ids.tolist() == ids.tolist()
    # float32 against float64, sums of 6 x 8 x 16 terms: a few hundred times the unit roundoff 6e-8.
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-5)


def test_the_comparison_bites():
    """The loop with another number of groups is another function."""
    layer, x = make_layer(3), torch.randn(40, 16)
    expected, ids = layer_by_loop(layer, x, 1)
    assert (layer(x).double() - expected).abs().max() > 1e-2
    assert layer.last_routing.expert_ids.tolist() != ids.tolist()


@pytest.mark.parametrize("n_groups", [2, 4])
def test_every_group_has_equally_many_active_experts(n_groups):
    router = Router(16, 8, 4, n_groups=n_groups)
    free = Router(16, 8, 4)
    free.load_state_dict(router.state_dict())
    x = torch.randn(200, 16)

    def spread(routing):
        groups = routing.expert_ids // (8 // n_groups)
        return torch.stack([(groups == g).sum(-1) for g in range(n_groups)], -1)

    assert (spread(router(x)) == 4 // n_groups).all()
    assert not (spread(free(x)) == 4 // n_groups).all()
    assert router(x).counts.sum() == 800


def test_gates_are_normalized_over_the_whole_active_set():
    routing = Router(16, 8, 4, n_groups=2)(torch.randn(50, 16))
    torch.testing.assert_close(routing.gates.sum(-1), torch.ones(50))
    assert (routing.gates[:, 1:] <= routing.gates[:, :-1]).all()


def test_selection_is_deterministic_under_ties():
    router = Router(4, 8, 4, n_groups=2)
    with torch.no_grad():
        router.weight.copy_(router.weight[:1].expand(8, 4))
    first = router(torch.randn(30, 4)).expert_ids
    assert all(torch.equal(router(torch.randn(30, 4)).expert_ids, first) for _ in range(3))
    assert all(sorted(row) == sorted(set(row)) for row in first.tolist())


def test_no_tokens_and_nan_tokens():
    router = Router(16, 8, 4, n_groups=2)
    assert router(torch.empty(0, 16)).expert_ids.shape == (0, 4)
    x = torch.randn(6, 16)
    clean = router(x)
    x[2] = math.nan
    routing = router(x)
    others = [0, 1, 3, 4, 5]
    assert torch.equal(routing.expert_ids[others], clean.expert_ids[others])
    assert ((routing.expert_ids >= 0) & (routing.expert_ids < 8)).all()
    assert routing.gates[2].isnan().all()


def test_the_bias_moves_tokens_within_their_group_only():
    router = Router(16, 8, 2, n_groups=2)
    before = router(torch.randn(20, 16, generator=torch.Generator().manual_seed(1)))
    router.balance_bias[5] = 9.0
    after = router(torch.randn(20, 16, generator=torch.Generator().manual_seed(1)))
    assert after.counts[5] == 20
    assert torch.equal(after.counts[:4], before.counts[:4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"n_experts": 6, "top_k": 4, "n_groups": 4},
            r"n_groups: found 4, expected a divisor of n_experts=6.*it may be 1, 2\.",
        ),
        (
            {"n_experts": 8, "top_k": 2, "n_groups": 4},
            r"n_groups: found 4, expected a divisor of top_k=2.*it may be 1, 2\.",
        ),
        ({"n_experts": 8, "top_k": 2, "n_groups": 0}, "n_groups: found 0"),
        ({"n_experts": 8, "top_k": 2, "n_groups": 2, "init_std": 0.0}, "init_std: found 0"),
    ],
)
def test_groups_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Router(16, **arguments)


SIZES = {"width": 64, "depth": 1, "n_heads": 4, "n_experts": 8, "top_k": 4, "expert_width": 32, "ffn_width": 64}
BASE = {"width": 32, "n_experts": 0, "n_heads": 2}


@pytest.mark.parametrize("rule", ["complete-mue", "moe-dmft", "mssp-III"])
def test_a_rule_gives_the_same_plan_with_and_without_groups(rule):
    base = BASE if rule == "complete-mue" else {"width": 32, "n_heads": 2, "n_experts": 4, "top_k": 2}
    grouped = plan(MoELanguageModel(**SIZES, n_expert_groups=2), base=base, rule=rule)
    free = plan(MoELanguageModel(**SIZES), base=base, rule=rule)
    assert grouped.diff(free) == []
    assert grouped.diff(plan(MoELanguageModel(**{**SIZES, "top_k": 2}), base=base, rule=rule)) != []


def test_language_model_with_groups_routes_in_groups_and_names_its_argument():
    model = MoELanguageModel(**SIZES, n_expert_groups=4, vocab_size=32)
    model(torch.randint(0, 32, (2, 10)))
    groups = model.moe_layers[0].last_routing.expert_ids // 2
    assert groups.sort(-1).values.unique(dim=0).tolist() == [[0, 1, 2, 3]]
    with pytest.raises(ValueError, match=r"n_expert_groups: found 3, expected a divisor of n_experts=8"):
        MoELanguageModel(**SIZES, n_expert_groups=3)
    with pytest.raises(ValueError, match=r"n_expert_groups: found 0"):
        MoELanguageModel(**SIZES, n_expert_groups=0)
    assert MoELanguageModel(**{**SIZES, "n_experts": 0}, n_expert_groups=3).moe_layers == []
