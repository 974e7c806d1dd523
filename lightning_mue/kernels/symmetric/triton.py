"""Triton kernel of a product that is known to be symmetric: the lower triangle is computed and stored twice.

    out_rc = out_cr = beta * c_rc + alpha * sum_k a_rk b_kc,    r >= c

The output is cut into squares of `tile` rows, and each square into `tile / cols` tiles side by side. Only squares on and
below the diagonal are computed. An element is stored by the one tile that holds its lower half, at (r, c) and at (c, r):
the result is symmetric bit by bit, also inside the squares on the diagonal.

Shape legend: B matrices, n rows and columns of the result, k the inner dimension.

Only builtins of `triton.language` are used here, no library functions (`tl.zeros`, `tl.cdiv`): those are themselves
kernels, made when Triton is imported, and would tie the interpreter to a setting at that moment.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_mue.kernels.triton_tools.launching import is_wide, shared_memory
from lightning_mue.kernels.triton_tools.timing import NO_ROOM, launch_fitting, may_time, milliseconds


class SymmetricTiling(NamedTuple):
    """How the kernel cuts the work.

    Attributes:
        tile: Rows of a tile, and side of a square.
        cols: Columns of a tile, a divisor of `tile`.
        inner: How much of k is loaded at once.
        stages: Loads in flight.
        warps: Warps a tile.
    """

    tile: int
    cols: int
    inner: int
    stages: int
    warps: int


#: Tried at the first call of a size, of those that fit; the first is the default. What a compiler makes of them is in docs/gpu.md:
#: no device was at hand. For the same reason there is no variant with the bulk copy engine (TMA).
HALF = (
    SymmetricTiling(128, 128, 64, 3, 8),
    SymmetricTiling(128, 128, 64, 4, 8),
    SymmetricTiling(256, 128, 64, 3, 8),  # on wide devices only (`is_wide`): elsewhere its sums leave no registers
    SymmetricTiling(128, 64, 64, 4, 4),
    SymmetricTiling(64, 64, 64, 4, 4),
)
TF32 = (SymmetricTiling(128, 128, 32, 3, 8), SymmetricTiling(128, 64, 32, 4, 4), SymmetricTiling(64, 64, 32, 4, 4))
IEEE = (SymmetricTiling(64, 64, 16, 3, 4), SymmetricTiling(128, 64, 16, 3, 8))

_GROUP = 8  # rows of squares that are walked together, so that their operands stay in L2


class Case(NamedTuple):
    """What a launch depends on, but for addresses and factors."""

    shape: torch.Size
    strides: tuple[tuple[int, ...], ...]
    has_c: bool
    dtype: torch.dtype
    device: torch.device
    precision: str


@triton.jit
def row_of(p):
    """Row of element p of a lower triangle that is numbered row by row: the largest r with r (r + 1) / 2 <= p."""
    row = ((tl.sqrt(8.0 * p.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded, on a device also approximate: off by one at most for any p < 2^30.
    row -= (row * (row + 1) // 2 > p).to(tl.int32)
    row += ((row + 1) * (row + 2) // 2 <= p).to(tl.int32)
    return row


@triton.jit
def square_of(p, side, GROUP: tl.constexpr):
    """Row and column of square p of a lower triangle of `side` squares a side: GROUP rows at a time, column by column."""
    first = row_of(p) // GROUP * GROUP
    height = tl.minimum(side - first, GROUP)
    p -= first * (first + 1) // 2
    # Columns 0..first of the group are full; what is right of them is a triangle again.
    full = height * (first + 1)
    q = tl.maximum(p - full, 0)
    u = row_of(q)
    row = first + tl.where(p < full, p % height, 1 + u)
    col = tl.where(p < full, p // height, first + 1 + q - u * (u + 1) // 2)
    return row, col


@triton.jit
def store_twice(
    sums, c_ptr, out_ptr, r, c, c_row, c_col, out_row, out_col, beta, box, stored, mirrored, HAS_C: tl.constexpr
):
    """Add `beta * c`, round, and store the tile at (r, c) where `stored` and at (c, r) where `mirrored`."""
    if HAS_C:
        c_at = c_ptr + r[:, None] * c_row + c[None, :] * c_col
        sums += beta * tl.load(c_at, mask=box, other=0.0).to(tl.float32)
    result = sums.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + r[:, None] * out_row + c[None, :] * out_col, result, mask=stored)
    tl.store(out_ptr + c[:, None] * out_row + r[None, :] * out_col, tl.trans(result), mask=tl.trans(mirrored))


@triton.jit(do_not_specialize=["side", "per_matrix"])
def symmetric_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    n,
    k,
    side,
    per_matrix,
    a_batch,
    a_row,
    a_col,
    b_batch,
    b_row,
    b_col,
    c_batch,
    c_row,
    c_col,
    out_batch,
    out_row,
    out_col,
    alpha,
    beta,
    HAS_C: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of one matrix; see the head of the file."""
    pid = tl.program_id(0)
    batch = (pid // per_matrix).to(tl.int64)
    p = pid % per_matrix
    row, col = square_of(p // (TILE // COLS), side, GROUP)
    start = col * TILE + p % (TILE // COLS) * COLS
    if start >= n:  # the last square may be less than one tile wide
        return
    r = row * TILE + tl.arange(0, TILE)
    c = start + tl.arange(0, COLS)
    i = tl.arange(0, INNER)
    if WIDE:
        r, c = r.to(tl.int64), c.to(tl.int64)
    r_in, c_in = (r < n)[:, None], (c < n)[None, :]

    a_at = a_ptr + batch * a_batch + r[:, None] * a_row + i[None, :] * a_col
    b_at = b_ptr + batch * b_batch + i[:, None] * b_row + c[None, :] * b_col
    sums = tl.full((TILE, COLS), 0.0, tl.float32)
    for done in range(0, k, INNER):
        if EVEN:
            a = tl.load(a_at, mask=r_in, other=0.0)
            b = tl.load(b_at, mask=c_in, other=0.0)
        else:
            a = tl.load(a_at, mask=r_in & (i < k - done)[None, :], other=0.0)
            b = tl.load(b_at, mask=c_in & (i < k - done)[:, None], other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        sums = tl.dot(a, b, sums, input_precision=PRECISION)
        a_at += INNER * a_col
        b_at += INNER * b_row

    sums *= alpha
    c_ptr += batch * c_batch
    out_ptr += batch * out_batch
    box = r_in & c_in
    # Two copies of the same code: a mask that differs from element to element breaks wide stores up, and only the squares
    # on the diagonal need one.
    if row == col:
        lower, strictly = r[:, None] >= c[None, :], r[:, None] > c[None, :]
        store_twice(
            sums, c_ptr, out_ptr, r, c, c_row, c_col, out_row, out_col, beta, box, box & lower, box & strictly, HAS_C
        )
    else:
        store_twice(sums, c_ptr, out_ptr, r, c, c_row, c_col, out_row, out_col, beta, box, box, box, HAS_C)


#: Whether Triton's interpreter runs the kernel (TRITON_INTERPRET=1 when this module was imported). It holds bfloat16 as
#: integers and multiplies those, so that operands go to it as float32.
INTERPRETED = not isinstance(symmetric_kernel, triton.JITFunction)


def launch(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    alpha: float,
    beta: float,
    out: Tensor,
    precision: str = "tf32",
    tiling: SymmetricTiling | None = None,
) -> None:
    """Write `beta * c + alpha * a @ b` to `out`, all of it; arguments are not checked.

    Shapes and strides as in `symmetric_matmul`; of `c` only the lower half is read. `precision` of float32 products is "tf32"
    or "ieee". Without `tiling`, the fastest of a few is taken, timed at the first call of a size, or without timing the first
    of them (in the interpreter, while a CUDA graph is captured, with LIGHTNING_MUE_AUTOTUNE=0).
    """
    if not out.numel():
        return
    has_c = c is not None and beta != 0
    tensors = (a, b, c if c is not None and has_c else out, out)
    case = Case(a.shape, tuple(t.stride() for t in tensors), has_c, a.dtype, a.device, precision)

    def run(tiling: SymmetricTiling) -> None:
        grid, integers, constants = _geometry(case, tiling)
        symmetric_kernel[grid](*tensors, *integers, float(alpha), float(beta), **constants)

    chosen = tiling or _known.get(case) or _choose(case, run)
    try:
        run(chosen)
    except NO_ROOM:  # against the estimate
        if tiling is not None:
            raise
        others = (t for t in tilings_for(a.dtype, precision, a.device) if t != chosen)
        smaller = sorted(others, key=lambda t: t.tile * t.cols * t.stages, reverse=True)
        _known[case], _ = launch_fitting(run, [*smaller, IEEE[0]])


_chosen: dict[tuple[Any, ...], SymmetricTiling] = {}  # the fastest, by kind of case
_known: dict[Case, SymmetricTiling] = {}  # the same, by case: the kind takes longer to find out than a launch should


@functools.lru_cache(maxsize=4096)
def _geometry(case: Case, tiling: SymmetricTiling) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    """The grid, and the kernel's integers and constants."""
    batch, n, k = case.shape
    side = -(-n // tiling.tile)
    per_matrix = side * (side + 1) // 2 * (tiling.tile // tiling.cols)
    sizes = ((n, k), (k, n), (n, n), (n, n))
    furthest = max((rows - 1) * s[1] + (cols - 1) * s[2] for (rows, cols), s in zip(sizes, case.strides, strict=True))
    constants = {
        "HAS_C": case.has_c,
        "WIDE": furthest >= 2**31,
        "EVEN": k % tiling.inner == 0,
        "UPCAST": INTERPRETED and case.dtype == torch.bfloat16,
        "PRECISION": case.precision,
        "TILE": tiling.tile,
        "COLS": tiling.cols,
        "INNER": tiling.inner,
        "GROUP": _GROUP,
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
    }
    return (batch * per_matrix,), (n, k, side, per_matrix, *(x for s in case.strides for x in s)), constants


def tilings_for(dtype: torch.dtype, precision: str, device: torch.device) -> tuple[SymmetricTiling, ...]:
    """Return what is tried for a type of product, all of which fits the device; the first is taken where nothing can be timed."""
    shared = shared_memory(device)
    wide = is_wide(shared)
    tilings = HALF if dtype != torch.float32 else TF32 if precision == "tf32" else IEEE
    return tuple(t for t in tilings if shared_bytes(t, dtype, wide) <= shared and (wide or t.tile < 256)) or IEEE[:1]


def shared_bytes(tiling: SymmetricTiling, dtype: torch.dtype, wide: bool) -> int:
    """Return at least the shared memory that the kernel takes: operands of each stage; a stage less unless `wide`."""
    stage = tiling.inner * (tiling.tile + tiling.cols) * dtype.itemsize
    return (tiling.stages if wide else tiling.stages - 1) * stage + 2048


def _choose(case: Case, run: Callable[[SymmetricTiling], None]) -> SymmetricTiling:
    """Return the fastest tiling for cases of this kind, timed now if it is not known and can be."""
    (batch, n, k), tilings = case.shape, tilings_for(case.dtype, case.precision, case.device)
    # Neighbouring sizes behave alike, and the last chunk of a stack is often smaller than the others. What decides
    # between wide and narrow loads belongs in the key: which dimension is contiguous, and whether rows are aligned.
    kind = (
        (-(-n // 128), -(-k // 128), min(batch, 64).bit_length()),
        tuple((s[2] == 1, max(s[1:]) % 16 == 0) for s in case.strides),
        case[2:],
    )
    if kind not in _chosen:
        if not may_time(case.device):
            return tilings[0]
        _chosen[kind] = min(tilings, key=lambda tiling: milliseconds(run, tiling))
    return _known.setdefault(case, _chosen[kind])
