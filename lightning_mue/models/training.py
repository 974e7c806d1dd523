"""What the models share: MoE layers, optimizer and scheduler, clipping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_mue.moe import FeedForward, MoELayer, clip_grad_norm
from lightning_mue.moe.balance_callbacks import balance_callbacks
from lightning_mue.parameterizations.reading.parameters import tag_roles


class TrainsExperts(LightningModule):
    """Branches that are dense or MoE, and how a module that has them is trained.

    Attributes:
        width, depth, head_dim: Residual width d, number of blocks, head dimension.
        ffn_width: Hidden width of a dense FFN.
        n_experts, top_k, expert_width: Of every MoE layer.
        optimizer: From named parameters to an optimizer.
        scheduler: From an optimizer to a scheduler, or None.
    """

    width: int
    ffn_width: int
    n_experts: int
    top_k: int
    expert_width: int
    depth: int
    head_dim: int
    optimizer: Callable[[Any], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer], Any] | None

    def _ffn(
        self, has_experts: bool, activation: str, bias: bool, init_std: float | None, n_groups: int, **moe: Any
    ) -> nn.Module:
        """One FFN branch. Not in __init__: a layer made there would take the model's hyperparameters for its own."""
        if not has_experts:
            return FeedForward(self.width, self.ffn_width, activation=activation, bias=bias, init_std=init_std)
        return MoELayer(
            self.width,
            self.expert_width,
            self.n_experts,
            self.top_k,
            activation=activation,
            bias=bias,
            init_std=init_std,
            n_groups=n_groups,
            **moe,
        )

    def mue_axes(self) -> dict[str, float]:
        """Sizes for the parameterization; a dense model is the MoE of one expert."""
        moe = next(iter(self.moe_layers), None)
        return {
            "width": self.width,
            "depth": self.depth,
            "ffn_width": self.ffn_width,
            "expert_width": moe.expert_width if moe else self.ffn_width,
            "n_experts": moe.n_experts if moe else 1,
            "top_k": moe.top_k if moe else 1,
            "active_width": moe.active_width if moe else self.ffn_width,
            "head_dim": self.head_dim,
        }

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def with_auxiliary(self, loss: Tensor) -> Tensor:
        """The loss plus the auxiliary losses of the MoE layers, 0-dim."""
        auxiliary = [layer.aux_loss for layer in self.moe_layers]
        return loss + sum(auxiliary) if auxiliary else loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as Lightning does, and also parameters on several meshes, which torch refuses."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        several = len({getattr(p, "device_mesh", None) for p in params}) > 1
        if several and gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(params, gradient_clip_val, foreach=False)
        elif several and gradient_clip_val:
            clip_grad_norm(params, gradient_clip_val)
        else:
            self.clip_gradients(
                optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm
            )

    def configure_optimizers(self) -> Any:
        """Builds the optimizer from named parameters, and the scheduler, stepped every optimizer step."""
        tag_roles(self)  # sharding a parameter, or moving a DTensor, drops the attributes noted on it
        optimizer = self.optimizer(list(self.named_parameters()))
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        if getattr(scheduler, "total_steps", 0) is None:  # as WarmupDecay's
            scheduler.total_steps = self.trainer.estimated_stepping_batches  # type: ignore[attr-defined]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_callbacks(self) -> list[Any]:
        """Returns the callbacks that the balance of the MoE layers needs."""
        return [*balance_callbacks(self.moe_layers)]
