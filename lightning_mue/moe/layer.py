"""The Mixture-of-Experts layer: router, routed experts, optional shared expert, balance.

Shape legend: T tokens, d width, E experts, K experts per token (top-k).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mue.moe._checks import require_choice, require_non_negative, require_positive
from lightning_mue.moe.balance import LossFreeBalance, router_z_loss, switch_loss
from lightning_mue.moe.experts import Experts
from lightning_mue.moe.ffn import SwiGLU
from lightning_mue.moe.router import Router, RoutingInfo

BALANCES = ("none", "switch", "bias")


class MoELayer(LightningModule):
    """``y = output_multiplier * (route_scale * sum_i gate_i E_i(x) + shared(x))``, a drop-in for a dense FFN.

    With ``gate="sqrt"`` and a shared expert, both terms are also multiplied by sqrt(1/2) (arXiv:2603.28743). Add
    `aux_loss` to the loss of the model that holds the layer; the layer logs nothing while nested. By itself it is a
    regression model that a Trainer can fit to batches ``(x, target)``.

    Args:
        width: d, size of the input and of the output.
        expert_width: Hidden width of one routed expert.
        n_experts: E, routed experts.
        top_k: K, routed experts per token.
        shared_width: Hidden width of the shared expert that every token passes; 0 for none.
        scoring: As for `Router`.
        gate: As for `Router`, "linear" or "sqrt".
        route_scale: Constant multiplier of the routed sum.
        balance: "switch" (auxiliary loss), "bias" (loss-free: needs the callback `LossFreeBalance`, which a layer
            trained alone brings along) or "none".
        aux_loss_coef: Weight of the Switch loss, used when `balance` is "switch".
        z_loss_coef: Weight of the router z-loss.
        bias_update_rate: Step size of the balance bias, used when `balance` is "bias".
        init_std: Standard deviation of the initial weights; None: ``fan_in^-1/2`` of each.
        router_init_std: The router's; `init_std` if None.
        n_groups: Groups of experts with equally many active experts each, as for `Router`; 1: free choice.
        optimizer: For training alone: from parameters to an optimizer; AdamW with learning rate 1e-3 if None.

    Attributes:
        aux_loss: 0-dim float32 of the last forward pass, with its graph; 0 in evaluation and when nothing asks for it.
        last_routing: `RoutingInfo` of the last forward pass, detached; None before the first. Neither attribute is
            part of the state dict or of a copy.
        output_multiplier: Constant forward multiplier, 1 unless a parameterization sets it.

    Raises:
        ValueError: An argument is out of range; the message names it.

    Example:
        >>> layer = MoELayer(width=16, expert_width=32, n_experts=4, top_k=2)
        >>> layer(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 16])
        >>> int(layer.last_routing.counts.sum())
        20
    """

    mue_multipliers: ClassVar[dict[str, str]] = {"ffn": "output_multiplier", "route": "route_scale"}
    mue_branch = "ffn"

    def __init__(
        self,
        width: int,
        expert_width: int,
        n_experts: int,
        top_k: int = 2,
        *,
        shared_width: int = 0,
        scoring: str = "topk-softmax",
        gate: str = "linear",
        route_scale: float = 1.0,
        balance: str = "switch",
        aux_loss_coef: float = 0.01,
        z_loss_coef: float = 0.0,
        bias_update_rate: float = 0.001,
        init_std: float | None = 0.02,
        router_init_std: float | None = None,
        n_groups: int = 1,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    ) -> None:
        super().__init__()
        require_choice("balance", balance, BALANCES)
        require_non_negative(
            shared_width=shared_width,
            aux_loss_coef=aux_loss_coef,
            z_loss_coef=z_loss_coef,
            bias_update_rate=bias_update_rate,
        )
        require_positive(width=width, expert_width=expert_width)
        self.save_hyperparameters(ignore=["optimizer"])
        router_std = init_std if router_init_std is None else router_init_std
        self.router = Router(
            width, n_experts, top_k, scoring=scoring, gate=gate, init_std=router_std, n_groups=n_groups
        )
        self.experts = Experts(width, expert_width, n_experts, init_std=init_std)
        self.shared = SwiGLU(width, shared_width, shared=True, init_std=init_std) if shared_width else None
        self.width, self.route_scale, self.output_multiplier = width, float(route_scale), 1.0
        self.balance, self.bias_update_rate = balance, bias_update_rate
        self.aux_loss_coef, self.z_loss_coef = (aux_loss_coef if balance == "switch" else 0.0), z_loss_coef
        self.last_routing: RoutingInfo | None = None
        self.aux_loss = torch.zeros(())
        self._make_optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., d] to [..., d], in x's dtype.

        Raises:
            ValueError: The last dimension of x is not `width`.
        """
        if x.shape[-1] != self.width:
            raise ValueError(f"x has shape {tuple(x.shape)}, but its last dimension must be width={self.width}.")
        x_Td = x.reshape(-1, self.width)
        routing = self.router(x_Td)
        scale = self.output_multiplier
        if self.router.gate == "sqrt" and self.shared is not None:
            scale *= math.sqrt(0.5)
        # Scaling the K gates of a token costs nothing beside scaling its d outputs.
        scaled = RoutingInfo(
            routing.expert_ids, routing.gates * (scale * self.route_scale), routing.logits, routing.counts
        )
        y_Td = self.experts(x_Td, scaled)
        if self.shared is not None:
            y_Td = (y_Td + scale * self.shared(x_Td)).to(x.dtype)
        self.aux_loss = self._auxiliary_loss(routing)
        self.last_routing = routing.detach()
        y: Tensor = y_Td.view_as(x)
        return y

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

    def mue_axes(self) -> dict[str, float]:
        """Sizes for a parameterization, where the layer is the whole model."""
        names = ("width", "n_experts", "top_k", "expert_width", "active_width")
        return {name: getattr(self, name) for name in names}

    @property
    def active_width(self) -> int:
        """A, the FFN width that a token passes through: top_k * expert_width + shared_width."""
        shared_width = 0 if self.shared is None else self.shared.hidden_width
        return self.router.top_k * self.experts.expert_width + shared_width

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean squared error to the target, plus the auxiliary loss."""
        x, target = batch
        loss = F.mse_loss(self(x), target)
        self.log("train/loss", loss, prog_bar=True)
        return loss + self.aux_loss

    def configure_optimizers(self) -> Optimizer:
        """The optimizer given to the constructor, or AdamW."""
        if self._make_optimizer is not None:
            return self._make_optimizer(self.parameters())
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def configure_callbacks(self) -> list[Callback]:
        """The balance update, where the layer needs it."""
        return [LossFreeBalance()] if self.balance == "bias" else []

    def _auxiliary_loss(self, routing: RoutingInfo) -> Tensor:
        loss = routing.logits.new_zeros(())
        if self.training and self.aux_loss_coef:
            loss = loss + self.aux_loss_coef * switch_loss(routing.logits, routing.counts, self.router.top_k)
        if self.training and self.z_loss_coef:
            loss = loss + self.z_loss_coef * router_z_loss(routing.logits)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        # A tensor with a graph can be neither copied nor pickled, and a copy has not run anything yet.
        return {**super().__getstate__(), "last_routing": None, "aux_loss": torch.zeros(())}
