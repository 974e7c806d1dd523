"""Sorting assignments by expert without Triton.

Shape legend: S assignments, E experts.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def sort_by_expert(expert_ids: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `plan_dispatch`: order, inverse, tokens and offsets."""
    if expert_ids.device.type == "cpu":
        return _on_host(expert_ids, counts_E)
    offsets = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)]).int()
    order_S = expert_ids.flatten().argsort(stable=True)
    tokens_S = (order_S // expert_ids.shape[1]).int()
    rows_S = torch.arange(order_S.numel(), device=order_S.device, dtype=torch.int32)
    inverse_S = torch.empty_like(rows_S).scatter_(0, order_S, rows_S)
    return order_S.int(), inverse_S.view(expert_ids.shape), tokens_S, offsets


def _on_host(expert_ids: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `sort_by_expert`, 2 to 10 times faster: numpy sorts short integers stably by radix, torch compares."""
    n_experts = len(counts_E)
    dtype = np.uint8 if n_experts < 2**8 else np.uint16 if n_experts < 2**16 else np.int64
    order_S = np.argsort(expert_ids.numpy().reshape(-1).astype(dtype), kind="stable")
    order32_S = order_S.astype(np.int32)
    inverse_S = np.empty_like(order32_S)
    inverse_S[order_S] = np.arange(len(order_S), dtype=np.int32)
    offsets = np.zeros(n_experts + 1, np.int32)
    np.cumsum(counts_E.numpy(), out=offsets[1:])
    arrays = (order32_S, inverse_S.reshape(expert_ids.shape), order32_S // expert_ids.shape[1], offsets)
    return tuple(torch.from_numpy(array) for array in arrays)  # type: ignore[return-value]
