"""MoELanguageModel: a decoder-only language model, dense or Mixture-of-Experts, as a LightningModule.

Shape legend: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.models.arguments import check_effects, check_options, check_sizes, infer_head_dim
from lightning_mue.models.evaluation import Evaluates
from lightning_mue.models.generation import Generates
from lightning_mue.models.loading import LoadsSafely
from lightning_mue.models.training import TrainsExperts
from lightning_mue.models.transformer import Attention, Block, RotaryEmbedding, Transformer, draw_uniform
from lightning_mue.moe import parallelize_experts
from lightning_mue.parameterizations.applying.keeps_multipliers import KeepsMultipliers
from lightning_mue.parameterizations.reading.parameters import tag_roles


def _default_optimizer(params: Iterable[Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)


class MoELanguageModel(KeepsMultipliers, Generates, Evaluates, LoadsSafely, TrainsExperts):
    """Pre-norm transformer language model: RMSNorm, RoPE, QK-norm, grouped-query attention, FFN or MoE.

    Batches are dicts ``{"tokens": int64 [B, S], "targets": int64 [B, S]}``. Logs ``train/loss`` (nats per token, without the
    auxiliary losses) and ``train/bits_per_byte``. ``val/loss``, ``val/bits_per_byte`` and ``val/perplexity``, and the same for
    ``test``, are exact over all batches and ranks: each target counts the same; a target of -100 is not scored.

    Args:
        vocab_size: Vocabulary V; 256 for bytes.
        context_length: Longest sequence.
        width: Residual width d.
        depth: Number of blocks L.
        n_heads: Query heads.
        n_kv_heads: Key/value heads (grouped-query attention); None: as many as query heads.
        head_dim: Head dimension; None: ``width / n_heads``.
        qk_norm: Normalize queries and keys per head.
        ffn_width: Hidden width of a dense FFN; None: 8/3 width, rounded up to a multiple of 16.
        n_experts: Routed experts per MoE block; 0 makes every block dense.
        top_k: Experts active per token.
        expert_width: Hidden width of one expert; None: ``ffn_width / top_k``, so that the active width is the dense one's.
        moe_every: Every n-th block is an MoE block, beginning with block n; the others are dense.
        tie_embeddings: Use the embedding as unembedding.
        init_std: Standard deviation of matrices; None: ``fan_in^-1/2`` of each.
        embedding_std: Standard deviation of the embedding.
        unembedding_std: Standard deviation of the unembedding, and of a tied embedding.
        residual_multiplier: Factor on every residual branch.
        attention_multiplier: Scale of the attention logits; None: ``head_dim^-1/2``.
        ffn_multiplier: Factor on the output of every FFN or MoE.
        output_multiplier: Factor on the logits; a plan sets it where embeddings are tied.
        rope_base: Base of the rotary wavelengths.
        bytes_per_token: Mean number of bytes per token, to report bits per byte.
        n_expert_groups: Groups of experts with equally many active ones; divides ``n_experts`` and ``top_k``. 1: free choice.
        activation: Of every FFN and expert: ``swiglu``, ``geglu``, ``geglu-tanh``, ``gelu``, ``gelu-tanh``, ``relu`` or ``relu2``.
        ffn_bias: Give every FFN and expert biases.
        gated_attention: Multiply the output of each head by sigmoid(w . x), w a vector of the head.
        uniform_init: Draw the matrices of the blocks uniformly within ``+-fan_in^-1/2``, as torch.nn.Linear does, in place of
            ``init_std``.
        optimizer: From parameters to an optimizer.
        scheduler: From an optimizer to a scheduler, stepped every optimizer step. If its ``total_steps`` is None, it is set to
            the trainer's number of steps.
        **moe: Further options of every MoE layer, as `MoELayer` and `Router` name them, e.g. ``scoring`` or ``shared_width``.
            They are checked in a dense model too, which may be the base of a model with experts.

    Raises:
        TypeError: An argument has the wrong type, or is unknown.
        ValueError: An argument is out of range; the message names it.
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
        moe_every: int = 1,
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
        ffn_bias: bool = False,
        gated_attention: bool = False,
        uniform_init: bool = False,
        optimizer: OptimizerCallable = _default_optimizer,
        scheduler: LRSchedulerCallable | None = None,
        **moe: Any,
    ) -> None:
        check_sizes(locals())
        check_effects(locals())
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        self.optimizer, self.scheduler = optimizer, scheduler
        self.vocab_size, self.context_length, self.bytes_per_token = vocab_size, context_length, bytes_per_token
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        self.width, self.depth, self.head_dim = width, depth, infer_head_dim(width, n_heads, n_kv_heads, head_dim)
        self.n_experts, self.top_k = n_experts, top_k
        self.ffn_width = -(-8 * width // 48) * 16 if ffn_width is None else ffn_width
        self.expert_width = max(1, self.ffn_width // max(1, top_k)) if expert_width is None else expert_width
        check_options(n_experts, top_k, n_expert_groups, moe)
        scale = self.head_dim**-0.5 if attention_multiplier is None else attention_multiplier
        sizes = (width, n_heads, n_kv_heads, self.head_dim)
        blocks = []
        for layer in range(depth):
            attention = Attention(*sizes, qk_norm=qk_norm, scale=scale, init_std=init_std, gated=gated_attention)
            has_experts = n_experts > 0 and (layer + 1) % moe_every == 0
            # jsonargparse reads the options of **moe off this call, so that they are keys of a config.
            ffn = self._ffn(has_experts, activation, ffn_bias, init_std, n_expert_groups, **moe)
            ffn.output_multiplier = ffn_multiplier  # type: ignore[assignment]
            blocks.append(Block(width, attention, ffn, residual_multiplier))
        if uniform_init:
            draw_uniform(blocks, keep=() if moe.get("router_init_std") is None else ("ffn.router.weight",))
        self.transformer = Transformer(
            vocab_size,
            width,
            blocks,
            RotaryEmbedding(self.head_dim, context_length, rope_base),
            tie_embeddings=tie_embeddings,
            embedding_std=unembedding_std if tie_embeddings else embedding_std,
            unembedding_std=unembedding_std,
            output_multiplier=output_multiplier,
        )
        tag_roles(self)
        self.add_metrics(bytes_per_token)
        # Counted here: strategies may shard or flatten parameters later.
        self._active_parameters, self._attention_width = self.transformer.active_parameters(), n_heads * self.head_dim

    def flops_per_token(self) -> float:
        """FLOPs of the forward and backward pass of one training token, at sequences of ``context_length``.

        ``6 P + 6 L N k S``: P matrix parameters that a token is multiplied with (of an MoE layer the router, the shared expert
        and top_k of the n_experts experts; without the embedding, with the unembedding), L blocks, N query heads of dimension
        k, S tokens of context. PaLM, arXiv:2204.02311, appendix B, has ``12 L N k S``: here a causal mask halves attention.
        """
        return 6.0 * (self._active_parameters + self.depth * self._attention_width * self.context_length)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, V] for token ids [B, S] int64.

        Raises:
            ValueError: If S is longer than ``context_length``.
        """
        if tokens_BS.shape[-1] > self.context_length:
            found = f"sequences of {tokens_BS.shape[-1]} tokens"
            do = "Give model and data the same context_length."
            raise value_error("context_length", found=found, expected=f"at most {self.context_length}", do=do)
        return self.transformer(tokens_BS)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean cross-entropy in nats per token, 0-dim float32, without auxiliary losses.

        That of training: for another loss in validation override `evaluate` too, which has metrics of its own.
        """
        logits_BSV = self(batch["tokens"])
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), batch["targets"].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Returns the loss of one micro-batch with the auxiliary losses."""
        loss = self.loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/bits_per_byte", self._bits_per_byte(loss.detach()), prog_bar=True)
        return self.with_auxiliary(loss)

    def _bits_per_byte(self, loss: Tensor) -> Tensor:
        return loss / (math.log(2) * self.bytes_per_token)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Code length of each target in bits, [B, S] float32."""
        logits_BSV = self(batch["tokens"]).float()
        nats = F.cross_entropy(logits_BSV.flatten(0, 1), batch["targets"].flatten(), reduction="none")
        return nats.view_as(batch["targets"]) / math.log(2)

    def configure_model(self) -> None:
        """Under ModelParallelStrategy shards experts over the tensor-parallel ranks, and all over the data-parallel ones."""
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
