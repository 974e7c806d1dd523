"""Triton kernel of the experts' first half: gathered rows times gate and up weights, and the activation.

    z_gate = x[token] W_gate_e^T + b_gate_e,   z_up = x[token] W_up_e^T + b_up_e,   a = f(z_gate) * z_up   (or f(z_up))

Rows of x are read by index, once for both products, and never copied. Sums are float32. `a` is computed from z as it is
stored, so that the backward pass, which starts from z, recomputes the same a.

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
from lightning_mue.kernels.triton_tools.launching import load_weight, multiply_add, new_empty, numerics, rounded


@triton.jit
def finish(
    sums, bias_ptr, z_ptr, expert, r, n, h, box, HAS_BIAS: tl.constexpr, KEEP: tl.constexpr, UPCAST: tl.constexpr
):
    """Add the bias, round, store where a backward pass will want it, and return the rounded values as float32."""
    if HAS_BIAS:
        sums += tl.load(bias_ptr + expert.to(tl.int64) * h + n, mask=n < h, other=0.0).to(tl.float32)[None, :]
    z = rounded(sums, z_ptr.dtype.element_ty, UPCAST)
    if KEEP:
        tl.store(z_ptr + r.to(tl.int64)[:, None] * h + n[None, :], z, mask=box)
    return z.to(tl.float32)


@triton.jit(do_not_specialize=["col_tiles"])
def up_kernel(
    x_ptr,
    tokens_ptr,
    gate_w,
    up_w,
    gate_bias_ptr,
    up_bias_ptr,
    z_gate_ptr,
    z_up_ptr,
    a_ptr,
    tiles_ptr,
    live_ptr,
    d,
    h,
    col_tiles,
    x_row,
    gate_e,
    gate_n,
    gate_k,
    up_e,
    up_n,
    up_k,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_GATE_BIAS: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIBED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Tiles of z and a, one after the other; see the head of the file."""
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
        token = tl.load(tokens_ptr + tl.minimum(r, end - 1)).to(tl.int64)
        x_at = x_ptr + token[:, None] * x_row + i[None, :]
        kn_k, kn_n = i.to(tl.int64)[:, None], n.to(tl.int64)[None, :]
        step = tl.full((), INNER, tl.int64)
        up_at = up_w
        gate_at = gate_w
        if DESCRIBED == "":
            up_at = up_w + expert.to(tl.int64) * up_e + kn_n * up_n + kn_k * up_k
            if GATED:
                gate_at = gate_w + expert.to(tl.int64) * gate_e + kn_n * gate_n + kn_k * gate_k

        up_sums = tl.full((ROWS, COLS), 0.0, tl.float32)
        gate_sums = tl.full((ROWS, COLS), 0.0, tl.float32)
        for k in range(0, d, INNER):
            if EVEN:
                inside = None
                x = tl.load(x_at)
            else:
                inside = (i < d - k)[:, None] & (n < h)[None, :]
                x = tl.load(x_at, mask=(i < d - k)[None, :], other=0.0)
            if GATED:
                w = load_weight(gate_w, gate_at, expert, col_tile * COLS, k, inside, DESCRIBED, EVEN, COLS, INNER)
                gate_sums = multiply_add(x, w, gate_sums, PRECISION, UPCAST)
            w = load_weight(up_w, up_at, expert, col_tile * COLS, k, inside, DESCRIBED, EVEN, COLS, INNER)
            up_sums = multiply_add(x, w, up_sums, PRECISION, UPCAST)
            x_at += INNER
            if DESCRIBED == "":
                up_at += step * up_k
                if GATED:
                    gate_at += step * gate_k

        box = (r < end)[:, None] & (n < h)[None, :]
        z_up = finish(up_sums, up_bias_ptr, z_up_ptr, expert, r, n, h, box, HAS_UP_BIAS, KEEP, UPCAST)
        if GATED:
            z_gate = finish(gate_sums, gate_bias_ptr, z_gate_ptr, expert, r, n, h, box, HAS_GATE_BIAS, KEEP, UPCAST)
            a = function_and_slope(z_gate, ACTIVATION)[0] * z_up
        else:
            a = function_and_slope(z_up, ACTIVATION)[0]
        a = rounded(a, a_ptr.dtype.element_ty, UPCAST)
        tl.store(a_ptr + r.to(tl.int64)[:, None] * h + n[None, :], a, mask=box)


def launch_up(p: Problem, tiles: TileMap, keep: bool, tiling: ExpertTiling) -> tuple[Tensor, Tensor]:
    """Return a [S, h] and z [G, S, h] (without rows unless `keep`); masked rows are not written.

    `p.x`'s rows and the biases are contiguous. `tiles` has tiles of `tiling.rows` rows.
    """
    rows, (_, h, d), gated = len(p.order), p.w_up.shape, p.w_gate is not None
    a = new_empty(p.x, rows, h)
    z = new_empty(p.x, 2 if gated else 1, rows if keep else 0, h)
    gate = p.w_up if p.w_gate is None else p.w_gate
    col_tiles = -(-h // tiling.cols)
    (gate_read, up_read), how = weights_to_read((gate, p.w_up), tiling, k_last=True)
    constants: dict[str, Any] = {
        "ACTIVATION": p.activation,
        "GATED": gated,
        "HAS_GATE_BIAS": p.b_gate is not None,
        "HAS_UP_BIAS": p.b_up is not None,
        "KEEP": keep,
        "EVEN": d % tiling.inner == 0 and h % tiling.cols == 0,
        "DESCRIBED": how,
    }
    biases = (p.x if bias is None else bias for bias in (p.b_gate, p.b_up))
    tensors = (p.x, p.tokens, gate_read, up_read, *biases, z[0], z[-1], a, tiles.tiles, tiles.live)
    sizes = (d, h, col_tiles, p.x.stride(0), *gate.stride(), *p.w_up.stride())
    grid = programs(tiling, tiles.bound * col_tiles, p.x.device)
    up_kernel[grid](*tensors, *sizes, **constants, **numerics(p.x), **tiling.constants)
    return a, z
