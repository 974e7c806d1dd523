"""Routing problems, and what their answers are: written anew from the formulas, token by token, in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mue.kernels.routing.op import GATES, SCORINGS, Routed, route


class Case(NamedTuple):
    tokens: int = 30
    n_experts: int = 8
    top_k: int = 2
    scoring: str = "topk-softmax"
    gate: str = "linear"
    n_groups: int = 1
    n_sequences: int = 1
    masked: bool = False
    biased: bool = False
    kind: str = "normal"  # of logits: "normal", "quantized" (many equal), "wide" (some gates underflow)

    @property
    def settings(self) -> dict:
        return {k: getattr(self, k) for k in ("top_k", "scoring", "gate", "n_groups", "n_sequences")}


SIZES = [
    Case(),
    Case(n_sequences=5),
    Case(masked=True, biased=True),
    Case(24, 12, 6, n_groups=3, n_sequences=2, masked=True),
    Case(24, 12, 4, n_groups=2, biased=True),
    Case(24, 6, 6, n_groups=6),
    Case(9, 5, 5),
    Case(7, 1, 1),
    Case(0, 4, 2),
    Case(1, 16, 1),
    Case(20, 16, 4, kind="quantized", masked=True),
    Case(20, 16, 4, kind="wide", n_sequences=4),
]
CASES = [case._replace(scoring=s, gate=g) for case in SIZES for s in SCORINGS for g in GATES]


def tensors(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits, bias and mask."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(case.tokens, case.n_experts, generator=generator)
    if case.kind == "quantized":
        logits = logits.mul(2).round()
    if case.kind == "wide":
        logits *= 60
    bias = torch.randn(case.n_experts, generator=generator) * (0.2 if case.biased else 0.0)
    mask = torch.rand(case.tokens, generator=generator) > 0.3 if case.masked else None
    return logits.to(dtype), bias, mask


def run(case: Case, logits: Tensor, bias: Tensor, mask: Tensor | None, backend: str = "torch") -> Routed:
    return route(logits, bias, mask_T=mask, backend=backend, **case.settings)


def gradient(routed: Routed, logits: Tensor, seed: int = 1) -> Tensor:
    """Of a sum of everything differentiable with random factors."""
    generator = torch.Generator().manual_seed(seed)
    outputs = (routed.gates, routed.probability_sum, routed.z_sum)
    factors = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return torch.autograd.grad(outputs, logits, factors)[0]


def chosen(scores: list[float], case: Case) -> list[int]:
    """By descending score, then ascending index; at most K / G of a group."""
    ranked = sorted(range(len(scores)), key=lambda e: (-scores[e], e))
    room = [case.top_k // case.n_groups] * case.n_groups
    picked = []
    for e in ranked:
        group = e // (case.n_experts // case.n_groups)
        if room[group]:
            room[group] -= 1
            picked.append(e)
    return picked


def reference(case: Case, logits: Tensor, bias: Tensor, mask: Tensor | None) -> Routed:
    """As `route`, from `logits` in float64, differentiable by autograd."""
    n, experts, length = case.n_sequences, case.n_experts, case.tokens // case.n_sequences
    zero = logits.sum() * 0
    counts = torch.zeros(n, experts, dtype=torch.int64)
    probability_sum = [zero.new_zeros(experts) for _ in range(n)]
    z_sum = [zero for _ in range(n)]
    ids, gates = [], []
    for t, row in enumerate(logits):
        if mask is not None and not mask[t]:
            ids.append([experts] * case.top_k)
            gates.append(zero.expand(case.top_k))
            continue
        p = row.exp() / row.exp().sum() if row.abs().max() < 500 else row.softmax(0)
        score = 1 / (1 + (-row).exp()) if "sigmoid" in case.scoring else p
        # Without a bias rounding in the scores must decide nothing: sigmoid(40) and sigmoid(41) are not equal.
        compared = (score + bias.double() if bias.any() else row).tolist()
        picked = chosen(compared, case)
        log_gate = {
            "softmax-topk": row.log_softmax(0)[picked],
            "topk-softmax": row[picked].log_softmax(0),
            "sigmoid": torch.nn.functional.logsigmoid(row[picked]),
            "sigmoid-normalized": torch.nn.functional.logsigmoid(row[picked]).log_softmax(0),
        }[case.scoring]
        ids.append(picked)
        gates.append((log_gate if case.gate == "linear" else log_gate / 2).exp())
        s = t // length
        counts[s, picked] += 1
        probability_sum[s] = probability_sum[s] + p
        z_sum[s] = z_sum[s] + row.logsumexp(0) ** 2
    return Routed(
        torch.tensor(ids, dtype=torch.int64).view(-1, case.top_k),
        torch.stack(gates) if gates else logits.new_zeros(0, case.top_k) + zero,
        counts,
        torch.stack(probability_sum),
        torch.stack(z_sum),
    )


def check(routed: Routed, expected: Routed, tolerance: float) -> None:
    """Integers exactly; what is real to `tolerance` of its size, and of 1 where it is smaller."""
    assert torch.equal(routed.expert_ids, expected.expert_ids), "ids"
    assert torch.equal(routed.counts, expected.counts), "counts"
    for name in ("gates", "probability_sum", "z_sum"):
        close(getattr(routed, name), getattr(expected, name), tolerance, name)


def close(ours: Tensor, exact: Tensor, tolerance: float, name: str) -> None:
    error = (ours.detach().double() - exact.detach().double()).abs()
    assert ours.shape == exact.shape, name
    assert not (error > tolerance * exact.detach().abs().clamp(min=1)).any(), f"{name}: {error.max()}"
    assert not error.isnan().any(), f"{name}: nan"


def overlap(ids: Tensor) -> bool:
    """Whether a token has an expert twice."""
    ordered = ids.sort(1).values
    return bool((ordered[:, 1:] == ordered[:, :-1]).any())
