"""The router's logits as an operator: ``x W^T`` in float32, of inputs of any type, which are saved by reference.

Shape legend: T tokens, d width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_mue.checks import mismatch, value_error
from lightning_mue.kernels.compute_type import cpu_product_dtype
from lightning_mue.kernels.scratch import borrowed


def router_logits(x_Td: Tensor, weight_Ed: Tensor) -> Tensor:
    """Return ``x W^T`` in full float32 precision for all input types, also under autocast and with tf32 switched on.

    Differentiable; x and the weight are saved by reference, not as float32 copies.

    Args:
        x_Td: [T, d], any floating dtype.
        weight_Ed: [E, d], any floating dtype.

    Returns:
        float32 [T, E]; float64 if an input is float64.

    Raises:
        ValueError: The shapes do not fit.
    """
    if x_Td.ndim != 2 or weight_Ed.ndim != 2 or x_Td.shape[1] != weight_Ed.shape[1]:
        found = f"shapes {list(x_Td.shape)} and {list(weight_Ed.shape)}"
        expected = "[tokens, width] and [n_experts, width]"
        do = "Flatten leading dimensions of x with x.reshape(-1, width)."
        raise value_error("x_Td and weight_Ed", found=found, expected=expected, do=do)
    logits_TE: Tensor = torch.ops.lightning_mue.router_logits.default(x_Td, weight_Ed)
    return logits_TE


# Defined without `torch.library.custom_op`, which adds some 30 us to a call: the product itself takes little more.
torch.library.define("lightning_mue::router_logits", "(Tensor x, Tensor weight) -> Tensor")
torch.library.define(
    "lightning_mue::router_logits_backward",
    "(Tensor dlogits, Tensor x, Tensor weight, bool[] wanted) -> (Tensor, Tensor)",
)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Multiply float32 matrices in full float32, whatever the program has set."""
    libraries: tuple[Any, Any] = torch.backends.cuda, torch.backends.mkldnn
    switches = [library.matmul for library in libraries if library.matmul.fp32_precision not in _FULL]
    before = [s.fp32_precision for s in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = "none"  # what is not set here is inherited from a wider switch
            if switch.fp32_precision != precision:
                switch.fp32_precision = precision


_MANY = 1024  # tokens from which the first call of a shape, when oneDNN compiles it, is worth it
_FULL = ("none", "ieee")  # "none": nothing was set, and then torch multiplies in full


def _logits_dtype(x_Td: Tensor, weight_Ed: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x_Td.dtype, weight_Ed.dtype) else torch.float32


@contextmanager
def _converted(t: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor in the type of the sums; on the CPU in a buffer that is kept: new memory costs more than the product."""
    if t.dtype == dtype or t.device.type != "cpu":
        yield t.to(dtype)
        return
    with borrowed("router", t.new_empty(0, dtype=dtype), t.numel()) as flat:
        yield flat.view(t.shape).copy_(t)


def _product(a: Tensor, b: Tensor) -> Tensor:
    # Written to `out`, a product keeps its type under autocast.
    return torch.mm(a, b, out=a.new_empty(a.shape[0], b.shape[1]))


def _on_tensor_cores(x: Tensor, weight: Tensor) -> bool:
    """Whether a GPU multiplies these in 16 bits, with float32 sums."""
    fits = weight.dtype == x.dtype or (x.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
    return x.is_cuda and torch.version.hip is None and x.dtype.itemsize == 2 and fits


def _product_16(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x W^T`` of 16-bit x without loss: a product of two such numbers is exact in float32, only sums are rounded.

    A float32 weight is taken as the sum of three bfloat16 numbers, which have its 24 bits between them.
    """
    if weight.dtype == x.dtype:
        return _mm_16(x, weight)
    high = weight.to(x.dtype)
    rest = weight - high
    middle = rest.to(x.dtype)
    parts = _mm_16(x, torch.cat([high, middle, (rest - middle).to(x.dtype)]))
    of_high, of_middle, of_low = parts.chunk(3, 1)
    return of_high + (of_middle + of_low)


def _mm_16(x: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(x, weight.T, out_dtype=torch.float32)


@torch.library.impl("lightning_mue::router_logits", "CompositeExplicitAutograd")
def _logits(x: Tensor, weight: Tensor) -> Tensor:
    if _on_tensor_cores(x, weight):
        return _product_16(x, weight)
    dtype = _logits_dtype(x, weight)
    with _full_precision(), _converted(x, dtype) as x_Td:
        if (
            x.device.type == "cpu"
            and dtype == torch.float32
            and len(x) >= _MANY
            and torch.backends.mkldnn.is_available()
        ):
            # Faster by a fifth to a half than MKL on AMD with few experts.
            w_Ed = weight.to(dtype).contiguous()
            return torch.ops.mkldnn._linear_pointwise(x_Td.contiguous(), w_Ed, None, "none", [], "")
        return _product(x_Td, weight.to(dtype).T)


@torch.library.impl("lightning_mue::router_logits_backward", "CompositeExplicitAutograd")
def _logits_grad(dlogits: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """Return dx and dweight, each of its own type, without elements where not wanted."""
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    all_16 = x.dtype == weight.dtype == torch.bfloat16
    if x.device.type == "cpu" and all_16 and cpu_product_dtype() == torch.bfloat16:
        return _grads_16(dlogits, x, weight, wanted)
    with _full_precision():
        if wanted[0]:
            dx = _input_grad(dlogits, x, weight)
        if wanted[1]:
            with _converted(x, dlogits.dtype) as x_Td:
                dweight = _product(dlogits.T, x_Td).to(weight.dtype)
    return dx, dweight


def _grads_16(dlogits_TE: Tensor, x_Td: Tensor, weight_Ed: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """Both gradients by bfloat16 products, of dlogits as a sum of two bfloat16 numbers that have 16 bits between them.

    What is lost of dx is 2^-8 of its rounding; dweight is rounded twice, as the sum of two rounded products.
    """
    dx, dweight = x_Td.new_empty(0), weight_Ed.new_empty(0)
    n_experts = dlogits_TE.shape[1]
    pair = x_Td.new_empty(len(dlogits_TE), 2 * n_experts)
    pair[:, :n_experts] = dlogits_TE
    torch.sub(dlogits_TE, pair[:, :n_experts], out=pair[:, n_experts:])
    if wanted[0]:
        dx = _product(pair, torch.cat([weight_Ed, weight_Ed]))
    if wanted[1]:
        large, small = _product(x_Td.T, pair).chunk(2, 1)
        dweight = (large + small).T.contiguous()
    return dx, dweight


def _input_grad(dlogits_TE: Tensor, x_Td: Tensor, weight_Ed: Tensor) -> Tensor:
    """``dlogits W``, rounded once to x's type."""
    if x_Td.device.type != "cpu" or x_Td.dtype == dlogits_TE.dtype:
        return _product(dlogits_TE, weight_Ed.to(dlogits_TE.dtype)).to(x_Td.dtype)
    with borrowed("router", dlogits_TE, x_Td.numel()) as flat:
        product_Td = torch.mm(dlogits_TE, weight_Ed.to(dlogits_TE.dtype), out=flat.view(x_Td.shape))
        return torch.empty_like(x_Td, memory_format=torch.contiguous_format).copy_(product_Td)


@torch.library.register_fake("lightning_mue::router_logits")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=_logits_dtype(x, weight))


@torch.library.register_fake("lightning_mue::router_logits_backward")
def _(dlogits: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    shapes = [tuple(t.shape) if want else (0,) for t, want in zip((x, weight), wanted, strict=True)]
    return x.new_empty(shapes[0]), weight.new_empty(shapes[1])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _logits_backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor | None, Tensor | None]:
    wanted = list(ctx.needs_input_grad)
    grads = torch.ops.lightning_mue.router_logits_backward.default(dlogits, *ctx.saved_tensors, wanted)
    dx, dweight = (grad if want else None for grad, want in zip(grads, wanted, strict=True))
    return dx, dweight


torch.library.register_autograd("lightning_mue::router_logits", _logits_backward, setup_context=_save_inputs)


def no_second_derivative(ctx: Any, *grads: Tensor | None) -> None:
    """Raise, because without this autograd would treat the gradient as a constant."""
    do = "Take gradients without create_graph=True."
    raise RuntimeError(mismatch("routing", found="a second derivative", expected="first derivatives only", do=do))


torch.library.register_autograd("lightning_mue::router_logits_backward", no_second_derivative)


@register_flop_formula(torch.ops.lightning_mue.router_logits)
def _logits_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.lightning_mue.router_logits_backward)
def _logits_backward_flops(dlogits: Any, x: Any, weight: Any, wanted: Any, *args: Any, **kwargs: Any) -> int:
    return sum(wanted) * _logits_flops(x, weight)
