from __future__ import annotations

import pytest
import torch

from lightning_mue.moe import Router
from lightning_mue.parameterizations.rules.roles import Role


def routed(logits, top_k=2, bias=None, **settings):
    """Route tokens whose logits are given: with an identity weight the token is its logits."""
    logits = torch.as_tensor(logits, dtype=torch.float32)
    router = Router(logits.shape[1], logits.shape[1], top_k, **settings)
    with torch.no_grad():
        router.weight.copy_(torch.eye(logits.shape[1]))
        if bias is not None:
            router.balance_bias.copy_(torch.tensor(bias))
    return router, router(logits)


LOGITS = [[0.0, 2.0, 1.0, -3.0]]
SOFTMAX = torch.tensor(LOGITS).softmax(-1)[0]
SIGMOID = torch.tensor(LOGITS).sigmoid()[0]


@pytest.mark.parametrize(
    ("scoring", "expected"),
    [
        ("softmax-topk", SOFTMAX[[1, 2]]),
        ("topk-softmax", SOFTMAX[[1, 2]] / SOFTMAX[[1, 2]].sum()),
        ("sigmoid", SIGMOID[[1, 2]]),
        ("sigmoid-normalized", SIGMOID[[1, 2]] / SIGMOID[[1, 2]].sum()),
    ],
)
@pytest.mark.parametrize("gate", ["linear", "sqrt"])
def test_definition_of_each_scoring(scoring, expected, gate):
    _, routing = routed(LOGITS, scoring=scoring, gate=gate)
    assert routing.expert_ids.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.gates[0], expected.sqrt() if gate == "sqrt" else expected)
    assert routing.counts.tolist() == [0, 1, 1, 0]
    assert [t.dtype for t in (routing.expert_ids, routing.gates, routing.logits, routing.counts)] == [
        torch.int64,
        torch.float32,
        torch.float32,
        torch.int64,
    ]


@pytest.mark.parametrize("scoring", ["softmax-topk", "topk-softmax", "sigmoid", "sigmoid-normalized"])
def test_bias_selects_but_does_not_enter_the_gates(scoring):
    _, plain = routed(LOGITS, top_k=4, scoring=scoring)
    _, biased = routed(LOGITS, top_k=4, scoring=scoring, bias=[0.0, 0.0, 0.0, 9.0])
    assert biased.expert_ids[0, 0] == 3
    by_expert = [r.gates[0, r.expert_ids[0].argsort()] for r in (plain, biased)]
    torch.testing.assert_close(*by_expert)
    assert routed(LOGITS, scoring=scoring, bias=[0.0, 0.0, 0.0, 9.0])[1].expert_ids.tolist() == [[3, 1]]


@pytest.mark.parametrize("scoring", ["softmax-topk", "topk-softmax", "sigmoid", "sigmoid-normalized"])
def test_sqrt_gate_has_finite_gradients_where_a_gate_underflows(scoring):
    logits = [[90.0, -120.0, -200.0]] if "softmax" in scoring else [[-120.0, -200.0, -300.0]]
    router, routing = routed(logits, scoring=scoring, gate="sqrt")
    routing.gates.sum().backward()
    assert router.weight.grad.isfinite().all()


def test_float32_under_autocast_and_from_bfloat16():
    router = Router(8, 4, 2)
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = router(x)
    assert torch.equal(inside.logits, router(x).logits)
    assert router(x.bfloat16()).logits.dtype == torch.float32


def test_casting_the_module_keeps_the_bias_exact():
    router = Router(8, 4, 2)
    router.balance_bias.copy_(torch.tensor([1.0001, 0.0, 0.0, 0.0]))
    assert router.bfloat16().weight.dtype == torch.bfloat16
    assert router.balance_bias.dtype == torch.float32
    assert router.balance_bias[0] == torch.tensor(1.0001)


def test_routing_is_deterministic_and_complete():
    router = Router(16, 8, 3)
    x = torch.randn(100, 16)
    first, second = router(x), router(x)
    assert torch.equal(first.expert_ids, second.expert_ids)
    assert torch.equal(first.counts, torch.bincount(first.expert_ids.flatten(), minlength=8))
    assert all(len(set(ids)) == 3 for ids in first.expert_ids.tolist())


def test_zero_tokens():
    routing = Router(16, 8, 3)(torch.empty(0, 16))
    assert routing.gates.shape == (0, 3)
    assert routing.counts.tolist() == [0] * 8


def test_declares_its_roles():
    router = Router(4, 4, 1)
    declared = {name for name, _ in (*router.named_parameters(), *router.named_buffers())}
    assert declared == set(router.mue_roles)
    assert router.mue_roles["balance_bias"] is Role.BALANCE_BIAS
    assert "balance_bias" in router.state_dict()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"top_k": 5}, "top_k: found 5, expected at most n_experts=4"),
        ({"top_k": 0}, "top_k: found 0"),
        ({"n_experts": -1}, "n_experts: found -1"),
        ({"scoring": "softmax"}, "scoring: found 'softmax'.*'topk-softmax'"),
        ({"gate": "cubic"}, "gate: found 'cubic'.*'sqrt'"),
        ({"init_std": 0.0}, "router_init_std.*all experts then tie"),
        ({"init_std": float("nan")}, "init_std: found nan"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        Router(**{"width": 8, "n_experts": 4, "top_k": 2} | arguments)


def test_sizes_must_be_integers():
    with pytest.raises(TypeError, match=r"top_k: found 2\.0 of type float, expected an integer"):
        Router(8, 4, 2.0)


def test_zero_router_is_fine_when_every_expert_is_active():
    assert not Router(8, 4, 4, init_std=0.0).weight.any()
