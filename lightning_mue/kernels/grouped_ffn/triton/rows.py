"""Triton kernel of products from rows to rows: the experts' outputs, and the gradients of their inputs.

    out[r] = sum over planes g of  in_g[r] W_g,e        e = expert of row r

Forward it is called with one plane, a and W_down^T; backward with the planes of dz and W_gate, W_up, all in one sum.

Shape legend: S rows sorted by expert, G planes, k inner width, n width of the result, E experts.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lightning_mue.kernels.grouped_ffn.triton.tile_map import TileMap, place_of
from lightning_mue.kernels.grouped_ffn.triton.tilings import ExpertTiling
from lightning_mue.kernels.grouped_ffn.triton.tuning import programs, weights_to_read
from lightning_mue.kernels.triton_tools.launching import (
    describe,
    load_weight,
    multiply_add,
    new_empty,
    numerics,
    rounded,
)


@triton.jit
def load_rows(
    source,
    at,
    plane,
    row,
    k,
    inside,
    DESCRIBED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    INNER: tl.constexpr,
):
    """The tile [rows, inner] of a plane, by pointers `at` or from a descriptor."""
    if DESCRIBED:
        tile = tl.reshape(source.load([plane, row, k]), (ROWS, INNER))
    elif EVEN:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=inside, other=0.0)
    return tile


@triton.jit
def add_products(
    sums,
    source,
    at,
    plane,
    row,
    w,
    w_at,
    w_k,
    expert,
    col,
    k_size,
    n_size,
    EVEN: tl.constexpr,
    IN_DESCRIBED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """`sums` plus the products of one plane.

    A loop for each plane: with two products into one sum in a loop, the second would wait for the first, and no matrix
    instruction would be in flight while the next one is issued.
    """
    i = tl.arange(0, INNER)
    n_in = (col + tl.arange(0, COLS) < n_size)[None, :]
    step = tl.full((), INNER, tl.int64)
    for k in range(0, k_size, INNER):
        k_in = None
        inside = None
        if not EVEN:
            k_in = (i < k_size - k)[None, :]
            inside = (i < k_size - k)[:, None] & n_in
        a = load_rows(source, at, plane, row, k, k_in, IN_DESCRIBED, EVEN, ROWS, INNER)
        b = load_weight(w, w_at, expert, col, k, inside, DESCRIBED, EVEN, COLS, INNER)
        sums = multiply_add(a, b, sums, PRECISION, UPCAST)
        if not IN_DESCRIBED:
            at += INNER
        if DESCRIBED == "":
            w_at += step * w_k
    return sums


@triton.jit(do_not_specialize=["col_tiles"])
def rows_kernel(
    in_ptr,
    first_w,
    second_w,
    out_ptr,
    tiles_ptr,
    live_ptr,
    k_size,
    n_size,
    col_tiles,
    in_plane,
    first_e,
    first_n,
    first_k,
    second_e,
    second_n,
    second_k,
    PLANES: tl.constexpr,
    EVEN: tl.constexpr,
    IN_DESCRIBED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Tiles of the result, one after the other; see the head of the file."""
    live = tl.load(live_ptr)
    for tile in range(tl.program_id(0), live * col_tiles, tl.num_programs(0)):
        row_tile, col_tile = place_of(tile, live, col_tiles, GROUP)
        expert = tl.load(tiles_ptr + row_tile * 4)
        first = tl.load(tiles_ptr + row_tile * 4 + 1)
        end = tl.load(tiles_ptr + row_tile * 4 + 2)
        r = first + tl.arange(0, ROWS)
        n = col_tile * COLS + tl.arange(0, COLS)
        i = tl.arange(0, INNER)
        col = col_tile * COLS
        in_at = in_ptr
        second_in_at = in_ptr
        if not IN_DESCRIBED:
            # Past the expert's end its last row is read again: no mask in the loop. Those results are not stored.
            in_at = in_ptr + tl.minimum(r, end - 1).to(tl.int64)[:, None] * k_size + i[None, :]
            second_in_at = in_at + in_plane
        first_at = first_w
        second_at = second_w
        if DESCRIBED == "":
            kn_k, kn_n = i.to(tl.int64)[:, None], n.to(tl.int64)[None, :]
            first_at = first_w + expert.to(tl.int64) * first_e + kn_n * first_n + kn_k * first_k
            if PLANES == 2:
                second_at = second_w + expert.to(tl.int64) * second_e + kn_n * second_n + kn_k * second_k

        sums = tl.full((ROWS, COLS), 0.0, tl.float32)
        sums = add_products(
            sums,
            in_ptr,
            in_at,
            0,
            first,
            first_w,
            first_at,
            first_k,
            expert,
            col,
            k_size,
            n_size,
            EVEN,
            IN_DESCRIBED,
            DESCRIBED,
            PRECISION,
            UPCAST,
            ROWS,
            COLS,
            INNER,
        )
        if PLANES == 2:
            sums = add_products(
                sums,
                in_ptr,
                second_in_at,
                1,
                first,
                second_w,
                second_at,
                second_k,
                expert,
                col,
                k_size,
                n_size,
                EVEN,
                IN_DESCRIBED,
                DESCRIBED,
                PRECISION,
                UPCAST,
                ROWS,
                COLS,
                INNER,
            )

        box = (r < end)[:, None] & (n < n_size)[None, :]
        out_at = out_ptr + r.to(tl.int64)[:, None] * n_size + n[None, :]
        tl.store(out_at, rounded(sums, out_ptr.dtype.element_ty, UPCAST), mask=box)


def launch_rows(
    planes: Tensor, weights: tuple[Tensor, ...], tiles: TileMap, tiling: ExpertTiling, *, k_last: bool
) -> Tensor:
    """Return out [S, n]; masked rows are not written.

    `planes` [G, S, k] is contiguous; `weights` are G stacks [E, n, k] if `k_last`, else [E, k, n]; `tiles` has tiles of
    `tiling.rows` rows.
    """
    in_planes, rows, k = planes.shape
    n = weights[0].shape[1 if k_last else 2]
    out = new_empty(planes, rows, n)
    col_tiles = -(-n // tiling.cols)
    read, how = weights_to_read(weights, tiling, k_last=k_last)
    in_read = describe(planes, (tiling.rows, tiling.inner)) if tiling.described else None
    strides = [(w.stride() if k_last else (w.stride(0), w.stride(2), w.stride(1))) for w in (weights[0], weights[-1])]
    constants: dict[str, Any] = {
        "PLANES": in_planes,
        "EVEN": k % tiling.inner == 0 and n % tiling.cols == 0,
        "IN_DESCRIBED": in_read is not None,
        "DESCRIBED": how,
    }
    tensors = (planes if in_read is None else in_read, read[0], read[-1], out, tiles.tiles, tiles.live)
    sizes = (k, n, col_tiles, planes.stride(0), *strides[0], *strides[1])
    grid = programs(tiling, tiles.bound * col_tiles, out.device)
    rows_kernel[grid](*tensors, *sizes, **constants, **numerics(planes), **tiling.constants)
    return out
