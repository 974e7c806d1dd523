"""Activations of a feed-forward network, gated or not, as the expert kernels know them.

gated:      a = f(z_gate) * z_up          otherwise:      a = f(z_up)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """One activation.

    Attributes:
        gated: Whether a second pre-activation is multiplied in, and the network has a `w_gate`.
        function: f, elementwise.
        derivative: From a gradient and f's argument to the argument's gradient.
    """

    gated: bool
    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor, Tensor], Tensor]


def _tanh_gelu(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _tanh_gelu_backward(grad: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(grad, z, approximate="tanh")  # type: ignore[no-any-return]


def _relu_backward(grad: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.threshold_backward(grad, z, 0)  # type: ignore[no-any-return]


def _relu2(z: Tensor) -> Tensor:
    return F.relu(z).square()


def _relu2_backward(grad: Tensor, z: Tensor) -> Tensor:
    return grad * F.relu(z) * 2


_silu_backward: Callable[[Tensor, Tensor], Tensor] = torch.ops.aten.silu_backward
_gelu_backward: Callable[[Tensor, Tensor], Tensor] = torch.ops.aten.gelu_backward

#: SwiGLU and GEGLU: arXiv:2002.05202. Squared ReLU: arXiv:2109.08668. "-tanh": GELU's tanh approximation (GPT-2's).
ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(True, F.silu, _silu_backward),
    "geglu": Activation(True, F.gelu, _gelu_backward),
    "geglu-tanh": Activation(True, _tanh_gelu, _tanh_gelu_backward),
    "gelu": Activation(False, F.gelu, _gelu_backward),
    "gelu-tanh": Activation(False, _tanh_gelu, _tanh_gelu_backward),
    "relu": Activation(False, F.relu, _relu_backward),
    "relu2": Activation(False, _relu2, _relu2_backward),
}
