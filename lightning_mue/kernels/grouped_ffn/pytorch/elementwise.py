"""Activations that write to a given tensor, so that a work buffer stays in the cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

_aten = torch.ops.aten


class Elementwise(NamedTuple):
    """One activation f of `kernels.activations`.

    Attributes:
        function: ``function(z, out)`` writes f(z).
        derivative: ``derivative(grad, z, out)`` writes ``grad * f'(z)``; `out` may be `grad`.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor, Tensor], Tensor]


def _in_vectors(function: Callable[[Tensor, Tensor], Tensor], z: Tensor, out: Tensor) -> Tensor:
    """Write f(z) such that the result of a number does not depend on its position.

    torch computes the remainder at the end of each thread's part with a scalar function, which rounds differently from the vector
    function: permuting tokens would change last bits. So threads get whole vectors, and the remainder is computed in padding.
    """
    n = z.numel()
    threads = min(torch.get_num_threads(), -(-n // _SERIAL))
    rest = n % (_VECTOR * max(threads, 1))
    if z.dtype != torch.float32 or not rest or z.device.type != "cpu":
        return function(z, out)
    flat_z, flat_out = z.view(-1), out.view(-1)
    if rest < n:
        function(flat_z[:-rest], flat_out[:-rest])
    padded = z.new_zeros(2, rest + -rest % _VECTOR)
    padded[0, :rest] = flat_z[-rest:]
    flat_out[-rest:] = function(padded[0], padded[1])[:rest]
    return out


_VECTOR = 32  # float32 numbers that a pass of torch's loop takes with AVX-512; less with narrower units
_SERIAL = 32768  # torch uses one thread for up to so many numbers


def _silu(z: Tensor, out: Tensor) -> Tensor:
    return _in_vectors(lambda z, out: _aten.silu.out(z, out=out), z, out)


def _silu_backward(grad: Tensor, z: Tensor, out: Tensor) -> Tensor:
    return _aten.silu_backward.grad_input(grad, z, grad_input=out)  # type: ignore[no-any-return]


def _gelu(z: Tensor, out: Tensor, approximate: str = "none") -> Tensor:
    return _in_vectors(lambda z, out: _aten.gelu.out(z, approximate=approximate, out=out), z, out)


def _gelu_backward(grad: Tensor, z: Tensor, out: Tensor, approximate: str = "none") -> Tensor:
    return _aten.gelu_backward.grad_input(grad, z, approximate=approximate, grad_input=out)  # type: ignore[no-any-return]


def _relu(z: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(z, 0, out=out)


def _relu_backward(grad: Tensor, z: Tensor, out: Tensor) -> Tensor:
    return _aten.threshold_backward.grad_input(grad, z, 0, grad_input=out)  # type: ignore[no-any-return]


def _relu2(z: Tensor, out: Tensor) -> Tensor:
    return torch.clamp_min(z, 0, out=out).square_()


def _relu2_backward(grad: Tensor, z: Tensor, out: Tensor) -> Tensor:
    return torch.mul(grad, z.clamp_min(0), out=out).mul_(2)


_SWIGLU = Elementwise(_silu, _silu_backward)
_GELU = Elementwise(_gelu, _gelu_backward)
_TANH_GELU = Elementwise(partial(_gelu, approximate="tanh"), partial(_gelu_backward, approximate="tanh"))

#: By the keys of `ACTIVATIONS`.
ELEMENTWISE: dict[str, Elementwise] = {
    "swiglu": _SWIGLU,
    "geglu": _GELU,
    "geglu-tanh": _TANH_GELU,
    "gelu": _GELU,
    "gelu-tanh": _TANH_GELU,
    "relu": Elementwise(_relu, _relu_backward),
    "relu2": Elementwise(_relu2, _relu2_backward),
}
