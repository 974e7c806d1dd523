"""MoELanguageModel: a decoder-only language model, dense or Mixture-of-Experts, as a LightningModule.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from lightning_mue.checks import require_choice, require_finite, require_non_negative
from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.kernels.backends import BACKENDS
from lightning_mue.kernels.routing.op import GATES, SCORINGS
from lightning_mue.models.transformer import Attention, Block, RotaryEmbedding, Transformer
from lightning_mue.moe import FeedForward, MoELayer, clip_grad_norm, parallelize_experts
from lightning_mue.moe.balance import SCOPES, balance_callbacks
from lightning_mue.moe.layer import BALANCES
from lightning_mue.moe.router import require_groups
from lightning_mue.parameterizations.applying.keeps_multipliers import KeepsMultipliers
from lightning_mue.parameterizations.reading.parameters import tag_roles

Batch = dict[str, Tensor]


def _default_optimizer(params: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)


class MoELanguageModel(KeepsMultipliers, LightningModule):
    """Pre-norm transformer language model: RMSNorm, RoPE, QK-norm, grouped-query attention, FFN or MoE.

    Batches are dicts ``{"tokens": int64 [B, S], "targets": int64 [B, S]}``. Logs ``train/loss`` (nats per token, the
    auxiliary losses not in it), ``train/bits_per_byte``, ``train/tokens_per_second`` and the same for ``val``.

    Args:
        vocab_size: Vocabulary V; 256 for bytes.
        context_length: Longest sequence.
        width: Residual width d.
        depth: Number of blocks L.
        n_heads: Query heads.
        n_kv_heads: Key/value heads (grouped-query attention); ``None``: as many as query heads.
        head_dim: Head dimension; ``None``: ``width / n_heads``.
        qk_norm: Normalize queries and keys per head.
        ffn_width: Hidden width of a dense FFN; ``None``: 8/3 width, rounded up to a multiple of 16.
        n_experts: Routed experts per MoE block; 0 makes every block dense.
        top_k: Experts active per token.
        expert_width: Hidden width of one expert; ``None``: ``ffn_width / top_k``, so that the active width is the dense one's.
        activation: Of every FFN and expert: ``swiglu``, ``geglu``, ``geglu-tanh``, ``gelu``, ``gelu-tanh``, ``relu`` or ``relu2``.
        shared_width: Hidden width of an expert that sees every token; 0 for none.
        shared_gate: Multiply the shared expert's output by a learned sigmoid gate (Qwen2-MoE).
        ffn_bias: Give every FFN and expert biases.
        n_expert_groups: Groups of experts, equally many active in each; divides ``n_experts`` and ``top_k``. 1: free choice.
        moe_every: Every how manieth block is an MoE block (the last one of each group).
        scoring: Router: ``softmax-topk``, ``topk-softmax``, ``sigmoid``, ``sigmoid-normalized``.
        gate: ``linear`` or ``sqrt`` (HyperP's SqrtGate).
        route_scale: Factor on the routed sum.
        jitter: Noise on the router's input in training: factors from ``[1 - jitter, 1 + jitter]``.
        balance: ``none``, ``switch`` (auxiliary loss) or ``bias`` (loss-free).
        balance_scope: Of the switch loss: ``local``, ``global`` or ``sequence``, as for ``MoELayer``.
        aux_loss_coef: Weight of the switch loss.
        z_loss_coef: Weight of the router z-loss.
        bias_update_rate: Step of the loss-free balance bias.
        tie_embeddings: Share embedding and unembedding.
        init_std: Standard deviation of matrices; ``None``: ``fan_in^-1/2`` of each.
        embedding_std: Standard deviation of the embedding.
        unembedding_std: Standard deviation of an untied unembedding.
        residual_multiplier: Factor on every residual branch.
        attention_multiplier: Scale of the attention logits; ``None``: ``head_dim^-1/2``.
        ffn_multiplier: Factor on the output of every FFN or MoE.
        output_multiplier: Factor on the logits.
        rope_base: Base of the rotary wavelengths.
        bytes_per_token: Mean bytes a token stands for, to report bits per byte.
        backend: Of the expert kernels: ``auto``, ``triton``, ``grouped_mm`` or ``torch``.
        optimizer: From parameters to an optimizer.
        scheduler: From an optimizer to a scheduler, stepped every optimizer step; one whose ``total_steps`` is ``None`` is
            told the trainer's number of steps.

    Raises:
        ValueError: For sizes that do not fit, naming the argument.
    """

    def __init__(
        self,
        vocab_size: int = 256,
        context_length: int = 256,
        width: int = 128,
        depth: int = 4,
        n_heads: int = 4,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = True,
        ffn_width: int | None = None,
        n_experts: int = 0,
        top_k: int = 2,
        expert_width: int | None = None,
        shared_width: int = 0,
        moe_every: int = 1,
        scoring: str = "topk-softmax",
        gate: str = "linear",
        route_scale: float = 1.0,
        balance: str = "switch",
        aux_loss_coef: float = 0.01,
        z_loss_coef: float = 0.0,
        bias_update_rate: float = 0.001,
        tie_embeddings: bool = False,
        init_std: float | None = None,
        embedding_std: float = 1.0,
        unembedding_std: float = 0.02,
        residual_multiplier: float = 1.0,
        attention_multiplier: float | None = None,
        ffn_multiplier: float = 1.0,
        output_multiplier: float = 1.0,
        rope_base: float = 10_000.0,
        bytes_per_token: float = 1.0,
        n_expert_groups: int = 1,
        activation: str = "swiglu",
        jitter: float = 0.0,
        balance_scope: str = "local",
        backend: str = "auto",
        shared_gate: bool = False,
        ffn_bias: bool = False,
        optimizer: OptimizerCallable = _default_optimizer,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.optimizer, self.scheduler = optimizer, scheduler
        self.vocab_size, self.context_length, self.bytes_per_token = vocab_size, context_length, bytes_per_token
        _check_sizes(self.hparams)
        _check_moe(self.hparams)
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        head_dim = self._head_dim(width, n_heads, n_kv_heads, head_dim)
        if n_experts and top_k > n_experts:
            raise ValueError(
                f"top_k: found {top_k} with n_experts={n_experts}; a token cannot use more experts than exist."
            )
        if n_experts:
            require_groups(n_expert_groups, n_experts, top_k, "n_expert_groups")
        self.width, self.depth, self.head_dim = width, depth, head_dim
        self.n_experts, self.top_k, self.shared_width = n_experts, top_k, shared_width
        self.ffn_width = -(-8 * width // 48) * 16 if ffn_width is None else ffn_width
        self.expert_width = max(1, self.ffn_width // max(1, top_k)) if expert_width is None else expert_width
        scale = head_dim**-0.5 if attention_multiplier is None else attention_multiplier

        def ffn(layer: int) -> nn.Module:
            if n_experts and (layer + 1) % moe_every == 0:
                made: nn.Module = MoELayer(
                    width,
                    self.expert_width,
                    n_experts,
                    top_k,
                    bias=ffn_bias,
                    shared_width=shared_width,
                    shared_gate=shared_gate,
                    scoring=scoring,
                    gate=gate,
                    route_scale=route_scale,
                    balance=balance,
                    aux_loss_coef=aux_loss_coef,
                    z_loss_coef=z_loss_coef,
                    bias_update_rate=bias_update_rate,
                    init_std=init_std,
                    n_groups=n_expert_groups,
                    activation=activation,
                    jitter=jitter,
                    balance_scope=balance_scope,
                    backend=backend,
                )
            else:
                made = FeedForward(width, self.ffn_width, activation=activation, bias=ffn_bias, init_std=init_std)
            made.output_multiplier = ffn_multiplier  # type: ignore[assignment]
            return made

        def attention() -> Attention:
            return Attention(width, n_heads, n_kv_heads, head_dim, qk_norm=qk_norm, scale=scale, init_std=init_std)

        self.transformer = Transformer(
            vocab_size,
            width,
            [Block(width, attention(), ffn(layer), residual_multiplier) for layer in range(depth)],
            RotaryEmbedding(head_dim, context_length, rope_base),
            tie_embeddings=tie_embeddings,
            embedding_std=unembedding_std if tie_embeddings else embedding_std,
            unembedding_std=unembedding_std,
            output_multiplier=output_multiplier,
        )
        tag_roles(self)
        self._clock: tuple[float, int] | None = None
        self._paused = 0.0

    @staticmethod
    def _head_dim(width: int, n_heads: int, n_kv_heads: int, head_dim: int | None) -> int:
        if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(
                f"n_kv_heads: found {n_kv_heads} with n_heads={n_heads}; every key/value head serves the same number of query "
                "heads, so n_kv_heads must divide n_heads."
            )
        if head_dim is not None:
            return head_dim
        if width % n_heads:
            raise ValueError(
                f"n_heads: width={width} is not divisible by n_heads={n_heads}. Choose a divisor, or give head_dim."
            )
        return width // n_heads

    def mue_axes(self) -> dict[str, float]:
        """Sizes for the parameterization; a dense model is the MoE of one expert."""
        moe = bool(self.moe_layers)
        return {
            "width": self.width,
            "depth": self.depth,
            "ffn_width": self.ffn_width,
            "expert_width": self.expert_width if moe else self.ffn_width,
            "n_experts": self.n_experts if moe else 1,
            "top_k": self.top_k if moe else 1,
            "active_width": self.top_k * self.expert_width + self.shared_width if moe else self.ffn_width,
            "head_dim": self.head_dim,
        }

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, V] for token ids [B, S] int64.

        Raises:
            ValueError: If S is longer than ``context_length``.
        """
        if tokens_BS.shape[-1] > self.context_length:
            raise ValueError(
                f"context_length: the model was built for {self.context_length} positions, the batch has {tokens_BS.shape[-1]}."
            )
        return self.transformer(tokens_BS)

    def loss(self, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats per token, 0-dim float32, without auxiliary losses."""
        logits_BSV = self(batch["tokens"])
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), batch["targets"].flatten())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One micro-batch; returns the loss with the auxiliary losses."""
        loss = self.loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/bits_per_byte", self._bits_per_byte(loss.detach()), prog_bar=True)
        auxiliary = [layer.aux_loss for layer in self.moe_layers]
        return loss + sum(auxiliary) if auxiliary else loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Logs the throughput since the last logged step, over all ranks."""
        sampler = self.trainer.distributed_sampler_kwargs  # tensor-parallel ranks see the same tokens
        now, tokens = time.perf_counter(), batch["tokens"].numel() * (sampler["num_replicas"] if sampler else 1)
        if self._clock is None:
            self._clock = (now, 0)  # the first batch pays for warm-up: it is not counted
            return
        start, seen = self._clock
        self._clock = (start, seen + tokens)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.trainer.global_step % every == 0:
            self.log("train/tokens_per_second", (seen + tokens) / (now - start), prog_bar=True)
            self._clock = (now, 0)

    def on_train_start(self) -> None:
        """Starts the throughput's clock anew."""
        self._clock = None

    def on_validation_start(self) -> None:
        """Notes when validation began, to leave it out of the throughput."""
        self._paused = time.perf_counter()

    def on_validation_end(self) -> None:
        """Lets the throughput's clock go on from where it stood."""
        if self._clock is not None:
            start, seen = self._clock
            self._clock = (start + time.perf_counter() - self._paused, seen)

    def _bits_per_byte(self, loss: Tensor) -> Tensor:
        return loss / (math.log(2) * self.bytes_per_token)

    def _evaluate(self, batch: Batch, stage: str) -> None:
        loss, size = self.loss(batch), batch["tokens"].shape[0]
        bits = self._bits_per_byte(loss)
        values = {f"{stage}/loss": loss, f"{stage}/bits_per_byte": bits}
        self.log_dict(values, prog_bar=stage == "val", sync_dist=True, batch_size=size)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs ``val/loss`` and ``val/bits_per_byte``."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs ``test/loss`` and ``test/bits_per_byte``."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Bits that the model needs for each target, [B, S] float32."""
        logits_BSV = self(batch["tokens"]).float()
        nats = F.cross_entropy(logits_BSV.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        return nats.view_as(batch["targets"]) / math.log(2)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor | str,
        max_new_tokens: int = 128,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        seed: int | None = None,
    ) -> Tensor | str:
        """Continues a prompt.

        Args:
            prompt: Token ids [S] or [B, S]; or text, for a model of bytes (``vocab_size`` 256).
            max_new_tokens: Tokens to add.
            temperature: Divides the logits; 0 takes the likeliest token.
            top_k: Sample among the k likeliest tokens only.
            seed: Seed of the sampling; ``None`` uses the global generator.

        Returns:
            Prompt and continuation, in the prompt's form.

        Raises:
            ValueError: For an empty prompt, or text where the vocabulary is not bytes.
        """
        if isinstance(prompt, str):
            if self.vocab_size != 256:
                raise ValueError(
                    f"prompt: text needs a vocabulary of 256 bytes, this model has {self.vocab_size} tokens."
                )
            ids = torch.tensor(list(prompt.encode()), dtype=torch.int64, device=self.device)
            out = self.generate(ids, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
            assert isinstance(out, Tensor)
            return bytes(out.tolist()).decode(errors="replace")
        if prompt.shape[-1] == 0:
            raise ValueError("prompt: it is empty, expected at least one token.")
        generator = None if seed is None else torch.Generator(prompt.device).manual_seed(seed)
        was_training = self.training
        self.eval()
        tokens = prompt if prompt.dim() == 2 else prompt[None]
        for _ in range(max_new_tokens):
            logits_BV = self(tokens[:, -self.context_length :])[:, -1].float()
            tokens = torch.cat((tokens, _sample(logits_BV, temperature, top_k, generator)), dim=1)
        self.train(was_training)
        return tokens if prompt.dim() == 2 else tokens[0]

    def configure_model(self) -> None:
        """Under ModelParallelStrategy: experts over its tensor-parallel dimension, FSDP2 over its data-parallel one."""
        mesh = self.device_mesh
        if mesh is None:
            return
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if isinstance(self.transformer, FSDPModule):  # a second fit
            return
        if mesh["tensor_parallel"].size() > 1 or mesh["data_parallel"].size() == 1:  # Lightning restores DTensors only
            parallelize_experts(self, mesh["tensor_parallel"])
        if mesh["data_parallel"].size() > 1:
            for module in (*self.transformer.blocks, self.transformer):
                fully_shard(module, mesh=mesh["data_parallel"])

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as Lightning does; also where parameters lie on several meshes, which torch refuses."""
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
        tag_roles(self)  # sharding a parameter, and moving a DTensor to its device, lose what was noted on it
        optimizer = self.optimizer(list(self.named_parameters()))
        if self.scheduler is None:
            return optimizer
        scheduler = self.scheduler(optimizer)
        if getattr(scheduler, "total_steps", 0) is None:  # WarmupDecay, or another that asks in the same way
            scheduler.total_steps = self.trainer.estimated_stepping_batches  # type: ignore[attr-defined]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_callbacks(self) -> list[Any]:
        """Loss-free balancing needs its update after each optimizer step, a global load its micro-batches."""
        return [*balance_callbacks(self.moe_layers)]


def _check_sizes(given: Mapping[str, Any]) -> None:
    """Refuses sizes that are not whole numbers in range, and numbers that are not finite or have the wrong sign."""
    least = dict.fromkeys(
        ("vocab_size", "context_length", "width", "depth", "n_heads", "moe_every", "n_expert_groups"), 1
    )
    optional = dict.fromkeys(("n_kv_heads", "head_dim", "ffn_width", "expert_width"), 1)
    for name, minimum in {**least, **optional, "n_experts": 0, "shared_width": 0}.items():
        value = given[name]
        if value is None and name in optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name}: found {value!r}, expected a whole number of at least {minimum}.")
    positive = ("rope_base", "bytes_per_token")
    for name in (*positive, "init_std", "embedding_std", "unembedding_std", *(k for k in given if "multiplier" in k)):
        value = given[name]
        if value is None:
            continue
        if not math.isfinite(value) or value < 0 or (value == 0 and name in positive):
            expected = "above 0" if name in positive else "of at least 0"
            raise ValueError(f"{name}: found {value!r}, expected a finite number {expected}.")


def _check_moe(given: Mapping[str, Any]) -> None:
    """Refuses unknown options of the experts, in a dense model too: it may be the base of one with experts."""
    choices = {"activation": tuple(ACTIVATIONS), "scoring": SCORINGS, "gate": GATES, "balance": BALANCES}
    for name, known in {**choices, "balance_scope": SCOPES, "backend": BACKENDS}.items():
        require_choice(name, given[name], known)
    require_finite(route_scale=given["route_scale"])
    require_non_negative(
        **{name: given[name] for name in ("jitter", "aux_loss_coef", "z_loss_coef", "bias_update_rate")}
    )


def _sample(logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token a row, [B, 1]."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    logits_BV = logits_BV / temperature
    if top_k is not None:
        smallest = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest, -torch.inf)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=generator)


__all__ = ["MoELanguageModel"]
