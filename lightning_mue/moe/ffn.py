"""The dense SwiGLU feed-forward layer, alone or as the shared expert of an MoE layer.

Shape legend: d width, h hidden width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mue.moe._checks import require_non_negative, require_positive
from lightning_mue.parameterizations.roles import Role


class SwiGLU(nn.Module):
    """``y = output_multiplier * (silu(x w_gate^T) * (x w_up^T)) w_down^T`` (arXiv:2002.05202), without biases.

    Args:
        width: d, size of the input and of the output.
        hidden_width: h.
        shared: Whether this is a shared expert of an MoE layer, which then owns the branch's multiplier: the roles
            become those of a shared expert, and no multiplier and no branch is declared here.
        init_std: Standard deviation of the initial weights; None: ``fan_in^-1/2`` of each.

    Attributes:
        output_multiplier: Constant forward multiplier, 1 unless a parameterization sets it.

    Raises:
        ValueError: A width is below 1, or `init_std` is negative.
    """

    def __init__(self, width: int, hidden_width: int, *, shared: bool = False, init_std: float | None = 0.02) -> None:
        super().__init__()
        require_positive(width=width, hidden_width=hidden_width)
        require_non_negative(init_std=init_std or 0.0)
        self.width, self.hidden_width, self.init_std = width, hidden_width, init_std
        self.active_width = hidden_width
        self.output_multiplier = 1.0
        up, down = (Role.SHARED_UP, Role.SHARED_DOWN) if shared else (Role.FFN_UP, Role.FFN_DOWN)
        self.mue_roles = {"w_gate": up, "w_up": up, "w_down": down}
        if not shared:
            self.mue_multipliers = {"ffn": "output_multiplier"}
            self.mue_branch = "ffn"
        self.w_gate = nn.Parameter(torch.empty(hidden_width, width))
        self.w_up = nn.Parameter(torch.empty(hidden_width, width))
        self.w_down = nn.Parameter(torch.empty(width, hidden_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for weight in self.parameters(recurse=False):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5 if self.init_std is None else self.init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d] to [..., d]."""
        hidden = F.silu(F.linear(x, self.w_gate)) * F.linear(x, self.w_up)
        y = F.linear(hidden, self.w_down)
        return y if self.output_multiplier == 1.0 else self.output_multiplier * y

    def extra_repr(self) -> str:
        """The sizes, for `print(module)`."""
        return f"{self.width}, hidden_width={self.hidden_width}"
