"""The dense feed-forward layer, alone or as the shared expert of an MoE layer.

Shape legend: d width, h hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mue.checks import require_choice, require_non_negative, require_positive
from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.moe.drawing import normal_
from lightning_mue.parameterizations.rules.roles import Role


class FeedForward(nn.Module):
    """``y = output_multiplier * (a w_down^T)``, ``a = f(x w_gate^T) * (x w_up^T)`` if gated, else ``a = f(x w_up^T)``.

    Args:
        width: d, size of the input and of the output.
        hidden_width: h.
        activation: "swiglu", "geglu" (arXiv:2002.05202) or "geglu-tanh", gated; "gelu", "gelu-tanh", "relu" or "relu2"
            (arXiv:2109.08668), not gated.
        bias: Whether each map adds a bias (`b_gate`, `b_up`, `b_down`), zero at first.
        shared: Whether this is a shared expert of an MoE layer, which then owns the branch's multiplier: the roles
            become those of a shared expert, and no multiplier and no branch is declared here.
        init_std: Standard deviation of the initial weights; None: ``fan_in^-1/2`` of each.

    Attributes:
        output_multiplier: Constant forward multiplier, 1 unless a parameterization sets it.

    Raises:
        ValueError: A width is below 1, `init_std` is negative, or the activation is unknown.
    """

    w_gate: nn.Parameter | None
    w_up: nn.Parameter
    w_down: nn.Parameter
    b_gate: nn.Parameter | None
    b_up: nn.Parameter | None
    b_down: nn.Parameter | None

    def __init__(
        self,
        width: int,
        hidden_width: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        shared: bool = False,
        init_std: float | None = 0.02,
    ) -> None:
        super().__init__()
        require_positive(width=width, hidden_width=hidden_width)
        require_non_negative(init_std=0.0 if init_std is None else init_std)
        require_choice("activation", activation, tuple(ACTIVATIONS))
        self.width, self.hidden_width, self.init_std = width, hidden_width, init_std
        self.activation, self.bias = activation, bias
        self.active_width = hidden_width
        self.output_multiplier = 1.0
        up, down = (Role.SHARED_UP, Role.SHARED_DOWN) if shared else (Role.FFN_UP, Role.FFN_DOWN)
        self.mue_roles = make_parameters(self, (), width, hidden_width, activation, bias=bias, up=up, down=down)
        if not shared:
            self.mue_multipliers = {"ffn": "output_multiplier"}
            self.mue_branch = "ffn"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew and clears the biases."""
        reset_parameters(self, self.init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [..., d] to [..., d]."""
        function, up = ACTIVATIONS[self.activation].function, F.linear(x, self.w_up, self.b_up)
        hidden = function(up) if self.w_gate is None else function(F.linear(x, self.w_gate, self.b_gate)) * up
        y = F.linear(hidden, self.w_down, self.b_down)
        return y if self.output_multiplier == 1.0 else self.output_multiplier * y

    def extra_repr(self) -> str:
        """The settings, for `print(module)`."""
        return f"{self.width}, hidden_width={self.hidden_width}, {self.activation}{', bias' if self.bias else ''}"


def make_parameters(
    module: nn.Module,
    stack: tuple[int, ...],
    width: int,
    hidden_width: int,
    activation: str,
    *,
    bias: bool,
    up: Role,
    down: Role,
) -> dict[str, Role]:
    """Registers the empty weights and biases of one network (`stack` is ()), or of a stack of E (`stack` is (E,)).

    Returns:
        The roles, by parameter name: `down` for `w_down`, `up` for the other weights. Parameters that a network lacks are None.
    """
    gate = ["gate"] if ACTIVATIONS[activation].gated else []
    shapes = dict.fromkeys((*gate, "up"), (*stack, hidden_width, width)) | {"down": (*stack, width, hidden_width)}
    roles = {}
    for name in ("gate", "up", "down"):
        shape = shapes.get(name)
        module.register_parameter(f"w_{name}", None if shape is None else nn.Parameter(torch.empty(shape)))
        has_bias = bias and shape is not None
        module.register_parameter(f"b_{name}", nn.Parameter(torch.empty(shape[:-1])) if has_bias and shape else None)
        if shape is not None:
            roles[f"w_{name}"] = down if name == "down" else up
        if has_bias:
            roles[f"b_{name}"] = Role.BIAS
    return roles


def reset_parameters(module: nn.Module, init_std: float | None) -> None:
    """Draws weights from N(0, init_std^2), or N(0, 1 / fan_in) if that is None; sets biases to zero."""
    for name, parameter in module.named_parameters(recurse=False):
        if name.startswith("b_"):
            nn.init.zeros_(parameter)
        else:
            normal_(parameter, parameter.shape[-1] ** -0.5 if init_std is None else init_std)
