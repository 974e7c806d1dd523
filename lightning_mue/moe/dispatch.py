"""From "which experts does each token want" to "which rows does each expert get": sorting, and nothing else.

Shape legend: T tokens, K experts per token (top-k), S = T * K assignments, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchPlan:
    """The order in which assignments are laid out so that every expert's rows are contiguous.

    Assignment ``s = t * K + k`` is the k-th choice of token t.

    Attributes:
        order: int64 [S]. Row r of the sorted layout is assignment ``order[r]``, of token ``order[r] // K``. Within an
            expert, rows keep the order of the tokens.
        inverse: int64 [T, K]. Assignment (t, k) lies in row ``inverse[t, k]``.
        offsets: int64 [E + 1]. Expert e owns rows ``offsets[e]`` to ``offsets[e + 1]``.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor


def plan_dispatch(expert_ids_TK: Tensor, counts_E: Tensor) -> DispatchPlan:
    """Sort the assignments by expert. Stable, so that the plan is a function of the routing alone.

    Args:
        expert_ids_TK: int64 [T, K], each in [0, E).
        counts_E: int64 [E], how many assignments each expert has (as `RoutingInfo.counts`).

    Returns:
        The plan. No shape depends on the routing, and nothing is copied to the host.
    """
    order_S = expert_ids_TK.flatten().argsort(stable=True)
    rows_S = torch.arange(order_S.numel(), device=order_S.device)
    inverse_S = torch.empty_like(order_S).scatter_(0, order_S, rows_S)
    offsets = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)])
    return DispatchPlan(order_S, inverse_S.view_as(expert_ids_TK), offsets)
