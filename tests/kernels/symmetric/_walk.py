"""A kernel that writes down where the symmetric product's tile map goes; loaded by conftest.py."""

from __future__ import annotations

import triton
import triton.language as tl

from lightning_mue.kernels.symmetric.triton import row_of, square_of


@triton.jit
def walk_kernel(p_ptr, side_ptr, row_ptr, col_ptr, total, GROUP: tl.constexpr, WIDTH: tl.constexpr):
    i = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    p = tl.load(p_ptr + i, mask=i < total, other=0)
    side = tl.load(side_ptr + i, mask=i < total, other=1)
    row, col = square_of(p, side, GROUP)
    tl.store(row_ptr + i, row, mask=i < total)
    tl.store(col_ptr + i, col, mask=i < total)


@triton.jit
def row_kernel(p_ptr, row_ptr, total, WIDTH: tl.constexpr):
    i = tl.arange(0, WIDTH)
    p = tl.load(p_ptr + i, mask=i < total, other=0)
    tl.store(row_ptr + i, row_of(p), mask=i < total)
