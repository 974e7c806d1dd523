"""Ten faults that are put into a healthy run at a given step, each as a callback that names the role and layer it spoils.

Shape legend: B batch, S positions, N heads, k head dimension, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_mue.callbacks import MuECallback
from lightning_mue.models.transformer import AttentionCore
from lightning_mue.moe import MoELayer
from lightning_mue.moe.router import Router


class Fault(Callback):
    """A fault that begins with optimizer step ``at``, and grows to its full size within ``ramp`` steps if it can.

    Attributes:
        role: What a person must be pointed at: a regular expression that indicator or role of a symptom has to match.
        layer: Label of the layer, or None where the fault is in all or none of them.
    """

    role = ""
    layer: str | None = None

    def __init__(self, at: int, ramp: int = 1) -> None:
        self.at, self.ramp = at, ramp

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Called once, before the batch of step ``at``."""

    def during(self, trainer: Trainer, model: LightningModule, batch: Any) -> None:
        """Called before each batch from step ``at`` on."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begins or goes on."""
        self.size = min(1.0, (trainer.global_step - self.at + 1) / self.ramp)  # (0, 1]
        if trainer.global_step == self.at:
            self.begin(trainer, pl_module)
        if trainer.global_step >= self.at:
            self.during(trainer, pl_module, batch)


class _Rate(Fault):
    """The learning rate of some roles grows to ``factor`` times what it was, as by a wrong factor in the plan."""

    factor: float
    roles: str = ".*"

    def begin(self, trainer: Trainer, model: LightningModule) -> None:
        """Keeps the right plan."""
        mue = next(c for c in trainer.callbacks if isinstance(c, MuECallback))  # type: ignore[attr-defined]
        self._steps = mue._steps
        self._plans = [step.plan for step in self._steps]

    def during(self, trainer: Trainer, model: LightningModule, batch: Any) -> None:
        """Has the optimizer's groups made from the wrong plan."""
        factor = self.factor**self.size
        for step, plan in zip(self._steps, self._plans, strict=True):
            entries = [
                replace(e, lr=e.lr * factor) if re.fullmatch(self.roles, str(e.role)) else e for e in plan.parameters
            ]
            step.plan, step._shape = replace(plan, parameters=tuple(entries)), []  # no shape: split again


class LearningRate(_Rate):
    """All learning rates times 8."""

    role, factor = "updates", 8.0


class RouterRate(_Rate):
    """Router learning rate times 32."""

    role, factor, roles = "router", 32.0, "router"


class EmbeddingRate(_Rate):
    """Embedding learning rate times 64."""

    role, factor, roles = "embedding", 64.0, "embedding"


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
    """A shard of noise: more and more sequences are drawn from it, from one in 8 batches of 16 to half of them.

    The share grows by equal factors, as where a shuffled reader comes to a bad stretch.
    """

    role = "data"

    def during(self, trainer: Trainer, model: LightningModule, batch: Any) -> None:
        """Overwrites each sequence with the shard's probability."""
        tokens = batch["tokens"]
        generator = torch.Generator().manual_seed(1000 * torch.initial_seed() + trainer.global_step)
        drawn = torch.rand(len(tokens), generator=generator) < 0.5 * 64 ** (self.size - 1)
        noise = torch.randint(0, 256, tokens.shape, generator=generator).to(tokens)
        tokens[drawn] = noise[drawn]


class NotANumber(Fault):
    """A NaN in one gradient of one rank, at one step."""

    role = "gradient"

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Puts it into the last weight that has a gradient."""
        if trainer.global_step == self.at and trainer.global_rank == 0:
            [p.grad for p in pl_module.parameters() if p.grad is not None][-1].view(-1)[0] = float("nan")


class DeadExpert(Fault):
    """Fewer and fewer tokens, in the end none, reach expert 0 of the second layer."""

    role, layer = "rout", "01"

    def during(self, trainer: Trainer, model: LightningModule, batch: Any) -> None:
        """Puts a growing bias on the choice, as a broken balance would; the scores are shares, 1 is beyond all of them."""
        router = [m for m in model.modules() if isinstance(m, Router)][1]
        router.balance_bias = torch.zeros(router.n_experts)
        router.balance_bias[0] = -1.01 * self.size


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
