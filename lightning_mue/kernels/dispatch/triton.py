"""Triton kernels that sort assignments by expert: a counting sort, stable and without atomics, in two launches.

First every block of assignments writes how many of them go to each expert. Then every block sums the counts of the blocks before
it, which gives its first row of each expert, and places its assignments tile by tile.

Shape legend: S assignments, K experts per token, E experts, B blocks; EP is E rounded up to a power of two.

No library functions of `triton.language`, see kernels/symmetric/triton.py.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_mue.kernels.triton_tools.launching import new_empty


@triton.jit
def _sum(x, axis: tl.constexpr):
    return tl.reduce(x, axis, tl.standard._sum_combine)


@triton.jit(do_not_specialize=["total"])
def histogram_kernel(
    ids_ptr, histograms_ptr, total, E: tl.constexpr, EP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """How many of a block's assignments go to each expert: int32 [B, E]."""
    e = tl.arange(0, EP)
    counts = tl.full((ROWS, EP), 0, tl.int32)
    for done in range(0, tl.minimum(total - tl.program_id(0) * BLOCK, BLOCK), ROWS):
        s = tl.program_id(0).to(tl.int64) * BLOCK + done + tl.arange(0, ROWS)
        expert = tl.load(ids_ptr + s, mask=s < total, other=E)
        counts += (expert[:, None] == e[None, :]).to(tl.int32)
    tl.store(histograms_ptr + tl.program_id(0) * E + e, _sum(counts, 0), mask=e < E)


@triton.jit(do_not_specialize=["total"])
def place_kernel(
    ids_ptr,
    counts_ptr,
    histograms_ptr,
    order_ptr,
    inverse_ptr,
    tokens_ptr,
    offsets_ptr,
    total,
    K: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The rows of a block's assignments; the first block also writes the offsets. Assignments of masked tokens come last."""
    block = tl.program_id(0)
    e = tl.arange(0, EP)
    counts = tl.load(counts_ptr + e, mask=e < E, other=0).to(tl.int32)
    ends = tl.associative_scan(counts, 0, tl.standard._sum_combine)
    if block == 0:
        tl.store(offsets_ptr + 1 + e, ends, mask=e < E)
        tl.store(offsets_ptr, 0)
    r = tl.arange(0, ROWS)
    before = tl.full((ROWS, EP), 0, tl.int32)
    for done in range(0, block, ROWS):
        tile = (done + r < block)[:, None] & (e < E)[None, :]
        before += tl.load(histograms_ptr + (done + r)[:, None] * E + e[None, :], mask=tile, other=0)
    earlier = _sum(before, 0)
    next_row = ends - counts + earlier
    none = _sum(counts, 0) + block * BLOCK - _sum(earlier, 0)  # the next row of masked tokens
    for done in range(0, tl.minimum(total - block * BLOCK, BLOCK), ROWS):
        s = block * BLOCK + done + r
        inside = s < total
        expert = tl.load(ids_ptr + s.to(tl.int64), mask=inside, other=E).to(tl.int32)
        hot = (expert[:, None] == e[None, :]) & (e < E)[None, :]
        outside = expert >= E
        start = _sum(tl.where(hot, next_row[None, :], 0), 1) + tl.where(outside, none, 0)
        same = (expert[:, None] == expert[None, :]) & (r[None, :] < r[:, None])
        row = start + _sum(same.to(tl.int32), 1)
        tl.store(inverse_ptr + s, row, mask=inside)
        tl.store(order_ptr + row, s, mask=inside)
        tl.store(tokens_ptr + row, s // K, mask=inside)
        next_row += _sum(hot.to(tl.int32), 0)
        none += _sum(outside.to(tl.int32), 0)


#: Assignments a program. To read the histograms before its own, a block loads some S / BLOCK * E integers from L2: 64 KiB at
#: S = 262144, E = 128. Smaller blocks would spread the walk over more programs, but that cost is quadratic in their number.
BLOCK = 1024


def sort_by_expert(expert_ids: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `plan_dispatch`: order, inverse, tokens and offsets."""
    total, n_experts = expert_ids.numel(), len(counts_E)
    order, inverse, tokens = (new_empty(expert_ids, total, dtype=torch.int32) for _ in range(3))
    offsets = new_empty(expert_ids, n_experts + 1, dtype=torch.int32)
    padded = triton.next_power_of_2(n_experts)
    blocks = max(1, -(-total // BLOCK))
    histograms = new_empty(expert_ids, blocks, n_experts, dtype=torch.int32)
    rows = max(1, min(64, 4096 // padded))
    constants = {"E": n_experts, "EP": padded, "BLOCK": BLOCK, "ROWS": rows, "num_warps": 4}
    ids = expert_ids.contiguous()
    with torch.cuda.device_of(ids):  # Triton launches on the current device
        histogram_kernel[(blocks,)](ids, histograms, total, **constants)
        tensors = (ids, counts_E.contiguous(), histograms, order, inverse, tokens, offsets)
        place_kernel[(blocks,)](*tensors, total, K=expert_ids.shape[1], **constants)
    return order, inverse.view(expert_ids.shape), tokens, offsets
