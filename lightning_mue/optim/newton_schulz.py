"""Orthogonalization of batches of matrices by Newton-Schulz iterations.

Shape legend:
    B  matrices in a batch            n  smaller side of a matrix
    out, in  rows and columns         m  larger side of a matrix
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Coefficients:
    """A schedule of odd quintic polynomials `X <- a X + (b XX^T + c (XX^T)^2) X`, one step each.

    Attributes:
        steps: `(a, b, c)` of each step, in order.
        source: Where the numbers come from.
        floor: Smallest singular value, as a fraction of the matrix's Frobenius norm, that reaches the band.
        band: Lowest and highest value, in exact arithmetic, of the result's singular values that started at or above
            the floor. Those that started below it end between 0 and the upper edge.
    """

    steps: tuple[tuple[float, float, float], ...]
    source: str
    floor: float
    band: tuple[float, float]


#: The named schedules. The bands are the extrema of the composed polynomial on [floor, 1.01], rounded outwards; the
#: 1% of headroom covers a norm that was rounded down. `tests/optim/test_newton_schulz.py` recomputes them.
PRESETS: dict[str, Coefficients] = {
    "classic": Coefficients(
        steps=((3.4445, -4.7750, 2.0315),) * 5,
        source="Jordan et al., Muon (kellerjordan.github.io/posts/muon), 2024",
        floor=2e-3,
        band=(0.68, 1.21),
    ),
    "scheduled": Coefficients(
        steps=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        source="five-step schedule optimized step by step, published with the Muon speed runs (modded-nanogpt), 2025",
        floor=2.5e-3,
        band=(0.97, 1.15),
    ),
}


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type for elementwise math on tensors of `dtype`: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_bytes(device: torch.device) -> int:
    """Return how many bytes of matrices to work on at once: a cache's worth on CPU, a GPU's worth elsewhere."""
    return 8 << 20 if device.type == "cpu" else 256 << 20


def default_dtype(g: Tensor) -> torch.dtype:
    """Return the type to iterate in: bfloat16 on CUDA, else float32; float64 input stays float64 everywhere."""
    if g.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if g.is_cuda else torch.float32


def peak(x_Bnm: Tensor) -> Tensor:
    """Return each matrix's largest magnitude, `[B, 1, 1]`: zero for a zero matrix only, NaN if it holds a NaN."""
    # Several times faster on CPU than the infinity norm or `abs().amax()`, and without a temporary.
    return torch.maximum(x_Bnm.amax((-2, -1), keepdim=True), -x_Bnm.amin((-2, -1), keepdim=True))


@torch.no_grad()
def orthogonalize(g: Tensor, preset: str | Coefficients = "scheduled", dtype: torch.dtype | None = None) -> Tensor:
    """Replace each matrix by (nearly) its polar factor: same singular vectors, singular values moved to about 1.

    Each matrix is scaled to Frobenius norm 1 (any finite entries, from subnormal to the largest, are safe) and then
    taken through the schedule's polynomials on its smaller side. How close the singular values come to 1, and from
    how small a start, is the schedule's `band` and `floor`. A zero matrix gives exactly zero. A matrix with a NaN or
    an infinity gives NaN and leaves the others of its batch alone.

    Args:
        g: `[out, in]` or a batch `[B, out, in]`, any real floating dtype, any strides.
        preset: A name in `PRESETS`, or a schedule of your own.
        dtype: Type of the matrix products. None chooses bfloat16 on CUDA, float64 for float64 input, else float32.

    Returns:
        The direction, contiguous, of `g`'s shape, in float32 (float64 if `g` is float64). It carries no gradient.

    Raises:
        ValueError: If `g` is not 2-D or 3-D, or `preset` is unknown.
        TypeError: If `g` or `dtype` is not real floating point.
    """
    schedule = get_preset(preset) if isinstance(preset, str) else preset
    dtype = dtype or default_dtype(g)
    if g.ndim not in (2, 3):
        raise ValueError(f"g must be a matrix [out, in] or a batch [B, out, in], found shape {list(g.shape)}.")
    if not (g.is_floating_point() and dtype.is_floating_point):
        raise TypeError(f"g and dtype must be real floating point, found g of {g.dtype} and dtype {dtype}.")

    result = torch.empty(g.shape, dtype=math_dtype(g.dtype), device=g.device)
    if not result.numel():
        return result
    g_Bnm, result_Bnm = (t if t.ndim == 3 else t.unsqueeze(0) for t in (g, result))
    if g.shape[-2] > g.shape[-1]:
        g_Bnm, result_Bnm = g_Bnm.mT, result_Bnm.mT
    matrix_bytes = g_Bnm[0].numel() * dtype.itemsize
    count = max(1, chunk_bytes(g.device) // matrix_bytes)
    for part_Bnm, out_Bnm in zip(g_Bnm.split(count), result_Bnm.split(count), strict=True):
        out_Bnm.copy_(_iterate(_normalize(part_Bnm).to(dtype), schedule))
    return result


def get_preset(name: str) -> Coefficients:
    """Return the schedule called `name`.

    Raises:
        ValueError: If there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must name a Newton-Schulz schedule, one of {sorted(PRESETS)}; found {name!r}.")
    return PRESETS[name]


def _normalize(g_Bnm: Tensor) -> Tensor:
    """Scale every matrix to Frobenius norm 1; contiguous, in the math type. Zero matrices stay zero."""
    x_Bnm = g_Bnm.to(math_dtype(g_Bnm.dtype), memory_format=torch.contiguous_format, copy=True)
    # Largest entry first: the squares of 1e-30 and of 1e30 do not fit float32. Then the norm is 1 or more, unless 0.
    peak_B11 = peak(x_Bnm)
    x_Bnm.div_(peak_B11 + (peak_B11 == 0))
    return x_Bnm.div_(torch.linalg.vector_norm(x_Bnm, dim=(-2, -1), keepdim=True).clamp_min_(1))


def _iterate(x_Bnm: Tensor, schedule: Coefficients) -> Tensor:
    """Run the schedule on matrices of Frobenius norm at most 1, n <= m; may overwrite `x_Bnm`."""
    gram_Bnn = x_Bnm.new_empty(x_Bnm.shape[0], x_Bnm.shape[1], x_Bnm.shape[1])
    poly_Bnn, next_Bnm = torch.empty_like(gram_Bnn), torch.empty_like(x_Bnm)
    for a, b, c in schedule.steps:
        # out= keeps scratch at one set of buffers, and keeps autocast from lowering the products' type.
        torch.bmm(x_Bnm, x_Bnm.mT, out=gram_Bnn)
        torch.baddbmm(gram_Bnn, gram_Bnn, gram_Bnn, beta=b, alpha=c, out=poly_Bnn)
        torch.baddbmm(x_Bnm, poly_Bnn, x_Bnm, beta=a, out=next_Bnm)
        x_Bnm, next_Bnm = next_Bnm, x_Bnm
    return x_Bnm
