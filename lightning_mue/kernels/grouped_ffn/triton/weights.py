"""Triton kernels of the experts' weight gradients: sums over each expert's rows.

    dW_gate_e = dz_gate_e^T x[tokens_e],    dW_up_e = dz_up_e^T x[tokens_e],    dW_down_e = dy[tokens_e]^T (gate a)_e

All are the product of a matrix of rows (dz, gate * a) with a matrix of tokens (x, dy), which is read by index in the loop and
never copied. dW_down is computed as its transpose. An expert with many rows is cut into equal chunks (`tile_map.py`), whose
sums, float32, are added in a fixed order: one expert with most of the rows does not leave the device idle, and results are
reproducible bit by bit.

Shape legend: S rows sorted by expert, T tokens, d width, h expert hidden width, E experts, G planes (gate, up; or one).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_mue.kernels.grouped_ffn.triton.tile_map import chunk_rows
from lightning_mue.kernels.grouped_ffn.triton.tilings import ExpertTiling
from lightning_mue.kernels.grouped_ffn.triton.tuning import programs
from lightning_mue.kernels.triton_tools.launching import (
    add,
    multiply_add,
    multiprocessors,
    new_empty,
    numerics,
    rounded,
)


@triton.jit
def store_sums(
    sums, out_ptr, slot_ptr, expert, m, n, out_e, out_m, out_n, m_size, n_size, summed, UPCAST: tl.constexpr
):
    """Store a tile: to the gradient if its expert is not cut, else to the chunk's slot."""
    box = (m < m_size)[:, None] & (n < n_size)[None, :]
    if summed == 1:
        at = out_ptr + expert.to(tl.int64) * out_e + m.to(tl.int64)[:, None] * out_m + n.to(tl.int64)[None, :] * out_n
        tl.store(at, rounded(sums, out_ptr.dtype.element_ty, UPCAST), mask=box)
    else:
        tl.store(slot_ptr + m.to(tl.int64)[:, None] * n_size + n[None, :], sums, mask=box)


