"""Activations of a feed-forward network, gated or not, as the expert kernels know them.

gated:      a = f(z_gate) * z_up          otherwise:      a = f(z_up)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """One activation.

    Attributes:
        gated: Whether a second pre-activation is multiplied in, and the network has a `w_gate`.
        function: f, elementwise.
    """

    gated: bool
    function: Callable[[Tensor], Tensor]


def _tanh_gelu(z: Tensor) -> Tensor:
    return F.gelu(z, approximate="tanh")


def _relu2(z: Tensor) -> Tensor:
    return F.relu(z).square()


#: SwiGLU and GEGLU: arXiv:2002.05202. Squared ReLU: arXiv:2109.08668. "-tanh": GELU's tanh approximation (GPT-2's).
ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(True, F.silu),
    "geglu": Activation(True, F.gelu),
    "geglu-tanh": Activation(True, _tanh_gelu),
    "gelu": Activation(False, F.gelu),
    "gelu-tanh": Activation(False, _tanh_gelu),
    "relu": Activation(False, F.relu),
    "relu2": Activation(False, _relu2),
}
