"""Sorting assignments by expert without Triton.

Shape legend: S assignments, E experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sort_by_expert(expert_ids: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `plan_dispatch`: order, inverse, tokens and offsets."""
    offsets = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)]).int()
    sort = _sort_on_host if expert_ids.device.type == "cpu" else _sort
    order_S, tokens_S = sort(expert_ids, len(counts_E))
    rows_S = torch.arange(order_S.numel(), device=order_S.device, dtype=torch.int32)
    inverse_S = torch.empty_like(rows_S).scatter_(0, order_S, rows_S)
    return order_S.int(), inverse_S.view(expert_ids.shape), tokens_S, offsets


def _sort(expert_ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    order_S = expert_ids.flatten().argsort(stable=True)
    return order_S, (order_S // expert_ids.shape[1]).int()


def _sort_on_host(expert_ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """As `_sort`, 2 to 10 times faster: numpy sorts short integers stably by radix, torch compares."""
    dtype = np.uint8 if n_experts < 2**8 else np.uint16 if n_experts < 2**16 else np.int64
    order_S = np.argsort(expert_ids.numpy().reshape(-1).astype(dtype), kind="stable")
    tokens_S = order_S.astype(np.int32) // expert_ids.shape[1]
    return torch.from_numpy(order_S), torch.from_numpy(tokens_S)
