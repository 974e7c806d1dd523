"""The Mixture-of-Experts layer: router, routed experts, optional shared expert, balance.

Shape legend: T tokens, d width, h expert hidden width, E experts, K experts per token (top-k).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mue.checks import (
    mismatch,
    require_finite,
    require_non_negative,
    require_positive,
    require_size,
    type_error,
    value_error,
)
from lightning_mue.moe import autocast
from lightning_mue.moe.balance import global_load, load_balancing_loss, probability_sums
from lightning_mue.moe.balance_callbacks import balance_callbacks
from lightning_mue.moe.convert import pretrained, replacing, upcycling
from lightning_mue.moe.experts import Experts
from lightning_mue.moe.feed_forward import FeedForward
from lightning_mue.moe.masks import fit
from lightning_mue.moe.passes import KeepsPasses, is_training_pass
from lightning_mue.moe.router import Router, RoutingInfo
from lightning_mue.moe.settings import read_balance, require_consistent
from lightning_mue.parameterizations.applying.keeps_multipliers import KeepsMultipliers
from lightning_mue.parameterizations.reading.parameters import tag_roles
from lightning_mue.parameterizations.rules.roles import Role


class MoELayer(KeepsMultipliers, KeepsPasses, LightningModule):
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
        balance: "switch" (auxiliary loss), "sequence" (DeepSeek-V3's: each sequence by itself, of the scores normalized over
            experts, which for sigmoid scorings is no softmax: arXiv:2412.19437), "bias" (loss-free: needs the callback
            `LossFreeBalance`, which a layer trained alone brings along), "none", or a list of "bias" and a loss.
        balance_scope: Over which tokens the switch loss takes the load: "local" (this rank's micro-batch), "global" (all
            ranks' micro-batches; all micro-batches of an optimizer step with the callback `GlobalBatchBalance`) or
            "sequence" (each sequence by itself, then the mean over those with a token).
        aux_loss_coef: Weight of the auxiliary loss; None: 0.01 for "switch", 1e-4 for "sequence". With ``balance="bias"`` a
            given one adds the switch loss.
        z_loss_coef: Weight of the router z-loss.
        bias_update_rate: Step size of the balance bias; None: 0.001.
        bias_update: "proportional" (None) or "sign", as for `update_balance_bias`.
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
        aux_loss: The auxiliary losses of the training passes that are in no loss yet, in sum, 0-dim float32 with their graph;
            read again before the next training pass it is the same. 0 in evaluation mode and when nothing asks for it. A
            backward pass or an optimizer step drops those before it.
        last_routing: `RoutingInfo` of the last training pass (in evaluation mode: of the last pass), detached; None before.
        pending_counts: Assignments of each expert in the training passes since the last update of the bias, int64 [E], with
            "bias" only, else None. In the state dict where it is not zero.
        earlier_counts: The same for `GlobalBatchBalance`, else None; not in the state dict.
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
        balance: str | tuple[str, ...] = "switch",
        balance_scope: str = "local",
        aux_loss_coef: float | None = None,
        z_loss_coef: float = 0.0,
        bias_update_rate: float | None = None,
        bias_update: str | None = None,
        init_std: float | None = 0.02,
        router_init_std: float | None = None,
        backend: str = "auto",
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        **router: Any,
    ) -> None:
        super().__init__()
        settings = read_balance(balance, balance_scope, aux_loss_coef, bias_update_rate, bias_update)
        self.balances, self.balance_scope, self.aux_loss_coef, self.bias_update_rate, self.bias_update = settings
        require_non_negative(z_loss_coef=z_loss_coef)
        require_finite(route_scale=route_scale)
        require_non_negative(router_init_std=0.0 if router_init_std is None else router_init_std)
        require_positive(width=width, expert_width=expert_width)
        require_size(shared_width=shared_width)
        self.save_hyperparameters(ignore=["optimizer"])
        router_std = init_std if router_init_std is None else router_init_std
        self.router = Router(width, n_experts, top_k, init_std=router_std, backend=backend, **router)
        require_consistent(self.router.choice, self.balances, shared_width, shared_gate=shared_gate)
        network: dict[str, Any] = {"activation": activation, "bias": bias, "init_std": init_std}
        self.experts = Experts(width, expert_width, n_experts, backend=backend, **network)
        self.shared = FeedForward(width, shared_width, shared=True, **network) if shared_width else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if shared_gate else None
        if self.shared_gate is not None:
            self.shared_gate.mue_roles = {"weight": Role.ROUTER}  # type: ignore[assignment]
        self.width, self.route_scale, self.output_multiplier = width, float(route_scale), 1.0
        self.balance, self.z_loss_coef, self._make_optimizer = balance, z_loss_coef, optimizer
        self.start_passes()
        tag_roles(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps [..., d] to [..., d], in x's dtype.

        Args:
            x: Tokens.
            mask: bool [...], False for padding: such a token passes no routed expert (its output is the shared expert's,
                else zero) and does not count in the load or in `aux_loss`. None: the mask of the model's forward counts,
                where it is followed (`follow_attention_mask`, `real_tokens`), and changes no output; else all tokens count.

        Raises:
            ValueError: The last dimension of x is not `width`, or the mask has another shape than x's tokens.
            TypeError: The mask is not boolean.
        """
        if x.shape[-1] != self.width:
            raise value_error("x", found=f"shape {tuple(x.shape)}", expected=f"[..., width={self.width}]")
        x_Td = x.reshape(-1, self.width)
        sequences = max(math.prod(x.shape[:-2]), 1) if self.balance_scope == "sequence" else 1
        followed = self.token_masks[-1] if self.token_masks and mask is None else None
        counted_T = None if followed is None else fit(followed.to(x.device), x.shape[:-1])
        routing = self.router(x_Td, _flat(mask, x), n_sequences=sequences, counted_T=counted_T)
        scale = self.output_multiplier
        if self.router.gate == "sqrt" and self.shared is not None:
            scale *= math.sqrt(0.5)
        # Scaling the K gates of a token is cheaper than scaling its d outputs.
        scaled = replace(routing, gates=routing.gates * (scale * self.route_scale))
        y_Td = self.experts(x_Td, scaled, None if self.shared is None else lambda: scale * self._shared_output(x_Td))
        y: Tensor = y_Td.view_as(x)
        self._keep(routing, sequences, y, reentrant=x.requires_grad and not torch.is_grad_enabled())
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

    def _keep(self, routing: RoutingInfo, sequences: int, y: Tensor, *, reentrant: bool) -> None:
        """Keeps what a pass leaves behind."""
        has_loss = bool(self.aux_loss_coef or self.z_loss_coef)
        if self.training and reentrant and has_loss:
            _warn_of_reentrant_checkpoint()
        if is_training_pass(self):
            # The loss is computed when it is read: so it is not part of what activation checkpointing runs again, when the
            # model's mask and the earlier counts are others. Compiled code computes it where there is no mask to differ.
            load = self._load(routing) if has_loss and self.aux_loss_coef else None
            loss = partial(self._loss_of, routing, load, sequences) if has_loss else None
            now = torch.compiler.is_compiling() and not self.has_followed
            self.keep_pass(routing, loss() if loss is not None and now else loss, y)
        elif torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            self._latest = routing.detach()

    def _load(self, routing: RoutingInfo) -> tuple[Tensor, Tensor]:
        """The load, over all ranks where asked for, that `load_balancing_loss` takes."""
        if self.balance_scope == "global":
            return global_load(routing.counts, self.earlier_counts, self.top_k)
        counts_NE = routing.sequence_counts
        assert counts_NE is not None
        return counts_NE, counts_NE.sum(-1) / self.top_k

    def _loss_of(self, routing: RoutingInfo, load: tuple[Tensor, Tensor] | None, sequences: int) -> Tensor:
        loss = routing.logits.new_zeros(())
        if load is not None:
            sums_NE = routing.probability_sum
            sigmoid = "sequence" in self.balances and self.router.scoring.startswith("sigmoid")
            if sums_NE is None or sigmoid:
                scoring = self.router.scoring if sigmoid else "softmax"
                with autocast.disabled(routing.logits.device.type):
                    sums_NE = probability_sums(routing.logits, scoring, sequences, routing.mask)
            loss = loss + self.aux_loss_coef * load_balancing_loss(sums_NE, *load)
        return loss + self.z_loss_coef * routing.mean_z() if self.z_loss_coef else loss


@cache
def _warn_of_reentrant_checkpoint() -> None:
    found = (
        "a MoELayer in training mode whose tokens require gradients while gradients are off, as reentrant activation "
        "checkpointing does: its aux_loss has no gradient"
    )
    do = "Use checkpoint(..., use_reentrant=False)."
    warnings.warn(mismatch("use_reentrant", found=found, expected="False", do=do), stacklevel=2)


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
