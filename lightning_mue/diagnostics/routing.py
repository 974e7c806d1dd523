"""Routing diagnostics: balance of the load and entropy of the routing decisions (docs/theory.md section 6).

Shape legend: T tokens, E experts. A load or count vector [E] may carry leading dimensions [..., E]; each row is then
measured by itself. All functions raise a ValueError where there are no experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mue.checks import value_error


def max_violation(load: Tensor) -> Tensor:
    """MaxVio: ``(max load - mean load) / mean load`` over the experts.

    Zero for a uniform load, E - 1 when one expert takes everything (Wang et al., arXiv:2408.15664). The load must be
    that of the whole batch: summed over ranks BEFORE this is computed, because the violation of a sum is not the mean
    of the violations.

    Args:
        load: [..., E] tokens (or fractions of tokens) on each expert.

    Returns:
        Float32 [...]. NaN when the total load is zero.
    """
    load = _per_expert(load, "load")
    mean = load.mean(dim=-1)
    return (load.amax(dim=-1) - mean) / mean


def load_max_fraction(counts: Tensor) -> Tensor:
    """Share of all assignments that the busiest expert takes: 1/E when balanced, 1 when collapsed (with top-1).

    Takes the assignments on each expert, [..., E]; gives float32 [...], NaN when nothing is assigned.
    """
    counts = _per_expert(counts, "counts")
    return counts.amax(dim=-1) / counts.sum(dim=-1)


def load_entropy(counts: Tensor) -> Tensor:
    """Entropy of the mean load ``counts / sum(counts)``, in nats: ln(E) when balanced, 0 when one expert takes all.

    Takes the assignments on each expert, [..., E]; gives float32 [...], NaN when nothing is assigned.
    """
    counts = _per_expert(counts, "counts")
    return torch.special.entr(counts / counts.sum(dim=-1, keepdim=True)).sum(dim=-1)


def dead_experts(counts: Tensor) -> Tensor:
    """How many experts received nothing: int64 [...] from assignments [..., E]; E when the batch is empty."""
    return (_per_expert(counts, "counts") == 0).sum(dim=-1)


def router_entropy(logits: Tensor) -> Tensor:
    """Mean over tokens of the entropy of softmax(logits) over the experts, in nats.

    Near ln(E) all experts are equally likely for every token; near 0 the choice is certain. In a healthy router this one is
    low (certain for each token) and `load_entropy` is high (balanced over tokens). A sigmoid router is measured through the
    same softmax, so that curves of different routers compare.

    Args:
        logits: [..., E] router logits, before any balance bias.

    Returns:
        Float32 scalar. NaN when there are no tokens.
    """
    logits = _per_expert(logits, "logits")
    return torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1).mean()


def _per_expert(x: Tensor, name: str) -> Tensor:
    if x.ndim == 0 or x.shape[-1] == 0:
        raise value_error(
            name,
            found=f"shape {list(x.shape)}",
            expected="at least one expert in the last dimension",
            do="Pass one number for each expert, zeros included.",
        )
    return x.float()
