"""Activations that write to a given place: a work buffer that stays in the cache."""

from __future__ import annotations

import math
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


def _has_tail(z: Tensor) -> bool:
    """Whether torch computes the last few elements with a scalar function, which rounds otherwise than the vectors'.

    A row's result would then depend on where it stands, and permuting tokens would change last bits. tanh and erf are the
    same everywhere.
    """
    return z.dtype == torch.float32 and z.numel() % _VECTOR != 0


_VECTOR = 32  # float32 numbers that a pass of torch's loop takes with AVX-512; less with narrower units


def _silu(z: Tensor, out: Tensor) -> Tensor:
    if _has_tail(z):
        return torch.mul(z, 0.5, out=out).tanh_().add_(1).mul_(z).mul_(0.5)
    return _aten.silu.out(z, out=out)  # type: ignore[no-any-return]


def _silu_backward(grad: Tensor, z: Tensor, out: Tensor) -> Tensor:
    return _aten.silu_backward.grad_input(grad, z, grad_input=out)  # type: ignore[no-any-return]


def _gelu(z: Tensor, out: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "tanh" and _has_tail(z):
        inner = torch.addcmul(z, z * z, z, value=0.044715).mul_(math.sqrt(2 / math.pi))
        return torch.mul(inner.tanh_().add_(1), z, out=out).mul_(0.5)
    return _aten.gelu.out(z, approximate=approximate, out=out)  # type: ignore[no-any-return]


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
