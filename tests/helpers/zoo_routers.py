"""Experts behind routers as public projects write them, in our own words: how logits are made, and how a choice is.

DeepSpeed's two ``argmax``, an einsum with a bare parameter, a weight on the left of its product, Tutel's bare product with a linear
layer's weight, ``max`` of a gate in a Sequential, experts in a list inside another module called experts, and experts that choose
their tokens. Each keeps what it routed by: ``true_logits`` [T, E] and ``true_counts`` [E] (None: no choice of tokens).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from helpers.zoo_layouts import GPT, Block, FusedAttention, NanoMLP, shifted_loss
from helpers.zoo_models import ZooModel
from torch import Tensor, nn


class Gate(nn.Module):
    """Returns the combine weights [T, E] of tokens [T, d]."""

    def keep(self, logits: Tensor, ids: Tensor | None) -> Tensor:
        E = logits.shape[1]
        self.true_logits = logits.detach().double()
        self.true_counts = None if ids is None else torch.bincount(ids.flatten(), minlength=E).double()
        return logits.softmax(-1) if ids is None else logits.softmax(-1) * F.one_hot(ids, E).sum(1)


class DeepSpeedGate(Gate):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.wg, self.k = nn.Linear(width, experts, bias=False), 2

    def forward(self, x: Tensor) -> Tensor:
        logits = F.linear(x.float(), self.wg.weight.float())
        first = torch.argmax(logits.softmax(1), dim=1)
        rest = logits.masked_fill(F.one_hot(first, logits.shape[1]).bool(), float("-inf"))
        return self.keep(logits, torch.stack([first, torch.argmax(rest, dim=1)], dim=1))


class EinsumGate(Gate):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.w_gating = nn.Parameter(torch.randn(width, experts))

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.einsum("...nd,...de->...ne", x, self.w_gating)
        return self.keep(logits, logits.softmax(-1).topk(2, dim=-1)[1])


class LeftGate(Gate):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, width))

    def forward(self, x: Tensor) -> Tensor:
        logits = (self.weight @ x.t()).t()
        return self.keep(logits, logits.topk(2, dim=-1).indices)


class TutelGate(Gate):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.wg = nn.Linear(width, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits = torch.addmm(torch.zeros(()), x, self.wg.weight.t())
        ids = torch.topk(input=logits, k=2, dim=-1).indices
        logits.argmax(-1)  # only looks
        torch.matmul(input=x, other=x.t())
        return self.keep(logits, ids)


class MaxGate(Gate):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, experts))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x)
        stable = logits - logits.max(-1, keepdim=True).values
        return self.keep(logits, stable.softmax(-1).max(-1)[1].unsqueeze(1))


class ExpertsChoose(Gate):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router, self.top_k = nn.Linear(width, experts, bias=False), 2

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        logits.softmax(-1).t().topk(5, dim=-1)
        return self.keep(logits, None)


class Routed(nn.Module):
    """The experts in a list, or in one inside a module called experts that is never called itself."""

    def __init__(self, width: int, gate: Gate, experts: int, *, nested: bool) -> None:
        super().__init__()
        self.gate, listed = gate, nn.ModuleList(NanoMLP(width) for _ in range(experts))
        self.experts: Any = nn.Module() if nested else listed
        if nested:
            self.experts.local_experts = listed

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return sum(
            gates[..., i, None] * expert(x)
            for i, expert in enumerate(getattr(self.experts, "local_experts", self.experts))
        )  # type: ignore[return-value]


def routed(gate: type[Gate], *, nested: bool = False) -> ZooModel:
    def make(width: int, depth: int, experts: int) -> nn.Module:
        def block(w: int) -> Block:
            return Block(w, FusedAttention(w), Routed(w, gate(w, experts), experts, nested=nested))

        return GPT(width, depth, block)

    return ZooModel(make, loss=shifted_loss)


ROUTERS = {
    "deepspeed": routed(DeepSpeedGate, nested=True),
    "einsum": routed(EinsumGate),
    "left": routed(LeftGate),
    "tutel": routed(TutelGate, nested=True),
    "max": routed(MaxGate),
    "experts choose": routed(ExpertsChoose),
}
