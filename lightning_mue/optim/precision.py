"""Types of elementwise math, of sums and of matrix products, by device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_mue.kernels.compute_type import cpu_product_dtype


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type for elementwise math on tensors of `dtype`: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which norms are summed: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def default_dtype(g: Tensor) -> torch.dtype:
    """Return the type that multiplies fastest on `g`'s device and is exact enough; float64 input stays float64.

    On CUDA float16: as fast as bfloat16 and more exact, and the iteration stays within its range. On a CPU what
    `cpu_product_dtype` measures. Elsewhere float32.
    """
    if g.dtype == torch.float64:
        return torch.float64
    if g.is_cuda:
        return torch.float16
    return cpu_product_dtype() if g.device.type == "cpu" else torch.float32


def product_precision(x: Tensor) -> str:
    """Return the precision that products of this tensor really have, e.g. "bfloat16" or "tf32"."""
    if x.dtype != torch.float32:
        return str(x.dtype).removeprefix("torch.")
    # `set_float32_matmul_precision("medium")` makes a CPU multiply in bfloat16. This reads the newer switch, because
    # `get_float32_matmul_precision` raises once that switch differs between backends.
    backend = torch.backends.cuda.matmul if x.is_cuda else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return {"tf32": "tf32", "bf16": "bfloat16"}.get(backend.fp32_precision, "float32")


@contextlib.contextmanager
def tf32_products(wanted: bool) -> Iterator[None]:
    """Let CUDA multiply float32 matrices in tf32 inside the context, if wanted."""
    before = torch.backends.cuda.matmul.fp32_precision
    if wanted:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        if wanted:
            torch.backends.cuda.matmul.fp32_precision = before
