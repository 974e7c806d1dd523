"""Batched matrix products whose result is known to be symmetric: on a GPU, half the work of a plain product.

    out = beta * c + alpha * a @ b

Newton-Schulz iterations consist of them: the Gram product `X X^T`, and products of polynomials in it, which commute and so
are symmetric again. A GPU kernel (triton.py) computes the lower triangle and stores it twice. Elsewhere plain
PyTorch computes the full product; on a CPU, where matrices are large, by blocks of rows of the lower triangle.

Shape legend: B matrices, n rows and columns of the result, k the inner dimension.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_mue.checks import mismatch, type_error, value_error

_BLOCK_ROWS = 128
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def symmetric_matmul(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """Return `beta * c + alpha * a @ b`, where the caller knows that the product is symmetric.

    On CUDA (compute capability 8.0 and newer, Triton installed; float16, bfloat16, float32) only the lower triangle is
    computed, with float32 sums, and the result is symmetric bit by bit. Of a product that is not symmetric it holds the
    lower triangle twice. On a CPU the same is done in blocks, where `beta` is 0 and the matrices are large. Everywhere else
    `symmetric_matmul_torch` computes all of it: symmetric up to rounding.

    The kernel times a few tilings at the first call of a size, which waits for the device; LIGHTNING_MUE_AUTOTUNE=0 turns
    that off, and while a CUDA graph is captured a fixed tiling is taken. Products of float32 follow
    `torch.backends.cuda.matmul` as `torch.bmm` does.

    Args:
        a: `[B, n, k]`, floating point, any strides.
        b: `[B, k, n]`, of `a`'s type and device, any strides. `a.mT` for a Gram product.
        c: `[B, n, n]` symmetric, likewise. Not read if `beta` is 0.
        alpha: Factor of the product.
        beta: Factor of `c`.
        out: `[B, n, n]`, likewise, sharing no memory with the others; overwritten. None makes a new one.

    Returns:
        `out`. It carries no gradient.

    Raises:
        ValueError: If a shape does not fit, `c` is missing, or `out` overlaps an input.
        TypeError: If the types or devices differ, or are not real floating point.
        RuntimeError: If an argument requires a gradient (outside `torch.no_grad()`).
    """
    out = _prepare(a, b, c, beta, out)
    if a.device.type == "cpu" and not beta and _pays_in_blocks(a) and not torch.compiler.is_compiling():
        return _in_blocks(a, b, alpha, out)
    if not kernel_fits(a):
        return _product(a, b, c, alpha, beta, out)
    torch.ops.lightning_mue.symmetric_matmul.default(a, b, c if beta else None, alpha, beta, out)
    return out


def symmetric_matmul_torch(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0, out: Tensor | None = None
) -> Tensor:
    """Do as `symmetric_matmul`, in plain PyTorch, on every device: the full product, symmetric up to rounding."""
    return _product(a, b, c, alpha, beta, _prepare(a, b, c, beta, out))


@cache
def triton_available() -> bool:
    """Return whether Triton is installed, without importing it."""
    return find_spec("triton") is not None


def kernel_fits(a: Tensor) -> bool:
    """Return whether `symmetric_matmul` takes the kernel for this tensor, by its device and type.

    CUDA of compute capability 8.0 or newer; float16, bfloat16 or float32; Triton installed. Not AMD devices, on which it
    is untested.
    """
    return (
        a.is_cuda
        and a.dtype in _KERNEL_DTYPES
        and torch.version.hip is None
        and triton_available()
        and torch.cuda.get_device_capability(a.device) >= (8, 0)
    )


def _product(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, out: Tensor) -> Tensor:
    # Written to `out`, a product keeps its type under autocast. With beta = 0 torch does not read its first argument.
    return torch.baddbmm(out if c is None or not beta else c, a, b, alpha=alpha, beta=beta, out=out)


def _pays_in_blocks(a: Tensor) -> bool:
    """Whether blocks of a triangle take less time than one product.

    On an AMD EPYC, one thread, 20 % less for 512 x 512 in bfloat16 and 27 % in float32, 26 and 32 % for 512 x 1408, but 14 %
    more for 256 x 512 in bfloat16.
    """
    n, k = a.shape[1:]
    return n >= 4 * _BLOCK_ROWS and n * k >= 1 << 18


def _in_blocks(a: Tensor, b: Tensor, alpha: float, out: Tensor) -> Tensor:
    """The lower triangle, mirrored: symmetric bit by bit outside the blocks on the diagonal."""
    n = a.shape[1]
    blocks = [(start, min(start + _BLOCK_ROWS, n)) for start in range(0, n, _BLOCK_ROWS)]
    for a_nk, b_kn, out_nn in zip(a, b, out, strict=True):  # one after the other, because each stays in a core's cache
        for start, stop in blocks:
            rows = out_nn[start:stop, :stop]
            torch.addmm(rows, a_nk[start:stop], b_kn[:, :stop], alpha=alpha, beta=0, out=rows)
    # The mirror copies all matrices at once, and bits: as numbers of two bytes they would take a slower path.
    bits = out.view(torch.int16) if out.element_size() == 2 else out
    for start, stop in blocks[1:]:
        bits[:, :start, start:stop] = bits[:, start:stop, :start].mT
    return out


def _prepare(a: Tensor, b: Tensor, c: Tensor | None, beta: float, out: Tensor | None) -> Tensor:
    """Check the arguments, and return `out`, made if it was None."""
    if a.ndim != 3 or b.ndim != 3 or b.shape != (a.shape[0], a.shape[2], a.shape[1]):
        found = f"shapes {list(a.shape)} and {list(b.shape)}"
        do = "Add a batch dimension to single matrices with unsqueeze(0)."
        raise value_error("a and b", found=found, expected="batches [B, n, k] and [B, k, n]", do=do)
    if beta and c is None:
        raise value_error("c", found=None, expected=f"a tensor, for beta is {beta}", do="Pass c, or beta=0.")
    square = (a.shape[0], a.shape[1], a.shape[1])
    if out is None:
        out = a.new_empty(square)
    _check_like(a, "b", b, b.shape)
    _check_like(a, "out", out, square)
    if c is not None:
        _check_like(a, "c", c, square)
    if not a.is_floating_point():
        raise type_error("a", found=a.dtype, expected="real floating point")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (a, b, c, out)):
        found = "an argument that requires a gradient"
        expected, do = "none, because it has no gradient", "Call it in torch.no_grad()."
        raise RuntimeError(mismatch("symmetric_matmul", found=found, expected=expected, do=do))
    if not torch.compiler.is_compiling():  # no addresses while tracing
        storage = out.untyped_storage().data_ptr()
        for name, t in (("a", a), ("b", b), ("c", c if beta else None)):
            # Address 0: a tensor without memory (meta, fake).
            if t is not None and storage and t.untyped_storage().data_ptr() == storage and _spans_meet(t, out):
                found, do = f"memory that it shares with {name}", "Pass another buffer, or out=None for a new one."
                raise value_error("out", found=found, expected="memory of its own", do=do)
    return out


def _check_like(a: Tensor, name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    if t.shape != shape:
        raise value_error(name, found=f"shape {list(t.shape)}", expected=f"shape {list(shape)}")
    if t.dtype != a.dtype or t.device != a.device:
        found, expected = f"{t.dtype} on {t.device}", f"{a.dtype} on {a.device}, as a is"
        raise type_error(name, found=found, expected=expected)


def _spans_meet(x: Tensor, y: Tensor) -> bool:
    """Whether the spans of memory of two views of a storage meet; views that interleave count as meeting."""
    if not x.numel() or not y.numel():
        return False
    (x_first, x_last), (y_first, y_last) = (
        (t.storage_offset(), t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))
        for t in (x, y)
    )
    return x_first <= y_last and y_first <= x_last


# Defined without `torch.library.custom_op`, which costs 45 us a call, as much as several launches: this one is called ten times
# for an orthogonalization. As an operator, torch.compile calls it without looking inside, and its FLOPs are counted.
torch.library.define(
    "lightning_mue::symmetric_matmul", "(Tensor a, Tensor b, Tensor? c, float alpha, float beta, Tensor(a!) out) -> ()"
)


@torch.library.impl("lightning_mue::symmetric_matmul", "CompositeExplicitAutograd")
def _launch(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, out: Tensor) -> None:
    from lightning_mue.kernels.symmetric.triton import launch

    # "none" means that nothing was set, and then torch multiplies in full float32. The older switch `allow_tf32` cannot be
    # read in a program that uses this newer one.
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    with torch.cuda.device_of(a):  # Triton launches on the current device
        launch(a, b, c, alpha, beta, out, precision)


@torch.library.register_fake("lightning_mue::symmetric_matmul")
def _(a: Tensor, b: Tensor, c: Tensor | None, alpha: float, beta: float, out: Tensor) -> None:
    return None


@register_flop_formula(torch.ops.lightning_mue.symmetric_matmul)
def _flops(a_shape: Any, *args: Any, **kwargs: Any) -> int:
    """The lower triangle with its diagonal, an addition and a multiplication each."""
    batch, n, k = a_shape
    return batch * n * (n + 1) * k
