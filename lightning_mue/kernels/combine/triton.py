"""Triton kernels that sum the rows of each token, without atomics and in a fixed order.

Rows from `offsets[E]` on are masked, they belong to no expert: they count as zero and are not read.

Shape legend: T tokens, S rows sorted by expert (= assignments), K experts per token, d width.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_mue.kernels.triton_tools.launching import add, new_empty

_UNROLLED = 16  # longer sums are not unrolled


@triton.jit
def add_row(sums, rows_ptr, inverse_ptr, gates_ptr, j, live, c, d, WEIGHTED: tl.constexpr):
    """Add the row of assignment j."""
    row = tl.load(inverse_ptr + j)
    width = tl.where(row < live, d, 0)
    values = tl.load(rows_ptr + row.to(tl.int64) * d + c, mask=c < width, other=0.0).to(tl.float32)
    if WEIGHTED:
        values *= tl.where(row < live, tl.load(gates_ptr + j), 0.0)
    return sums + values


@triton.jit
def combine_kernel(
    rows_ptr,
    inverse_ptr,
    gates_ptr,
    bags_ptr,
    live_ptr,
    out_ptr,
    d,
    blocks,
    top_k,
    out_row,
    out_col,
    WEIGHTED: tl.constexpr,
    BAGS: tl.constexpr,
    UNROLLED: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Some columns of one token: ``sum over its assignments j of gates[j] * rows[inverse[j]]``."""
    t = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    live = tl.load(live_ptr)
    sums = tl.full((WIDTH,), 0.0, tl.float32)
    if UNROLLED:
        for k in tl.static_range(UNROLLED):
            sums = add_row(sums, rows_ptr, inverse_ptr, gates_ptr, t * UNROLLED + k, live, c, d, WEIGHTED)
    else:
        start, end = t * top_k, t * top_k + top_k
        if BAGS:
            start, end = tl.load(bags_ptr + t), tl.load(bags_ptr + t + 1)
        for j in range(start, end):
            sums = add_row(sums, rows_ptr, inverse_ptr, gates_ptr, j, live, c, d, WEIGHTED)
    out_at = out_ptr + t.to(tl.int64) * out_row + c.to(tl.int64) * out_col
    tl.store(out_at, sums.to(out_ptr.dtype.element_ty), mask=c < d)


@triton.jit
def spread_kernel(
    dy_ptr,
    rows_ptr,
    gates_ptr,
    order_ptr,
    tokens_ptr,
    live_ptr,
    drows_ptr,
    dgates_ptr,
    d,
    WEIGHTED: tl.constexpr,
    DGATES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The backward pass of `combine_kernel` for one row: ``drow = gate * dy[token]``, ``dgate = <row, dy[token]>``."""
    r = tl.program_id(0)
    inside = r < tl.load(live_ptr)
    width = tl.where(inside, d, 0)
    j = tl.load(order_ptr + r)
    if WEIGHTED:
        gate = tl.where(inside, tl.load(gates_ptr + j), 0.0)
    dy_at = dy_ptr + tl.load(tokens_ptr + r).to(tl.int64) * d
    here = r.to(tl.int64) * d
    products = tl.full((WIDTH,), 0.0, tl.float32)
    for done in range(0, d, WIDTH):
        c = done + tl.arange(0, WIDTH)
        dy = tl.load(dy_at + c, mask=c < width, other=0.0).to(tl.float32)
        if DGATES:
            products += dy * tl.load(rows_ptr + here + c, mask=c < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            dy *= gate
        tl.store(drows_ptr + here + c, dy.to(drows_ptr.dtype.element_ty), mask=c < d)
    if DGATES:
        tl.store(dgates_ptr + j, tl.reduce(products, 0, add))


@triton.jit(do_not_specialize=["rows", "n_parts"])
def gather_kernel(parts_ptr, inverse_ptr, live_ptr, out_ptr, rows, n_parts, WIDTH: tl.constexpr):
    """Of each assignment j, ``sum over n of parts[n, inverse[j]]``."""
    j = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    row = tl.load(inverse_ptr + j, mask=j < rows, other=0)
    inside = (j < rows) & (row < tl.load(live_ptr))
    sums = tl.full((WIDTH,), 0.0, tl.float32)
    at = parts_ptr + row
    for _ in range(0, n_parts):
        sums += tl.load(at, mask=inside, other=0.0)
        at += rows
    tl.store(out_ptr + j, sums, mask=j < rows)


def launch_combine(
    rows: Tensor, inverse: Tensor, offsets: Tensor, bags: Tensor | None, gates: Tensor | None, out: Tensor
) -> None:
    """Write the sums over each token's rows, weighted by the gates where given, to `out` [T, d].

    All but `out` are contiguous; `inverse` and `gates` are [T, K], or [S] with `bags`; `gates` is float32.
    """
    tokens, d = out.shape
    if not out.numel():
        return
    top_k = inverse.shape[1] if bags is None else 0
    width = min(triton.next_power_of_2(d), 2048)
    blocks = -(-d // width)
    tensors = (rows, inverse, rows if gates is None else gates, inverse if bags is None else bags, offsets[-1:], out)
    constants = {"WEIGHTED": gates is not None, "BAGS": bags is not None, "WIDTH": width}
    constants |= {"UNROLLED": top_k if top_k <= _UNROLLED else 0, "num_warps": max(1, min(8, width // 256))}
    combine_kernel[(tokens * blocks,)](*tensors, d, blocks, top_k, *out.stride(), **constants)


def launch_spread(
    dy: Tensor, rows: Tensor | None, gates: Tensor | None, order: Tensor, tokens: Tensor, offsets: Tensor
) -> list[Tensor]:
    """Return the gradients of the rows [S, d] and, where `rows` is given, of the gates; all contiguous."""
    drows = new_empty(dy, len(order), dy.shape[1])
    grads = [drows] if rows is None or gates is None else [drows, new_empty(gates, *gates.shape)]
    if not drows.numel():
        return grads
    width = min(triton.next_power_of_2(dy.shape[1]), 1024)
    tensors = (dy, dy if rows is None else rows, dy if gates is None else gates, order, tokens, offsets[-1:], drows)
    constants = {"WEIGHTED": gates is not None, "DGATES": len(grads) == 2, "WIDTH": width}
    constants["num_warps"] = max(1, min(4, width // 256))
    spread_kernel[(len(order),)](*tensors, grads[-1], dy.shape[1], **constants)
    return grads


def launch_gather(parts: Tensor, inverse: Tensor, offsets: Tensor) -> Tensor:
    """Return, of `inverse`'s shape, the sums over n of ``parts[n, inverse]`` (float32 [n, S]); zero for masked rows."""
    out = new_empty(parts, *inverse.shape, dtype=torch.float32)
    rows = parts.shape[1]
    gather_kernel[(-(-rows // 256),)](parts, inverse, offsets[-1:], out, rows, len(parts), WIDTH=256, num_warps=4)
    return out
