"""Triton kernel of the backward pass at the hidden layer: from dy to the gradients of z and of the gates.

    dA = dy[token] W_down_e,    dgate = <a, dA>,    dz_up = gate dA f(z_gate),    dz_gate = gate dA z_up f'(z_gate)
    (not gated:                                     dz = gate dA f'(z))

Rows of dy are read by index. a is computed again from z. dgate = <dy, y_row> in another order of summation, which needs no
y_row (SonicMoE, arXiv:2512.14080). A tile sees only some of h: it writes its part of dgate, and `gather_kernel` in
kernels/combine/triton.py adds the parts in a fixed order. For the gradient of W_down, gate * a is written, too.

Shape legend: S rows sorted by expert, d width, h expert hidden width, E experts, G planes of z (gate, up; or up alone).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lightning_mue.kernels.grouped_ffn.op import Problem
from lightning_mue.kernels.grouped_ffn.triton.activations import function_and_slope
from lightning_mue.kernels.grouped_ffn.triton.tile_map import TileMap, place_of
from lightning_mue.kernels.grouped_ffn.triton.tilings import ExpertTiling
from lightning_mue.kernels.grouped_ffn.triton.tuning import programs, weights_to_read
from lightning_mue.kernels.triton_tools.launching import add, load_weight, multiply_add, new_empty, numerics, rounded


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of a tile; both stay in the registers where they are."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def load_z(z_ptr, plane, r, end, col, h, GATED: tl.constexpr, COLS: tl.constexpr):
    """Some columns of z_gate and z_up; of z twice if there is no gate."""
    n = col + tl.arange(0, COLS)
    box = (r < end)[:, None] & (n < h)[None, :]
    here = z_ptr + r.to(tl.int64)[:, None] * h + n[None, :]
    z = tl.load(here, mask=box, other=0.0)
    z_up = z
    if GATED:
        z_up = tl.load(here + plane, mask=box, other=0.0)
    return z, z_up


@triton.jit
def finish(
    da,
    part,
    z,
    z_up,
    gate,
    dz_ptr,
    weighted_ptr,
    plane,
    r,
    end,
    col,
    h,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    UPCAST: tl.constexpr,
    COLS: tl.constexpr,
):
    """Store dz and gate * a of some columns; return `part` with <a, dA> added."""
    n = col + tl.arange(0, COLS)
    box = (r < end)[:, None] & (n < h)[None, :]
    here = r.to(tl.int64)[:, None] * h + n[None, :]
    dtype = dz_ptr.dtype.element_ty
    f, slope = function_and_slope(z.to(tl.float32), ACTIVATION)
    if GATED:
        tl.store(dz_ptr + plane + here, rounded(gate * da * f, dtype, UPCAST), mask=box)
        f *= z_up.to(tl.float32)
        slope *= z_up.to(tl.float32)
    tl.store(dz_ptr + here, rounded(gate * da * slope, dtype, UPCAST), mask=box)
    a = rounded(f, dtype, UPCAST).to(tl.float32)  # as the forward pass had it
    if WEIGHTS:
        tl.store(weighted_ptr + here, rounded(gate * a, dtype, UPCAST), mask=box)
    return part + tl.reduce(a * da, 1, add)


@triton.jit(do_not_specialize=["rows", "col_tiles"])
def hidden_kernel(
    dy_ptr,
    tokens_ptr,
    order_ptr,
    gates_ptr,
    down_w,
    z_ptr,
    dz_ptr,
    weighted_ptr,
    parts_ptr,
    tiles_ptr,
    live_ptr,
    rows,
    d,
    h,
    col_tiles,
    plane,
    down_e,
    down_k,
    down_n,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Tiles of dz, one after the other; see the head of the file."""
    live = tl.load(live_ptr)
    for tile in range(tl.program_id(0), live * col_tiles, tl.num_programs(0)):
        row_tile, col_tile = place_of(tile, live, col_tiles, GROUP)
        expert = tl.load(tiles_ptr + row_tile * 4)
        first = tl.load(tiles_ptr + row_tile * 4 + 1)
        end = tl.load(tiles_ptr + row_tile * 4 + 2)
        r = first + tl.arange(0, ROWS)
        n = col_tile * COLS + tl.arange(0, COLS)
        i = tl.arange(0, INNER)
        # Past the expert's end its last row is read again: no mask in the loop. Those results are not stored.
        r_inside = tl.minimum(r, end - 1)
        dy_at = dy_ptr + tl.load(tokens_ptr + r_inside).to(tl.int64)[:, None] * d + i[None, :]
        step = tl.full((), INNER, tl.int64)
        down_at = down_w
        if DESCRIBED == "":
            down_at = down_w + expert.to(tl.int64) * down_e + n.to(tl.int64)[None, :] * down_n
            down_at += i.to(tl.int64)[:, None] * down_k

        # Before the loop, which hides how long these loads take, two of them one after the other.
        gate = tl.load(gates_ptr + tl.load(order_ptr + r_inside))[:, None]
        # The first quarter of z, too; all four would take registers that the loop needs.
        quarter: tl.constexpr = COLS // 4
        col = col_tile * COLS
        z_0, up_0 = load_z(z_ptr, plane, r, end, col, h, GATED, quarter)
        da = tl.full((ROWS, COLS), 0.0, tl.float32)
        for k in range(0, d, INNER):
            if EVEN:
                inside = None
                dy = tl.load(dy_at)
            else:
                inside = (i < d - k)[:, None] & (n < h)[None, :]
                dy = tl.load(dy_at, mask=(i < d - k)[None, :], other=0.0)
            w = load_weight(down_w, down_at, expert, col_tile * COLS, k, inside, DESCRIBED, EVEN, COLS, INNER)
            da = multiply_add(dy, w, da, PRECISION, UPCAST)
            dy_at += INNER
            if DESCRIBED == "":
                down_at += step * down_k

        # Quarter by quarter: with a tile at once, the activation's values would not fit registers. While one is computed,
        # z of the next is on its way.
        part = tl.full((ROWS,), 0.0, tl.float32)
        low, high = halves(da, ROWS, COLS)
        da_0, da_1 = halves(low, ROWS, 2 * quarter)
        da_2, da_3 = halves(high, ROWS, 2 * quarter)
        z_1, up_1 = load_z(z_ptr, plane, r, end, col + 1 * quarter, h, GATED, quarter)
        part = finish(
            da_0,
            part,
            z_0,
            up_0,
            gate,
            dz_ptr,
            weighted_ptr,
            plane,
            r,
            end,
            col,
            h,
            ACTIVATION,
            GATED,
            WEIGHTS,
            UPCAST,
            quarter,
        )
        z_2, up_2 = load_z(z_ptr, plane, r, end, col + 2 * quarter, h, GATED, quarter)
        part = finish(
            da_1,
            part,
            z_1,
            up_1,
            gate,
            dz_ptr,
            weighted_ptr,
            plane,
            r,
            end,
            col + 1 * quarter,
            h,
            ACTIVATION,
            GATED,
            WEIGHTS,
            UPCAST,
            quarter,
        )
        z_3, up_3 = load_z(z_ptr, plane, r, end, col + 3 * quarter, h, GATED, quarter)
        part = finish(
            da_2,
            part,
            z_2,
            up_2,
            gate,
            dz_ptr,
            weighted_ptr,
            plane,
            r,
            end,
            col + 2 * quarter,
            h,
            ACTIVATION,
            GATED,
            WEIGHTS,
            UPCAST,
            quarter,
        )
        part = finish(
            da_3,
            part,
            z_3,
            up_3,
            gate,
            dz_ptr,
            weighted_ptr,
            plane,
            r,
            end,
            col + 3 * quarter,
            h,
            ACTIVATION,
            GATED,
            WEIGHTS,
            UPCAST,
            quarter,
        )
        tl.store(parts_ptr + col_tile.to(tl.int64) * rows + r, part, mask=r < end)


