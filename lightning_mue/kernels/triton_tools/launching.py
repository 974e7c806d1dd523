"""What the kernels share: products, loads of weights, new memory, and properties of the device."""

# In all kernels: Triton reads annotations of arguments, and only `tl.constexpr` means something to it.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

try:  # Triton 3.4 and newer
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # pragma: no cover
    TensorDescriptor = None


@triton.jit
def add(x, y):
    """For `tl.reduce`: the library's sum is tied to the interpreter's setting when Triton was imported."""
    return x + y


@triton.jit
def multiply_add(a, b, sums, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """`sums + a @ b` in float32."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


@triton.jit
def rounded(x, dtype, UPCAST: tl.constexpr):
    """Float32 rounded to a type; the interpreter would cut bfloat16 off, so its bits are rounded here."""
    if UPCAST:
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + (32767 + ((bits >> 16) & 1))).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_weight(
    w, at, expert, col, k, inside, DESCRIBED: tl.constexpr, EVEN: tl.constexpr, COLS: tl.constexpr, INNER: tl.constexpr
):
    """The tile [inner, cols] of an expert's weight: by pointers `at`, or by the bulk copy engine from a descriptor.

    DESCRIBED: "" for pointers; "nk" or "kn" for a descriptor of [E, n, k] or [E, k, n], which gives zeros outside.
    """
    if DESCRIBED == "nk":
        tile = tl.trans(tl.reshape(w.load([expert, col, k]), (COLS, INNER)))
    elif DESCRIBED == "kn":
        tile = tl.reshape(w.load([expert, k, col]), (INNER, COLS))
    elif EVEN:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=inside, other=0.0)
    return tile


#: Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when this module was imported). It holds bfloat16 as
#: integers, multiplies those, and cuts off where a device rounds: there products are taken, and rounded, as float32 (UPCAST).
INTERPRETED = not isinstance(add, triton.JITFunction)
if INTERPRETED:  # it adds element by element in Python, but knows this function and hands it to NumPy
    add = getattr(tl.standard, "_sum_combine", add)


def numerics(x: Tensor) -> dict[str, Any]:
    """Return the constants PRECISION and UPCAST. Float32 products follow `torch.backends.cuda.matmul`, as in `symmetric`."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"PRECISION": "tf32" if tf32 else "ieee", "UPCAST": INTERPRETED and x.dtype == torch.bfloat16}


def new_empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return memory that a kernel fills. Every buffer and result comes from here, so that a test can poison it."""
    return like.new_empty(shape, dtype=dtype)


def new_like(like: Tensor) -> Tensor:
    """Return memory with `like`'s shape, type and strides, as `torch.empty_like`."""
    return torch.empty_like(like)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return how many tiles run at a time; in the interpreter a number small enough that programs take several."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a block may have; where nothing is compiled for a device, those of an H100."""
    if device.type != "cuda":
        return _WIDE
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


def is_wide(shared: int) -> bool:
    """Whether a device with so much shared memory a block has matrix instructions that read operands from there.

    Those of compute capability 9.0 and 10.x. Others (8.x, 12.x) hold operands in registers beside the sums: their tiles are
    smaller, and Triton gives them a buffer less than there are stages.
    """
    return shared >= _WIDE


_WIDE = 227 * 1024


def describe(t: Tensor, block: tuple[int, int]) -> Any | None:
    """Return a descriptor of a stack of matrices [B, m, n] for blocks [1, *block]; None where the engine cannot read it."""
    size = t.element_size()
    aligned = t.data_ptr() % 16 == 0 and all(s * size % 16 == 0 for s in t.stride()[:-1])
    # The engine's strides are positive and its coordinates 32 bits wide; boxes have at most 256 elements a side.
    if TensorDescriptor is None or not aligned or t.stride(-1) != 1 or not all(s > 0 for s in t.stride()):
        return None
    if not t.numel() or max(block) > 256:
        return None
    return TensorDescriptor(t, list(t.shape), list(t.stride()), [1, *block])
