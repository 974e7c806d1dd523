"""The parts, sizes and activation memory of an MoE layer, as converters and balance callbacks see it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mue.moe.experts import Experts
from lightning_mue.moe.feed_forward import FeedForward
from lightning_mue.moe.router import Router


class MoEBase(nn.Module):
    """An MoE layer without its forward pass. `MoELayer` describes the attributes; `has_followed`: whether it ever had a mask."""

    router: Router
    experts: Experts
    shared: FeedForward | None
    shared_gate: nn.Linear | None
    width: int
    route_scale: float
    output_multiplier: float
    balances: tuple[str, ...]
    balance_scope: str
    bias_update_rate: float
    bias_update: str
    earlier_counts: Tensor | None
    pending_counts: Tensor | None
    token_masks: tuple[Tensor | None, ...]
    has_followed: bool

    @property
    def n_experts(self) -> int:
        """E, routed experts."""
        return self.router.n_experts

    @property
    def top_k(self) -> int:
        """K, routed experts per token."""
        return self.router.top_k

    @property
    def expert_width(self) -> int:
        """Hidden width of one routed expert."""
        return self.experts.expert_width

    @property
    def active_width(self) -> int:
        """A, the FFN width that a token passes through: top_k * expert_width + shared_width."""
        shared_width = 0 if self.shared is None else self.shared.hidden_width
        return self.top_k * self.expert_width + shared_width

    def mue_axes(self) -> dict[str, float]:
        """Sizes for a parameterization, where the layer is the whole model."""
        names = ("width", "n_experts", "top_k", "expert_width", "active_width")
        return {name: getattr(self, name) for name in names}

    def activation_memory(self, dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
        """Bytes per token that a training step keeps for the backward pass, by what they are for.

        "input", "pre_activations" and "routing" are the experts' (`grouped_ffn`): a backward pass needs at least 2d + 4Kh
        of them in bfloat16 for gated experts. "router" is its float32 logits with their logsumexp, the chosen ids and
        their gates, "shared" the shared expert's activations, "total" the sum. `dtype` is the GEMMs'.
        """
        parts = self.experts.activation_memory(self.top_k, dtype)
        parts["router"] = 4 * (self.n_experts + 1) + 12 * self.top_k
        if self.shared is not None:
            parts["shared"] = (4 if self.shared.w_gate is not None else 2) * self.shared.hidden_width * dtype.itemsize
        return {**parts, "total": sum(value for name, value in parts.items() if name != "total")}
