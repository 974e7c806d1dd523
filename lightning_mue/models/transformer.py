"""A decoder-only transformer whose blocks are dense or Mixture-of-Experts, with every multiplier as an attribute.

Shape legend: B batch, S sequence, T = B * S tokens, d width, N query heads, M key/value heads, k head dimension, j = k / 2,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mue.checks import value_error
from lightning_mue.contract import branch_sizes
from lightning_mue.names import is_vector
from lightning_mue.parameterizations.rules.roles import Role


class RMSNorm(nn.RMSNorm):
    """Root-mean-square normalization over the last dimension. The role is ``norm`` in a block, ``qk_norm`` or ``final_norm``."""

    def __init__(self, width: int, role: Role = Role.NORM) -> None:
        super().__init__(width, eps=1e-6)
        self.mue_roles = {"weight": role}


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al., arXiv:2104.09864), halves rotated.

    Args:
        head_dim: Head dimension k, even.
        context_length: Longest sequence.
        base: Base of the wavelengths.
    """

    cos_Sj: Tensor
    sin_Sj: Tensor

    def __init__(self, head_dim: int, context_length: int, base: float = 10_000.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise value_error("head_dim", found=head_dim, expected="an even number: RoPE rotates pairs")
        frequency = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        angle = torch.arange(context_length, dtype=torch.float32)[:, None] * frequency
        self.register_buffer("cos_Sj", angle.cos(), persistent=False)
        self.register_buffer("sin_Sj", angle.sin(), persistent=False)

    def forward(self, x_BNSk: Tensor) -> Tensor:
        """Rotates ``x_BNSk`` by its positions; same shape and dtype."""
        length = x_BNSk.shape[-2]
        a_BNSj, b_BNSj = x_BNSk.chunk(2, dim=-1)
        cos, sin = self.cos_Sj[:length].to(x_BNSk.dtype), self.sin_Sj[:length].to(x_BNSk.dtype)
        # (a cos - b sin, b cos + a sin), in as few passes over memory as torch operators allow.
        return torch.cat(
            (torch.addcmul(a_BNSj * cos, b_BNSj, sin, value=-1), torch.addcmul(b_BNSj * cos, a_BNSj, sin)), dim=-1
        )


class AttentionCore(nn.Module):
    """Attention with logits ``scale * q . k``, a module of its own so that monitors can hook its queries and keys.

    ``causal``: a query sees no later keys. Only then is it a declared core, which by the contract is causal.
    """

    mue_multipliers: ClassVar[Mapping[str, str]] = {"attention": "scale"}

    def __init__(self, scale: float, causal: bool = True) -> None:
        super().__init__()
        self.scale, self.causal = scale, causal
        self.mue_attention_core = causal

    def forward(self, q_BNSk: Tensor, k_BMSk: Tensor, v_BMSk: Tensor) -> Tensor:
        """Returns the attention output [B, N, S, k]."""
        grouped = q_BNSk.shape[1] != k_BMSk.shape[1]
        return F.scaled_dot_product_attention(
            q_BNSk, k_BMSk, v_BMSk, is_causal=self.causal, scale=self.scale, enable_gqa=grouped
        )


class Attention(nn.Module):
    """Self-attention with rotary positions, grouped queries and normalized queries and keys.

    ``scale`` is a factor on the logits, ``causal`` hides later tokens; the other arguments are as for `MoELanguageModel`. With
    ``gated``, head n's output is multiplied by sigmoid(w_n . x), one number a token and head.
    """

    mue_branch = "attention"
    mue_roles: ClassVar[Mapping[str, Role]] = dict.fromkeys(("w_q", "w_k", "w_v", "w_g", "w_o"), Role.HIDDEN)

    def __init__(
        self,
        width: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        qk_norm: bool,
        scale: float,
        init_std: float | None,
        gated: bool = False,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        std = width**-0.5 if init_std is None else init_std
        self.w_q = nn.Parameter(torch.randn(n_heads * head_dim, width) * std)
        self.w_k = nn.Parameter(torch.randn(n_kv_heads * head_dim, width) * std)
        self.w_v = nn.Parameter(torch.randn(n_kv_heads * head_dim, width) * std)
        self.w_g = nn.Parameter(torch.randn(n_heads, width) * std) if gated else None
        std_o = (n_heads * head_dim) ** -0.5 if init_std is None else init_std
        self.w_o = nn.Parameter(torch.randn(width, n_heads * head_dim) * std_o)
        self.q_norm = RMSNorm(head_dim, Role.QK_NORM) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, Role.QK_NORM) if qk_norm else nn.Identity()
        self.core = AttentionCore(scale, causal)

    def forward(self, x_BSd: Tensor, rotary: Callable[[Tensor], Tensor]) -> Tensor:
        """Attends over the sequence; same shape."""
        q_BNSk, k_BMSk, v_BMSk = (
            F.linear(x_BSd, w).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for w in (self.w_q, self.w_k, self.w_v)
        )
        y_BNSk = self.core(rotary(self.q_norm(q_BNSk)), rotary(self.k_norm(k_BMSk)), v_BMSk)
        y_BSNk = y_BNSk.transpose(1, 2)
        if self.w_g is not None:
            y_BSNk = F.linear(x_BSd, self.w_g).sigmoid()[..., None] * y_BSNk
        return F.linear(y_BSNk.flatten(-2), self.w_o)


def draw_uniform(modules: Iterable[nn.Module], keep: Container[str] = ()) -> None:
    """Draws every matrix from the uniform distribution in +-fan_in^-1/2, which has std (3 fan_in)^-1/2; not those to keep."""
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1 and not is_vector(name) and name not in keep:
                bound = parameter.shape[-1] ** -0.5
                nn.init.uniform_(parameter, -bound, bound)


class Block(nn.Module):
    """Pre-norm transformer block: ``x + m * attention(norm(x))``, then ``x + m * ffn(norm(x))``.

    m is the residual multiplier, ``ffn`` a ``FeedForward`` or ``MoELayer``.
    """

    mue_multipliers: ClassVar[Mapping[str, str]] = {"residual": "residual_multiplier"}

    def __init__(self, width: int, attention: Attention, ffn: nn.Module, residual_multiplier: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = attention
        self.ffn_norm = RMSNorm(width)
        self.ffn = ffn
        self.residual_multiplier = residual_multiplier

    def forward(self, x_BSd: Tensor, rotary: Callable[[Tensor], Tensor]) -> Tensor:
        """Applies both branches; same shape."""
        m = self.residual_multiplier
        x_BSd = torch.add(x_BSd, self.attention(self.attention_norm(x_BSd), rotary), alpha=m)
        return torch.add(x_BSd, self.ffn(self.ffn_norm(x_BSd)), alpha=m)


class Unembedding(nn.Module):
    """Logits from the residual stream: ``output_multiplier * x W^T``.

    Args:
        weight: [V, d]; the embedding's weight if they are tied.
        output_multiplier: Factor on the logits.
    """

    mue_role_of_output = "lm_logits"
    mue_roles: ClassVar[Mapping[str, Role]] = {"weight": Role.UNEMBEDDING}
    mue_multipliers: ClassVar[Mapping[str, str]] = {"output": "output_multiplier"}

    def __init__(self, weight: Tensor, output_multiplier: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self.output_multiplier = output_multiplier

    def forward(self, x_BSd: Tensor) -> Tensor:
        """Returns logits [B, S, V]."""
        logits_BSV = F.linear(x_BSd, self.weight)
        return logits_BSV if self.output_multiplier == 1.0 else self.output_multiplier * logits_BSV


class Transformer(nn.Module):
    """Token ids -> logits. The blocks share ``rotary``; the other arguments are as for `MoELanguageModel`.

    ``unembedding_std`` is that of an untied unembedding: a tied one is the embedding, of ``embedding_std``.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        blocks: list[Block],
        rotary: RotaryEmbedding,
        *,
        tie_embeddings: bool,
        embedding_std: float,
        unembedding_std: float,
        output_multiplier: float,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embedding.weight, std=embedding_std)
        self.rotary = rotary
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = RMSNorm(width, Role.FINAL_NORM)
        weight = (
            self.embedding.weight if tie_embeddings else nn.Parameter(torch.randn(vocab_size, width) * unembedding_std)
        )
        self.unembedding = Unembedding(weight, output_multiplier)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, V] for token ids [B, S] int64."""
        x_BSd = self.embedding(tokens_BS)
        for block in self.blocks:
            x_BSd = block(x_BSd, self.rotary)
        return self.unembedding(self.final_norm(x_BSd))

    def active_parameters(self) -> float:
        """Matrix parameters that one token is multiplied with: of stacked experts top_k of n_experts, no embedding."""
        count = float(self.unembedding.weight.numel())
        for block in self.blocks:
            sizes = branch_sizes(block.ffn) or {}
            for name, parameter in block.named_parameters():
                if parameter.ndim > 1 and not is_vector(name):
                    stacked = parameter.ndim == 3
                    count += parameter.numel() * (sizes["a"] / sizes["E"] if stacked else 1.0)
        return count
