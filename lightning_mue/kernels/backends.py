"""Chooses the implementation of an operator: by name, or by the device and type of the tensors."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from lightning_mue.checks import require_choice, value_error
from lightning_mue.kernels.symmetric.op import kernel_fits, triton_available

#: What a user may ask for. "triton": our kernels, on CUDA. "grouped_mm": torch's grouped GEMM, on CUDA and CPU. "torch":
#: plain PyTorch on every device, on the CPU with worker threads over experts.
BACKENDS = ("auto", "triton", "grouped_mm", "torch")


def resolve_backend(backend: str, x: Tensor) -> str:
    """Return the backend that runs for this input: "triton", "grouped_mm" or "torch".

    "auto" takes Triton where it runs (`kernel_fits`), else torch's grouped GEMM on CUDA for bfloat16, else "torch".

    Raises:
        ValueError: The name is unknown, or the backend cannot run on this device with this type.
    """
    if backend == "auto":
        if kernel_fits(x):
            return "triton"
        return "grouped_mm" if x.is_cuda and x.dtype == torch.bfloat16 else "torch"
    require_choice("backend", backend, BACKENDS)
    if backend == "triton" and not kernel_fits(x) and not _interpreted(x):
        missing = "Triton is not installed" if not triton_available() else f"x is {x.dtype} on {x.device}"
        expected = "Triton, a CUDA device of compute capability 8.0 or newer, and x in float32, bfloat16 or float16"
        do = "Use backend='auto', which falls back to plain PyTorch."
        raise value_error("backend", found=f"'triton', but {missing}", expected=expected, do=do)
    if backend == "grouped_mm" and x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        expected, do = "x in float32, bfloat16 or float16", "Use backend='torch'."
        raise value_error("backend", found=f"'grouped_mm' with x in {x.dtype}", expected=expected, do=do)
    return backend


def implementation(op: str, backend: str) -> ModuleType:
    """Return the module that implements `op` ("grouped_ffn", "routing", ...) for a resolved backend."""
    name = {"triton": "triton", "torch": "pytorch", "grouped_mm": "grouped_mm"}[backend]
    folder = op == "grouped_ffn" and backend != "grouped_mm"  # a folder of files; experts.py is the entry
    return import_module(f"lightning_mue.kernels.{op}.{name}{'.experts' if folder else ''}")


def _interpreted(x: Tensor) -> bool:
    """Whether Triton's interpreter would run the kernels on this CPU tensor (TRITON_INTERPRET=1, for tests)."""
    if x.device.type not in ("cpu", "meta") or x.dtype == torch.float64 or not triton_available():
        return False
    return bool(implementation("grouped_ffn", "triton").INTERPRETED)
