"""Ten faults that are put into a healthy run at a given step, each as a callback that names the role and layer it spoils.

Shape legend: B batch, S positions, N heads, k head dimension, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_mue.models.transformer import AttentionCore
from lightning_mue.moe import MoELayer
from lightning_mue.moe.router import Router


class Fault(Callback):
    """A fault that begins with optimizer step ``at``.

    Attributes:
        role: What a person must be pointed at: a substring of the tag or role that an indicator has to name.
        layer: Label of the layer, or None where the fault is in all or none of them.
    """

    role = ""
    layer: str | None = None

    def __init__(self, at: int) -> None:
        self.at = at

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Called once, before the batch of step ``at``."""

    def during(self, trainer: Trainer, model: LightningModule, batch: Any) -> None:
        """Called before each batch from step ``at`` on."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins or goes on."""
        if trainer.global_step == self.at:
            self.begin(trainer, pl_module)
        if trainer.global_step >= self.at:
            self.during(trainer, pl_module, batch)


class LearningRate(Fault):
    """All learning rates times 8."""

    role = "updates"

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Raises what the scheduler multiplies."""
        for config in trainer.lr_scheduler_configs:
            config.scheduler.base_lrs = [8 * lr for lr in config.scheduler.base_lrs]
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] *= 8


class _FasterWeights(Fault):
    """Some weights move ``factor`` times as far in each step, as they do with that learning rate."""

    factor: float

    def chosen(self, model: LightningModule) -> list[Tensor]:
        """The weights."""
        raise NotImplementedError

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Keeps the weights as they were."""
        self._before = [w.detach().clone() for w in self.chosen(pl_module)] if trainer.global_step >= self.at else []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Stretches their step."""
        for before, w in zip(self._before, self.chosen(pl_module), strict=False):
            w.data.copy_(before + self.factor * (w.data - before))


class RouterRate(_FasterWeights):
    """Router learning rate times 32."""

    role, factor = "router", 32.0

    def chosen(self, model: LightningModule) -> list[Tensor]:
        """All router weights."""
        return [m.weight for m in model.modules() if isinstance(m, Router)]


class EmbeddingRate(_FasterWeights):
    """Embedding learning rate times 64."""

    role, factor = "embedding", 64.0

    def chosen(self, model: LightningModule) -> list[Tensor]:
        """The token embedding."""
        return [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]


class NoBalance(Fault):
    """No auxiliary loss: nothing keeps the experts' load even."""

    role = "rout"

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Takes the loss away."""
        for layer in model.modules():
            if isinstance(layer, MoELayer):
                layer.aux_loss_coef = 0.0


class _SpoiltAttention(Fault):
    """Another forward of the attention cores (or of one of them)."""

    role = "attention"

    def forward_of(self, core: AttentionCore) -> Callable[..., Tensor]:
        """The forward that takes its place."""
        raise NotImplementedError

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Replaces it."""
        for core in (m for m in model.modules() if isinstance(m, AttentionCore)):
            core.forward = self.forward_of(core)  # type: ignore[method-assign]


class LowPrecisionSoftmax(_SpoiltAttention):
    """Softmax in bfloat16 and no QK-norm."""

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Takes the norms of queries and keys away too."""
        super().begin(trainer, model)
        for module in model.modules():
            if hasattr(module, "q_norm"):
                module.q_norm = module.k_norm = nn.Identity()

    def forward_of(self, core: AttentionCore) -> Callable[..., Tensor]:
        """Attention whose logits and weights are bfloat16."""

        def forward(q_BNSk: Tensor, k_BNSk: Tensor, v_BNSk: Tensor) -> Tensor:
            logits = (core.scale * q_BNSk @ k_BNSk.mT).bfloat16()
            hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            return logits.masked_fill(hidden, float("-inf")).softmax(-1).to(v_BNSk.dtype) @ v_BNSk

        return forward


class BiasedRounding(_SpoiltAttention):
    """The attention output is rounded away from zero to 3 bits of mantissa: an error with a sign, which adds up."""

    def forward_of(self, core: AttentionCore) -> Callable[..., Tensor]:
        """Attention with biased rounding; the gradient goes through as if there were none."""

        def forward(q_BNSk: Tensor, k_BNSk: Tensor, v_BNSk: Tensor) -> Tensor:
            y = F.scaled_dot_product_attention(q_BNSk, k_BNSk, v_BNSk, is_causal=True, scale=core.scale)
            mantissa, exponent = torch.frexp(y.detach().float())
            rounded = torch.ldexp(torch.sign(mantissa) * torch.ceil(mantissa.abs() * 8) / 8, exponent)
            return y + (rounded.to(y.dtype) - y.detach())

        return forward


class CorruptShard(Fault):
    """60 steps of data in which one of eight sequences, then more and more, is noise."""

    role = "loss"

    def during(self, trainer: Trainer, model: LightningModule, batch: Any) -> None:
        """Overwrites sequences, all of them from 40 steps on."""
        since = trainer.global_step - self.at
        if since < 60:
            tokens = batch["tokens"]
            n = min(len(tokens), max(1, len(tokens) // 8 + since * len(tokens) // 40))
            generator = torch.Generator().manual_seed(trainer.global_step)
            tokens[:n] = torch.randint(0, 256, tokens[:n].shape, generator=generator).to(tokens)


class NotANumber(Fault):
    """A NaN in one gradient of one rank, at one step."""

    role = "gradient"

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Puts it into the last weight that has a gradient."""
        if trainer.global_step == self.at and trainer.global_rank == 0:
            [p.grad for p in pl_module.parameters() if p.grad is not None][-1].view(-1)[0] = float("nan")


class DeadExpert(Fault):
    """No token reaches expert 0 of the second layer any more."""

    role, layer = "rout", "01"

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Puts a bias on the choice, as a broken balance would."""
        router = [m for m in model.modules() if isinstance(m, Router)][1]
        router.balance_bias = torch.zeros(router.n_experts)
        router.balance_bias[0] = -1e9


class Beta2(Fault):
    """Adam's second beta 0.999999: the step no longer follows the gradient's size."""

    role = "updates"

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Sets it in every group that has betas."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (group["betas"][0], 0.999999)


FAULTS: Mapping[str, type[Fault]] = {
    "lr x 8": LearningRate,
    "router lr x 32": RouterRate,
    "no auxiliary loss": NoBalance,
    "bf16 softmax, no QK-norm": LowPrecisionSoftmax,
    "biased rounding": BiasedRounding,
    "corrupt shard": CorruptShard,
    "NaN on one rank": NotANumber,
    "dead expert": DeadExpert,
    "embedding lr x 64": EmbeddingRate,
    "beta2 too high": Beta2,
}
