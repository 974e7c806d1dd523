"""Orthogonalization of batches of matrices by Newton-Schulz iterations.

Two forms of the same polynomials. The standard form multiplies the matrix X by a polynomial of its Gram matrix at every
step. The Gram form works on the smaller side: it iterates on the Gram matrix, multiplies the steps' polynomials there,
and multiplies X only at the end of a segment of steps. Rounding grows within a segment, so each type has its own longest
segment. The forms, their operation counts and their errors: docs/derivations/hypersphere.md.

A step `a X + (b G + c G^2) X`, `G = XX^T`, is computed as `a P X` with the square completed: with `K = -(b/a) G` and
`rho = a c / b^2`,

    P = I - K + rho K^2 = rho (K - I / (2 rho))^2 + (1 - 1 / (4 rho)) I,

so that only products and additions to diagonals are left. The factors a go into the scale of X beforehand; the other
coefficients go into the products, which apply them to float32 accumulators. (Adding matrices with coefficients, the
obvious way, costs a fifth of the time on a CPU, and torch rounds the coefficient of an addition to bfloat16 where the
operands have that type: singular values then settle 1.5% too high.)

Shape legend:
    B  matrices in a batch            n  smaller side of a matrix
    out, in  rows and columns         m  larger side of a matrix
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_mue.checks import require_choice, type_error, value_error
from lightning_mue.kernels.symmetric.op import kernel_fits, symmetric_matmul
from lightning_mue.optim.matrices import Pool, chunk_count, peak
from lightning_mue.optim.orthogonal.coefficients import PRESETS, Coefficients
from lightning_mue.optim.precision import default_dtype, math_dtype, product_precision, tf32_products

#: Steps in a segment of the Gram form: of the first segment, and of the later ones, where rounding has less to grow by.
#: With these the largest singular value stays under 1.17 and the error under 1.2 times the standard form's, which
#: `tests/optim/orthogonal/test_orthogonality_gate.py` checks for every type. They are not options: (2, 3) in bfloat16 reaches 1.25,
#: and all five steps in float32 are off by 1% on a matrix of rank one.
_SEGMENTS = {"bfloat16": (2, 2)}
_SEGMENTS_ELSEWHERE = (2, 3)


@torch.no_grad()
def orthogonalize(
    g: Tensor,
    preset: str | Coefficients = "scheduled",
    dtype: torch.dtype | str | None = None,
    *,
    compile: bool = False,
) -> Tensor:
    """Replace each matrix by (nearly) its polar factor: same singular vectors, singular values moved to about 1.

    Each matrix is scaled to a given Frobenius norm (any finite entries, from subnormal to the largest, are safe). Then the
    schedule's polynomials are applied on its smaller side, in the standard or the Gram form, whichever takes fewer
    operations. The schedule's `band` says how close the singular values come to 1, its `floor` how small they may be at
    the start. A zero matrix gives exactly zero. A matrix with a NaN or an infinity gives NaN and does not affect the
    others of its batch.

    Args:
        g: `[out, in]` or a batch `[B, out, in]`, any real floating dtype, any strides.
        preset: A name in `PRESETS`, or another schedule.
        dtype: Type of the matrix products: a `torch.dtype`, or "tf32" for float32 with tf32 products on CUDA. None
            chooses by device (see `default_dtype`).
        compile: Run the iteration through `torch.compile`, once a shape.

    Returns:
        The direction, contiguous, of `g`'s shape, in float32 (float64 if `g` is float64). It carries no gradient.

    Raises:
        ValueError: If `g` is not 2-D or 3-D, or `preset` is unknown.
        TypeError: If `g` or `dtype` is not real floating point.
    """
    if isinstance(preset, str):
        require_choice("preset", preset, PRESETS)
    schedule = PRESETS[preset] if isinstance(preset, str) else preset
    if g.ndim not in (2, 3):
        expected = "a matrix [out, in] or a batch [B, out, in]"
        raise value_error("g", found=f"shape {list(g.shape)}", expected=expected)
    if not g.is_floating_point():
        raise type_error("g", found=g.dtype, expected="a real floating-point dtype")
    compute = default_dtype(g) if dtype is None else torch.float32 if dtype == "tf32" else dtype
    if not (isinstance(compute, torch.dtype) and compute.is_floating_point):
        raise type_error("dtype", found=repr(dtype), expected='a real floating-point dtype or "tf32"')
    result = torch.empty(g.shape, dtype=math_dtype(g.dtype), device=g.device)
    if not result.numel():
        return result
    g_Boi, result_Boi = (t if t.ndim == 3 else t.unsqueeze(0) for t in (g, result))
    count, pool = chunk_count(g_Boi), Pool()
    with tf32_products(dtype == "tf32"):
        for part_Boi, out_Boi in zip(g_Boi.split(count), result_Boi.split(count), strict=True):
            o_Boi = orthogonalize_chunk(part_Boi.to(math_dtype(g.dtype)), schedule, compute, pool, compile=compile)
            out_Boi.copy_(o_Boi)
            pool.give(o_Boi)
    return result


def orthogonalize_chunk(
    u_Boi: Tensor, schedule: Coefficients, dtype: torch.dtype, pool: Pool, *, compile: bool = False
) -> Tensor:
    """Orthogonalize one batch of matrices in the math type, with products in `dtype`, which the result has, too.

    Scratch and the result come from the pool; give the result back there.
    """
    x_Boi = _normalize(u_Boi, schedule.gain, pool.take(u_Boi.shape, u_Boi, dtype))
    segments = _segments(x_Boi, schedule)
    if compile:
        return _compiled()(x_Boi, schedule, segments, Pool())  # the compiler plans its own memory
    return _iterate(x_Boi, schedule, segments, pool)


@functools.cache
def _compiled() -> Callable[[Tensor, Coefficients, tuple[int, ...], Pool], Tensor]:
    return torch.compile(_iterate, dynamic=False)


def _normalize(u_Boi: Tensor, size: float, out: Tensor) -> Tensor:
    """Write every matrix scaled to the Frobenius norm `size` to `out`; zero matrices stay zero."""
    if u_Boi.device.type == "cpu":
        # No scaling beforehand where no square can leave the range of float32. On a GPU the test would synchronize.
        norm_B11 = torch.linalg.vector_norm(u_Boi, dim=(-2, -1), keepdim=True)
        if bool(((norm_B11 > 1e-15) & (norm_B11 < 1e15)).all()):
            return torch.mul(u_Boi, size / norm_B11, out=out)
    peak_B11 = peak(u_Boi)
    scaled_Boi = u_Boi / (peak_B11 + (peak_B11 == 0))
    # The largest entry is 1 now, so the norm is 1 or more unless the matrix is zero.
    norm_B11 = torch.linalg.vector_norm(scaled_Boi, dim=(-2, -1), keepdim=True).clamp_min_(1)
    return torch.mul(scaled_Boi, size / norm_B11, out=out)


def flops(n: int, m: int, segments: tuple[int, ...], *, symmetric: bool = False) -> int:
    """Return the floating-point operations of the products for one matrix with sides n <= m.

    The table of docs/derivations/hypersphere.md, section "Orthogonalization". `segments` are the steps between two
    products with X: all ones is the standard form, without products of polynomials. With `symmetric`, products known to be
    symmetric cost half (the Triton kernel on CUDA).
    """
    inner = sum(segments) - len(segments)  # steps that do not start a segment
    half = 1 if symmetric else 2
    # K^2 of every step; the next Gram matrix, two products; the product of polynomials, computed in full.
    small = half * sum(segments) + 2 * half * inner + 2 * inner
    return len(segments) * (half + 2) * n * n * m + small * n**3


def _segments(x_Boi: Tensor, schedule: Coefficients) -> tuple[int, ...]:
    """Return the lengths of the segments of the form with fewer operations; all ones is the standard form."""
    n, m = sorted(x_Boi.shape[1:])
    steps = len(schedule.steps)
    standard = (1,) * steps
    first, others = _SEGMENTS.get(product_precision(x_Boi), _SEGMENTS_ELSEWHERE)
    gram = [min(first, steps)]
    while (left := steps - sum(gram)) > 0:
        gram.append(min(others, left))
    symmetric = kernel_fits(x_Boi)
    forms = (standard, tuple(gram))
    return min(forms, key=lambda segments: flops(n, m, segments, symmetric=symmetric))


def _iterate(x_Boi: Tensor, schedule: Coefficients, segments: tuple[int, ...], pool: Pool) -> Tensor:
    """Run the schedule on matrices of Frobenius norm at most `schedule.gain`; `x_Boi` goes to the pool.

    The iterate X is `scale * x_Boi`: the matrices were scaled by all factors a beforehand.
    """
    tall = x_Boi.shape[1] > x_Boi.shape[2]
    small = (len(x_Boi), *[min(x_Boi.shape[1:])] * 2)
    steps = iter(schedule.steps)
    scale = 1 / schedule.gain
    for length in segments:
        segment = [next(steps) for _ in range(length)]
        a, b, _ = segment[0]
        left_Bnm, right_Bmn = (x_Boi.mT, x_Boi) if tall else (x_Boi, x_Boi.mT)
        k_Bnn = symmetric_matmul(left_Bnm, right_Bmn, alpha=-b / a * scale**2, out=pool.take(small, x_Boi))
        p_Bnn = _gather(k_Bnn, segment, pool, tall)
        next_Boi = pool.take(x_Boi.shape, x_Boi)
        torch.bmm(*((x_Boi, p_Bnn) if tall else (p_Bnn, x_Boi)), out=next_Boi)
        pool.give(p_Bnn, x_Boi)
        x_Boi = next_Boi
        for a, _, _ in segment:
            scale *= a
    return x_Boi


def _gather(k_Bnn: Tensor, segment: Sequence[tuple[float, float, float]], pool: Pool, tall: bool) -> Tensor:
    """Return the product of the polynomials P of one segment's steps; `k_Bnn`, K of the first, goes to the pool.

    With `tall`, X comes before the product, not after it. The polynomials commute only up to rounding, and the first must
    be the one next to X: in the other order the rounding errors double.
    """
    gathered_Bnn = None
    for (a, b, c), after in zip(segment, [*segment[1:], None], strict=True):
        rho = a * c / b**2
        shifted_Bnn = k_Bnn if after is None else pool.take(k_Bnn.shape, k_Bnn).copy_(k_Bnn)
        _add_to_diagonal(shifted_Bnn, -1 / (2 * rho))
        p_Bnn = symmetric_matmul(shifted_Bnn, shifted_Bnn, alpha=rho, out=pool.take(k_Bnn.shape, k_Bnn))
        _add_to_diagonal(p_Bnn, 1 - 1 / (4 * rho))
        if after is not None:
            # All of these are polynomials of one Gram matrix, so they commute and their products are symmetric.
            half_Bnn = symmetric_matmul(p_Bnn, k_Bnn, out=shifted_Bnn)
            k_Bnn = symmetric_matmul(half_Bnn, p_Bnn, alpha=a * a * (after[1] / after[0]) / (b / a), out=k_Bnn)
        pool.give(shifted_Bnn)
        if gathered_Bnn is None:
            gathered_Bnn = p_Bnn
        else:
            # In full: mirroring one half would change the order of the factors.
            factors = (gathered_Bnn, p_Bnn) if tall else (p_Bnn, gathered_Bnn)
            both_Bnn = torch.bmm(*factors, out=pool.take(k_Bnn.shape, k_Bnn))
            pool.give(gathered_Bnn, p_Bnn)
            gathered_Bnn = both_Bnn
    assert gathered_Bnn is not None
    return gathered_Bnn


def _add_to_diagonal(x_Bnn: Tensor, value: float) -> None:
    x_Bnn.diagonal(dim1=-2, dim2=-1).add_(value)