def launch_hidden(
    p: Problem, dy: Tensor, z: Tensor, tiles: TileMap, weights: bool, tiling: ExpertTiling
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dz [G, S, h], gate * a [S, h] (without rows unless `weights`) and parts of dgate [tiles of h, S], float32.

    Masked rows are not written. `dy`, `z` and `p.gates` are contiguous.
    """
    planes, rows, h = z.shape
    d, col_tiles = dy.shape[1], -(-h // tiling.cols)
    dz = new_empty(z, planes, rows, h)
    weighted = new_empty(z, rows if weights else 0, h)
    parts = new_empty(p.gates, col_tiles, rows)
    read, how = weights_to_read((p.w_down,), tiling, k_last=False)
    constants: dict[str, Any] = {
        "ACTIVATION": p.activation,
        "GATED": p.w_gate is not None,
        "WEIGHTS": weights,
        "EVEN": d % tiling.inner == 0 and h % tiling.cols == 0,
        "DESCRIBED": how,
    }
    tensors = (dy, p.tokens, p.order, p.gates, read[0], z, dz, weighted, parts, tiles.tiles, tiles.live)
    sizes = (rows, d, h, col_tiles, rows * h, *p.w_down.stride())
    grid = programs(tiling, tiles.bound * col_tiles, z.device)
    hidden_kernel[grid](*tensors, *sizes, **constants, **numerics(z), **tiling.constants)
    return dz, weighted, parts