@triton.jit(do_not_specialize=["h_tiles", "d_tiles"])
def weights_kernel(
    rows_ptr,
    token_rows_ptr,
    tokens_ptr,
    first_ptr,
    second_ptr,
    slots_ptr,
    tiles_ptr,
    live_ptr,
    h,
    d,
    h_tiles,
    d_tiles,
    plane,
    matrix,
    token_row,
    first_e,
    first_h,
    first_d,
    second_e,
    second_h,
    second_d,
    PLANES: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Tiles [h, d] of the gradients' sums over a chunk of rows, one after the other; see the head of the file."""
    total = tl.load(live_ptr) * h_tiles * d_tiles
    for tile in range(tl.program_id(0), total, tl.num_programs(0)):
        chunk = tile // (h_tiles * d_tiles)
        within = tile % (h_tiles * d_tiles)
        expert = tl.load(tiles_ptr + chunk * 4)
        start = tl.load(tiles_ptr + chunk * 4 + 1)
        end = tl.load(tiles_ptr + chunk * 4 + 2)
        summed = tl.load(tiles_ptr + chunk * 4 + 3)
        m = within % h_tiles * ROWS + tl.arange(0, ROWS)
        n = within // h_tiles * COLS + tl.arange(0, COLS)
        i = tl.arange(0, INNER)
        first_sums = tl.full((ROWS, COLS), 0.0, tl.float32)
        second_sums = tl.full((ROWS, COLS), 0.0, tl.float32)
        first_masked = start
        if EVEN:  # whole blocks without masks, which would double the instructions of the loop
            first_masked += (end - start) // INNER * INNER
            at = rows_ptr + (start + i).to(tl.int64)[:, None] * h + m[None, :]
            for done in range(start, first_masked, INNER):
                token = tl.load(tokens_ptr + done + i).to(tl.int64)
                t = tl.load(token_rows_ptr + n[None, :] + token[:, None] * token_row)
                first_sums = multiply_add(tl.trans(tl.load(at)), t, first_sums, PRECISION, UPCAST)
                if PLANES == 2:
                    second_sums = multiply_add(tl.trans(tl.load(at + plane)), t, second_sums, PRECISION, UPCAST)
                at += tl.full((), INNER, tl.int64) * h
        # Of whole blocks a single one is left: pipelined, its buffers would be added to those above.
        for done in tl.range(first_masked, end, INNER, num_stages=1 if EVEN else None):
            r = done + i
            inside = (r < end)[:, None]
            m_in, n_in = inside, inside
            if not EVEN:
                m_in, n_in = inside & (m < h)[None, :], inside & (n < d)[None, :]
            token = tl.load(tokens_ptr + r, mask=r < end, other=0).to(tl.int64)
            t = tl.load(token_rows_ptr + token[:, None] * token_row + n[None, :], mask=n_in, other=0.0)
            at = rows_ptr + r.to(tl.int64)[:, None] * h + m[None, :]
            first_sums = multiply_add(tl.trans(tl.load(at, mask=m_in, other=0.0)), t, first_sums, PRECISION, UPCAST)
            if PLANES == 2:
                second = tl.load(at + plane, mask=m_in, other=0.0)
                second_sums = multiply_add(tl.trans(second), t, second_sums, PRECISION, UPCAST)
        slot = slots_ptr + chunk.to(tl.int64) * PLANES * matrix
        store_sums(first_sums, first_ptr, slot, expert, m, n, first_e, first_h, first_d, h, d, summed, UPCAST)
        if PLANES == 2:
            slot += matrix
            store_sums(second_sums, second_ptr, slot, expert, m, n, second_e, second_h, second_d, h, d, summed, UPCAST)


@triton.jit(do_not_specialize=["blocks", "d_blocks"])
def add_chunks_kernel(
    slots_ptr, out_ptr, tiles_ptr, live_ptr, blocks, d_blocks, slot, h, d, out_e, out_h, out_d, SIDE: tl.constexpr
):
    """Add a square of an expert's chunks in order; of each cut expert, the programs of its first chunk do it."""
    chunk = tl.program_id(0) // blocks
    if chunk < tl.load(live_ptr):
        summed = tl.load(tiles_ptr + chunk * 4 + 3)
        if summed > 1:
            expert = tl.load(tiles_ptr + chunk * 4).to(tl.int64)
            block = tl.program_id(0) % blocks
            m = block // d_blocks * SIDE + tl.arange(0, SIDE)
            n = block % d_blocks * SIDE + tl.arange(0, SIDE)
            box = (m < h)[:, None] & (n < d)[None, :]
            at = slots_ptr + chunk.to(tl.int64) * slot + m[:, None] * d + n[None, :]
            sums = tl.full((SIDE, SIDE), 0.0, tl.float32)
            for _ in range(0, summed):
                sums += tl.load(at, mask=box, other=0.0)
                at += slot
            out_at = out_ptr + expert * out_e + m.to(tl.int64)[:, None] * out_h + n.to(tl.int64)[None, :] * out_d
            tl.store(out_at, sums.to(out_ptr.dtype.element_ty), mask=box)


@triton.jit
def bias_kernel(rows_ptr, out_ptr, offsets_ptr, h, col_tiles, out_e, out_h, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sum some columns of an expert's rows."""
    expert = tl.program_id(0) // col_tiles
    start, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    n = tl.program_id(0) % col_tiles * COLS + tl.arange(0, COLS)
    sums = tl.full((ROWS, COLS), 0.0, tl.float32)
    for done in range(start, end, ROWS):
        r = done + tl.arange(0, ROWS)
        inside = (r < end)[:, None] & (n < h)[None, :]
        sums += tl.load(rows_ptr + r.to(tl.int64)[:, None] * h + n[None, :], mask=inside, other=0.0).to(tl.float32)
    total = tl.reduce(sums, 0, add)
    tl.store(
        out_ptr + expert.to(tl.int64) * out_e + n.to(tl.int64) * out_h, total.to(out_ptr.dtype.element_ty), mask=n < h
    )


def chunk_size(rows: int, tiles: int, device: torch.device) -> int:
    """Return the rows above which an expert is cut, for matrices of `tiles` tiles.

    A chunk takes at most a quarter of the time that all rows take when spread evenly over the device: a chunk that starts
    last costs no more than that. The slots then hold at most 8 tiles per multiprocessor, for all widths. A chunk of
    less than 512 rows would be dominated by writing and reading its sum.
    """
    return max(_SHORTEST, rows * tiles // (4 * multiprocessors(device)))


_SHORTEST = 512
_SIDE = 64  # of the squares in which chunks are added


def launch_weights(
    planes: Tensor, token_rows: Tensor, tokens: Tensor, offsets: Tensor, outs: tuple[Tensor, ...], tiling: ExpertTiling
) -> None:
    """Write the sums over each expert's rows of ``planes[g, r]^T token_rows[tokens[r]]``, zeros for no rows.

    `planes` [G, S, h] is contiguous, and its masked rows are not read; `token_rows` [T, d] has contiguous rows; `outs` are G
    results [E, h, d] of any strides.
    """
    g, rows, h = planes.shape
    d = token_rows.shape[1]
    h_tiles, d_tiles = -(-h // tiling.rows), -(-d // tiling.cols)
    chunks = chunk_rows(offsets, rows, chunk_size(rows, h_tiles * d_tiles, planes.device))
    slots = new_empty(planes, max(chunks.slots * g * h * d, 1), dtype=torch.float32)
    constants: dict[str, Any] = {"PLANES": g, "EVEN": h % tiling.rows == 0 and d % tiling.cols == 0}
    tensors = (planes, token_rows, tokens, outs[0], outs[-1], slots, chunks.tiles, chunks.live)
    sizes = (h, d, h_tiles, d_tiles, planes.stride(0), h * d, token_rows.stride(0))
    out_strides = (*outs[0].stride(), *outs[-1].stride())
    grid = programs(tiling, chunks.bound * h_tiles * d_tiles, planes.device)
    weights_kernel[grid](*tensors, *sizes, *out_strides, **constants, **numerics(planes), **tiling.constants)
    h_blocks, d_blocks = -(-h // _SIDE), -(-d // _SIDE)
    for plane, out in enumerate(outs if chunks.slots else ()):
        blocks = (h_blocks * d_blocks, d_blocks)
        add_chunks_kernel[(chunks.slots * blocks[0],)](
            slots[plane * h * d :], out, chunks.tiles, chunks.live, *blocks, g * h * d, h, d, *out.stride(), SIDE=_SIDE
        )


def launch_bias(plane: Tensor, offsets: Tensor, out: Tensor) -> None:
    """Write the sums over each expert's rows of `plane` [S, h] (contiguous) to `out` [E, h] (any strides)."""
    experts, h = out.shape
    col_tiles = -(-h // 32)
    bias_kernel[(experts * col_tiles,)](plane, out, offsets, h, col_tiles, *out.stride(), ROWS=128, COLS=32)
