"""The Mixture-of-Experts layer: router, routed experts, optional shared expert, balance.

Shape legend: T tokens, d width, h expert hidden width, E experts, K experts per token (top-k).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mue.checks import (
    mismatch,
    require_choice,
    require_finite,
    require_non_negative,
    require_positive,
    require_size,
    type_error,
    value_error,
)
from lightning_mue.moe.balance import SCOPES, global_load, load_balancing_loss
from lightning_mue.moe.balance_callbacks import balance_callbacks
from lightning_mue.moe.base import MoEBase
from lightning_mue.moe.convert import pretrained, replacing, upcycling
from lightning_mue.moe.experts import Experts
from lightning_mue.moe.feed_forward import FeedForward
from lightning_mue.moe.router import Router, RoutingInfo
from lightning_mue.parameterizations.applying.keeps_multipliers import KeepsMultipliers
from lightning_mue.parameterizations.reading.parameters import tag_roles
from lightning_mue.parameterizations.rules.roles import Role

BALANCES = ("none", "switch", "bias")


class MoELayer(KeepsMultipliers, MoEBase, LightningModule):
    """``y = output_multiplier * (route_scale * sum_i gate_i E_i(x) + shared(x))``, a drop-in for a dense FFN.

    With ``gate="sqrt"`` and a shared expert, both terms are also multiplied by sqrt(1/2) (arXiv:2603.28743; docs/theory.md
    section 5.3). Add `aux_loss` to the loss of the model that holds the layer; the layer logs nothing while nested. By
    itself it is a regression model that a Trainer can fit to batches ``(x, target)``.

    Args:
        width: d, size of the input and of the output.
        expert_width: h, hidden width of one routed expert.
        n_experts: E, routed experts.
        top_k: K, routed experts per token (in expert choice: on average).
        activation: Of every expert, shared ones too; as for `FeedForward`.
        bias: Whether every expert has biases.
        shared_width: Hidden width of the shared expert that every token passes; 0 for none. Several shared experts are
            one of their total width.
        shared_gate: Whether the shared expert's output is multiplied by ``sigmoid(x w^T)`` (Qwen2-MoE).
        route_scale: Constant multiplier of the routed sum.
        balance: "switch" (auxiliary loss), "bias" (loss-free: needs the callback `LossFreeBalance`, which a layer
            trained alone brings along) or "none".
        balance_scope: Over which tokens the switch loss takes the load: "local" (this rank's micro-batch), "global" (all
            ranks' micro-batches; all micro-batches of an optimizer step with the callback `GlobalBatchBalance`) or
            "sequence" (each sequence by itself, then the mean over those with a token: arXiv:2412.19437).
        aux_loss_coef: Weight of the switch loss, used when `balance` is "switch".
        z_loss_coef: Weight of the router z-loss.
        bias_update_rate: Step size of the balance bias, used when `balance` is "bias".
        init_std: Standard deviation of the initial weights; None: ``fan_in^-1/2`` of each.
        router_init_std: Standard deviation of the router's initial weight; None: `init_std`.
        backend: Of the kernels: "auto", "triton", "grouped_mm" or "torch"; equal up to rounding.
        optimizer: For training alone: from parameters to an optimizer; AdamW with learning rate 1e-3 if None.
        **router: Further options of the router: `scoring`, `gate`, `choice`, `jitter`, `n_groups`; see `Router`.

    Attributes:
        router: Chooses the experts of each token.
        experts: The routed experts.
        shared: The shared expert, or None.
        shared_gate: The linear map [1, d] of its gate, or None.
        aux_loss: 0-dim float32 of the last forward pass, with its graph; 0 in evaluation and when nothing asks for it.
        last_routing: `RoutingInfo` of the last forward pass, detached; None before the first.
        earlier_counts: Assignments of each expert in earlier micro-batches of this optimizer step, int64 [E], or None. This
            and the two before it are neither in the state dict nor in a copy.
        output_multiplier: Constant forward multiplier, 1 unless a parameterization sets it.

    Raises:
        TypeError: An argument has the wrong type, or is unknown.
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
        activation: str = "swiglu",
        bias: bool = False,
        shared_width: int = 0,
        shared_gate: bool = False,
        route_scale: float = 1.0,
        balance: str = "switch",
        balance_scope: str = "local",
        aux_loss_coef: float = 0.01,
        z_loss_coef: float = 0.0,
        bias_update_rate: float = 0.001,
        init_std: float | None = 0.02,
        router_init_std: float | None = None,
        backend: str = "auto",
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        **router: Any,
    ) -> None:
        super().__init__()
        require_choice("balance", balance, BALANCES)
        require_choice("balance_scope", balance_scope, SCOPES)
        require_non_negative(aux_loss_coef=aux_loss_coef, z_loss_coef=z_loss_coef, bias_update_rate=bias_update_rate)
        require_finite(route_scale=route_scale)
        require_non_negative(router_init_std=0.0 if router_init_std is None else router_init_std)
        require_positive(width=width, expert_width=expert_width)
        require_size(shared_width=shared_width)
        self.save_hyperparameters(ignore=["optimizer"])
        router_std = init_std if router_init_std is None else router_init_std
        self.router = Router(width, n_experts, top_k, init_std=router_std, backend=backend, **router)
        _require_consistent(self.router.choice, balance, shared_width, shared_gate=shared_gate)
        network: dict[str, Any] = {"activation": activation, "bias": bias, "init_std": init_std}
        self.experts = Experts(width, expert_width, n_experts, backend=backend, **network)
        self.shared = FeedForward(width, shared_width, shared=True, **network) if shared_width else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if shared_gate else None
        if self.shared_gate is not None:
            self.shared_gate.mue_roles = {"weight": Role.ROUTER}  # type: ignore[assignment]
        self.width, self.route_scale, self.output_multiplier = width, float(route_scale), 1.0
        self.balance, self.balance_scope, self.bias_update_rate = balance, balance_scope, bias_update_rate
        self.aux_loss_coef, self.z_loss_coef = (aux_loss_coef if balance == "switch" else 0.0), z_loss_coef
        self.earlier_counts, self.last_routing, self.aux_loss = None, None, torch.zeros(())
        self._make_optimizer = optimizer
        tag_roles(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps [..., d] to [..., d], in x's dtype.

        Args:
            x: Tokens.
            mask: bool [...], False for padding: such a token passes no routed expert (its output is the shared expert's,
                else zero) and does not count in the load or in `aux_loss`. None: all tokens count.

        Raises:
            ValueError: The last dimension of x is not `width`, or the mask has another shape than x's tokens.
            TypeError: The mask is not boolean.
        """
        if x.shape[-1] != self.width:
            raise value_error("x", found=f"shape {tuple(x.shape)}", expected=f"[..., width={self.width}]")
        x_Td = x.reshape(-1, self.width)
        sequences = max(math.prod(x.shape[:-2]), 1) if self.balance_scope == "sequence" else 1
        routing = self.router(x_Td, _flat(mask, x), n_sequences=sequences)
        scale = self.output_multiplier
        if self.router.gate == "sqrt" and self.shared is not None:
            scale *= math.sqrt(0.5)
        # Scaling the K gates of a token is cheaper than scaling its d outputs.
        scaled = replace(routing, gates=routing.gates * (scale * self.route_scale))
        y_Td = self.experts(x_Td, scaled, None if self.shared is None else lambda: scale * self._shared_output(x_Td))
        self.aux_loss = self._auxiliary_loss(routing)
        has_aux_loss = bool(self.aux_loss_coef or self.z_loss_coef)
        if self.training and x.requires_grad and not torch.is_grad_enabled() and has_aux_loss:
            _warn_of_reentrant_checkpoint()
        self.last_routing = routing.detach()
        y: Tensor = y_Td.view_as(x)
        return y

    @classmethod
    def from_ffn(
        cls, module: nn.Module | Sequence[nn.Module], n_experts: int, top_k: int = 2, **arguments: Any
    ) -> MoELayer:
        """Makes a layer out of a dense feed-forward network: see `convert/upcycling.py` for the arguments."""
        return upcycling.moe_from_ffn(module, n_experts, top_k, layer_class=cls, **arguments)

    @classmethod
    def from_pretrained_block(cls, block: nn.Module, **arguments: Any) -> MoELayer:
        """Makes a layer that equals a transformers MoE block: see `convert/pretrained.py` for the arguments."""
        return pretrained.moe_from_transformers(block, layer_class=cls, **arguments)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean squared error to the target plus the auxiliary loss."""
        x, target = batch
        loss = F.mse_loss(self(x), target)
        self.log("train/loss", loss, prog_bar=True)
        return loss + self.aux_loss

    def configure_optimizers(self) -> Optimizer:
        """Makes the optimizer given to the constructor, or AdamW."""
        if self._make_optimizer is not None:
            return self._make_optimizer(self.parameters())
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def configure_callbacks(self) -> list[Callback]:
        """Returns the callbacks that `balance` needs."""
        return [*balance_callbacks([self])]

    def _shared_output(self, x_Td: Tensor) -> Tensor:
        assert self.shared is not None
        y_Td: Tensor = self.shared(x_Td)
        return y_Td if self.shared_gate is None else torch.sigmoid(self.shared_gate(x_Td)) * y_Td

    def _auxiliary_loss(self, routing: RoutingInfo) -> Tensor:
        loss = routing.logits.new_zeros(())
        if self.training and self.aux_loss_coef:
            loss = loss + self.aux_loss_coef * self._switch_loss(routing)
        if self.training and self.z_loss_coef:
            loss = loss + self.z_loss_coef * routing.mean_z()
        return loss

    def _switch_loss(self, routing: RoutingInfo) -> Tensor:
        counts_NE, probability_sum_NE = routing.sequence_counts, routing.probability_sum
        assert counts_NE is not None
        assert probability_sum_NE is not None
        if self.balance_scope == "global":
            load = global_load(routing.counts, self.earlier_counts, self.top_k)
            return load_balancing_loss(probability_sum_NE, *load)
        return load_balancing_loss(probability_sum_NE, counts_NE, counts_NE.sum(-1) / self.top_k)

    def __getstate__(self) -> dict[str, Any]:
        # A tensor with a graph can be neither copied nor pickled, and a copy has not run anything yet.
        return {**super().__getstate__(), "last_routing": None, "earlier_counts": None, "aux_loss": torch.zeros(())}


@cache
def _warn_of_reentrant_checkpoint() -> None:
    found = (
        "a MoELayer in training mode whose tokens require gradients while gradients are off, as reentrant activation "
        "checkpointing does: its aux_loss has no gradient"
    )
    do = "Use checkpoint(..., use_reentrant=False)."
    warnings.warn(mismatch("use_reentrant", found=found, expected="False", do=do), stacklevel=2)


def _require_consistent(choice: str, balance: str, shared_width: int, *, shared_gate: bool) -> None:
    if choice == "expert" and balance != "none":
        expected = "'none' with choice='expert', where every expert takes equally many tokens anyway"
        raise value_error("balance", found=repr(balance), expected=expected, do="Set balance='none'.")
    if shared_gate and not shared_width:
        expected = "a shared expert for shared_gate=True to multiply"
        raise value_error("shared_width", found=0, expected=expected, do="Give it a width.")


def _flat(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """The mask of x's tokens as [T]."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        expected = "torch.bool, True for tokens that count"
        raise type_error("mask", found=mask.dtype, expected=expected, do="Use mask.bool().")
    if mask.shape != x.shape[:-1]:
        expected = f"that of x's tokens, {tuple(x.shape[:-1])}"
        raise value_error("mask", found=f"shape {tuple(mask.shape)}", expected=expected)
    return mask.reshape(-1)


def moe_from_ffn(
    module: nn.Module | Sequence[nn.Module],
    n_experts: int,
    top_k: int = 2,
    *,
    layer_class: type[MoELayer] = MoELayer,
    **arguments: Any,
) -> MoELayer:
    """`MoELayer.from_ffn`, of `layer_class`."""
    return upcycling.moe_from_ffn(module, n_experts, top_k, layer_class=layer_class, **arguments)


def moe_from_transformers(block: nn.Module, *, layer_class: type[MoELayer] = MoELayer, **arguments: Any) -> MoELayer:
    """`MoELayer.from_pretrained_block`, of `layer_class`."""
    return pretrained.moe_from_transformers(block, layer_class=layer_class, **arguments)


def replace_moe_blocks(model: nn.Module, *, layer_class: type[MoELayer] = MoELayer, **arguments: Any) -> list[str]:
    """Replaces a model's MoE blocks by layers, in place: see `convert/replacing.py` for the arguments."""
    return replacing.replace_moe_blocks(model, layer_class=layer_class, **arguments)
