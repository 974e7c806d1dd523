"""What else computes a layer of experts on a CPU, on the weights and the routing of `lightning_mue.moe.Experts`.

Shape legend: T tokens, d width, h expert hidden width, E experts, K experts per token, S = T K rows sorted by expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mue.moe import Experts, RoutingInfo


class Loop(nn.Module):
    """What one writes by hand: sort, a GEMM for each expert, index_add."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_Td: Tensor, routing: RoutingInfo) -> Tensor:
        """Return [T, d], of x's dtype."""
        order_S = routing.expert_ids.flatten().argsort(stable=True)
        tokens_S = order_S // routing.expert_ids.shape[1]
        rows = x_Td[tokens_S].split(routing.counts.tolist())
        weights = (self.experts.w_gate, self.experts.w_up, self.experts.w_down)
        out = [(F.silu(r @ g.T) * (r @ u.T)) @ d.T for r, g, u, d in zip(rows, *weights, strict=True)]
        weighted_Sd = torch.cat(out) * routing.gates.flatten()[order_S, None].to(x_Td.dtype)
        return torch.zeros_like(x_Td).index_add(0, tokens_S, weighted_Sd)


class Transformers(nn.Module):
    """The experts of transformers' Mixtral.

    Args:
        experts: Whose weights are copied.
        implementation: "grouped_mm" or "eager", as transformers names them.
    """

    def __init__(self, experts: Experts, implementation: str) -> None:
        super().__init__()
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(
            hidden_size=experts.width,
            intermediate_size=experts.expert_width,
            num_local_experts=experts.n_experts,
            hidden_act="silu",
        )
        config._experts_implementation = implementation
        self.experts = MixtralExperts(config).to(experts.w_up.dtype)
        with torch.no_grad():
            self.experts.gate_up_proj.copy_(torch.cat([experts.w_gate, experts.w_up], dim=1))
            self.experts.down_proj.copy_(experts.w_down)

    def forward(self, x_Td: Tensor, routing: RoutingInfo) -> Tensor:
        """Return [T, d], of x's dtype."""
        y_Td: Tensor = self.experts(x_Td, routing.expert_ids, routing.gates.to(x_Td.dtype))
        return y_Td
