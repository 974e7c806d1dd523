"""The routed experts: E SwiGLU networks held as three stacked weights, dropless.

Shape legend: T tokens, d width, h expert hidden width, E experts, K experts per token (top-k).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_mue.moe import _autocast
from lightning_mue.moe._checks import require_non_negative, require_positive
from lightning_mue.moe.dispatch import plan_dispatch
from lightning_mue.moe.grouped import grouped_swiglu
from lightning_mue.moe.router import RoutingInfo
from lightning_mue.parameterizations.roles import Role


class Experts(nn.Module):
    """E SwiGLU experts; every token gets all of the experts it was routed to, no token is dropped.

    ``y_t = sum_k gates[t, k] * E_i(x_t)`` with ``i = expert_ids[t, k]`` and
    ``E_i(x) = (silu(x w_gate_i^T) * (x w_up_i^T)) w_down_i^T``. GEMMs run in x's dtype (under autocast, in
    autocast's); the sum over k is taken in float32. Repeating a call on as many
    threads gives the same bits.

    Args:
        width: d, size of the input and of the output.
        expert_width: h, hidden width of one expert.
        n_experts: E.
        init_std: Standard deviation of the initial weights; None: ``fan_in^-1/2`` of each.

    Raises:
        ValueError: A size is below 1, or `init_std` is negative.
    """

    mue_roles: ClassVar[dict[str, Role]] = {
        "w_gate": Role.EXPERT_UP,
        "w_up": Role.EXPERT_UP,
        "w_down": Role.EXPERT_DOWN,
    }

    def __init__(self, width: int, expert_width: int, n_experts: int, *, init_std: float | None = 0.02) -> None:
        super().__init__()
        require_positive(width=width, expert_width=expert_width, n_experts=n_experts)
        require_non_negative(init_std=init_std or 0.0)
        self.width, self.expert_width, self.n_experts, self.init_std = width, expert_width, n_experts, init_std
        self.w_gate = nn.Parameter(torch.empty(n_experts, expert_width, width))
        self.w_up = nn.Parameter(torch.empty(n_experts, expert_width, width))
        self.w_down = nn.Parameter(torch.empty(n_experts, width, expert_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        for weight in self.parameters(recurse=False):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5 if self.init_std is None else self.init_std)

    def forward(self, x_Td: Tensor, routing: RoutingInfo) -> Tensor:
        """Apply to each token the experts it was routed to.

        Args:
            x_Td: [T, d], of the weights' dtype unless autocast is on.
            routing: As `Router` returns it. Gradients flow to its gates.

        Returns:
            [T, d], of x's dtype. An expert without tokens gets a zero gradient.

        Raises:
            TypeError: x and the weights differ in dtype and autocast is off.
        """
        dtype = _autocast.compute_dtype(x_Td) or x_Td.dtype
        if dtype != self.w_gate.dtype and _autocast.compute_dtype(x_Td) is None:
            raise TypeError(
                f"x is {dtype}, but the experts' weights are {self.w_gate.dtype}. Convert one of them, or run under "
                "torch.autocast (Lightning: Trainer(precision='bf16-mixed'))."
            )
        plan = plan_dispatch(routing.expert_ids, routing.counts)
        weights = [w.to(dtype) for w in (self.w_gate, self.w_up, self.w_down)]
        gates_TK = routing.gates.to(torch.promote_types(dtype, torch.float32))
        y_Td: Tensor = grouped_swiglu(x_Td.to(dtype), gates_TK, *weights, plan.order, plan.inverse, routing.counts)[0]
        return y_Td.to(x_Td.dtype)

    def extra_repr(self) -> str:
        """The sizes, for `print(module)`."""
        return f"{self.width}, expert_width={self.expert_width}, n_experts={self.n_experts}"
