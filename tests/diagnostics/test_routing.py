"""Routing metrics against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mue.diagnostics import dead_experts, load_entropy, load_max_fraction, max_violation, router_entropy


@pytest.mark.parametrize("E", [1, 4, 64])
def test_uniform_load(E):
    counts = torch.full((E,), 12)
    assert max_violation(counts).item() == 0
    assert load_entropy(counts).item() == pytest.approx(math.log(E), rel=1e-6, abs=1e-7)
    assert load_max_fraction(counts).item() == pytest.approx(1 / E)
    assert dead_experts(counts).item() == 0


@pytest.mark.parametrize("E", [2, 4, 64])
def test_collapsed_load(E):
    counts = torch.zeros(E, dtype=torch.int64)
    counts[1] = 100
    assert max_violation(counts).item() == pytest.approx(E - 1)
    assert load_entropy(counts).item() == 0
    assert load_max_fraction(counts).item() == 1
    assert dead_experts(counts).item() == E - 1


def test_known_load():
    counts = torch.tensor([6, 0, 2, 4])
    assert max_violation(counts).item() == 1.0  # (6 - 3) / 3
    assert max_violation(counts / 12).item() == pytest.approx(1.0)  # scale-free
    assert load_entropy(counts).item() == pytest.approx(math.log(2) / 2 + math.log(6) / 6 + math.log(3) / 3)
    assert dead_experts(counts).item() == 1


def test_rows_are_measured_one_by_one():
    counts = torch.tensor([[1, 1], [2, 0]])
    assert max_violation(counts).tolist() == [0, 1]
    assert dead_experts(counts).tolist() == [0, 1]
    assert load_max_fraction(counts).tolist() == [0.5, 1]
    assert load_entropy(counts).tolist() == pytest.approx([math.log(2), 0])


def test_violation_of_a_sum_is_not_the_mean_of_violations():
    """Why ranks sum their loads first: two skewed ranks may be balanced together."""
    ranks = torch.tensor([[4, 0], [0, 4]])
    assert max_violation(ranks.sum(0)).item() == 0
    assert max_violation(ranks).mean().item() == 1


def test_router_entropy_closed_forms():
    assert router_entropy(torch.zeros(5, 8)).item() == pytest.approx(math.log(8), rel=1e-6)
    assert router_entropy(100 * torch.eye(8)).item() == pytest.approx(0, abs=1e-6)
    masked = torch.tensor([[0.0, 0.0, float("-inf")]])
    assert router_entropy(masked).item() == pytest.approx(math.log(2), rel=1e-6)
    logits = 2 * torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    p = logits.double().softmax(-1)
    assert router_entropy(logits).item() == pytest.approx(-(p * p.log()).sum(-1).mean().item(), rel=1e-6)


def test_entropy_of_tokens_is_not_entropy_of_load():
    logits = 100 * torch.eye(8)
    counts = torch.bincount(logits.argmax(-1), minlength=8)
    assert load_entropy(counts).item() > 2 > 1e-3 > router_entropy(logits).item()


def test_empty_batch():
    counts = torch.zeros(4, dtype=torch.int64)
    assert max_violation(counts).isnan()
    assert load_entropy(counts).isnan()
    assert load_max_fraction(counts).isnan()
    assert dead_experts(counts).item() == 4
    assert router_entropy(torch.empty(0, 4)).isnan()


def test_nan_is_not_hidden():
    assert router_entropy(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]])).isnan()
    assert max_violation(torch.tensor([1.0, float("nan")])).isnan()


@pytest.mark.parametrize("function", [dead_experts, load_entropy, load_max_fraction, max_violation, router_entropy])
def test_refuses_no_experts(function):
    with pytest.raises(ValueError, match=r"(load|counts|logits): found .*at least one expert"):
        function(torch.empty(3, 0))
