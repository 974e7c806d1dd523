"""A GPT as such code is usually written, in the layout, names, initialization and optimizer of minGPT; it declares nothing."""

from __future__ import annotations

import math

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CausalSelfAttention(nn.Module):
    """Causal attention with fused queries, keys and values."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.n_head = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd), n_head

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        q, k, v = (t.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for t in self.c_attn(x).chunk(3, -1))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class Mlp(nn.Module):
    """Two layers with GELU."""

    def __init__(self, n_embd: int, hidden: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(n_embd, hidden), nn.Linear(hidden, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class Experts(nn.Module):
    """Top-k experts in a list, gates normalized over the chosen ones, no auxiliary loss."""

    def __init__(self, n_embd: int, hidden: int, n_experts: int, top_k: int) -> None:
        super().__init__()
        self.gate, self.top_k = nn.Linear(n_embd, n_experts, bias=False), top_k
        self.experts = nn.ModuleList(Mlp(n_embd, hidden) for _ in range(n_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        flat = x.flatten(0, -2)
        logits, chosen = self.gate(flat).topk(self.top_k)
        gates, y = logits.softmax(-1), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows, places = (chosen == i).nonzero(as_tuple=True)
            y = y.index_add(0, rows, gates[rows, places, None] * expert(flat[rows]))
        return y.view_as(x)


class Block(nn.Module):
    """A pre-norm block; its FFN has four widths, each of its experts two."""

    def __init__(self, n_embd: int, n_head: int, n_experts: int) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = (
            nn.LayerNorm(n_embd),
            CausalSelfAttention(n_embd, n_head),
            nn.LayerNorm(n_embd),
        )
        self.mlp = Experts(n_embd, 2 * n_embd, n_experts, 2) if n_experts else Mlp(n_embd, 4 * n_embd)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(L.LightningModule):
    """Weights of std 0.02, the head's of `head_std`, those of branches' last layers of 0.02/sqrt(2 n_layer).

    AdamW with weight decay on the matrices of linear layers.

    The rate rises linearly over a part `warmup` of the steps and falls along a cosine to a tenth.
    """

    def __init__(
        self,
        n_embd: int = 160,
        n_head: int = 10,
        n_layer: int = 6,
        n_experts: int = 0,
        tied: bool = False,
        vocab_size: int = 256,
        block_size: int = 64,
        learning_rate: float = 1e-3,
        warmup: float = 0.1,
        head_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(Block(n_embd, n_head, n_experts) for _ in range(n_layer)),
                "ln_f": nn.LayerNorm(n_embd),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * n_layer))
        if head_std != 0.02:
            nn.init.normal_(self.lm_head.weight, mean=0.0, std=head_std)
        if tied:
            self.lm_head.weight = self.transformer["wte"].weight

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V] of token ids [B, S]."""
        x = self.transformer["wte"](tokens) + self.transformer["wpe"](torch.arange(tokens.shape[1]))
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of [B, S + 1]."""
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss."""
        return self.loss(batch[0])

    def configure_optimizers(self) -> dict[str, object]:
        """AdamW with minGPT's settings, and a schedule."""
        decay = {m.weight for m in self.modules() if isinstance(m, nn.Linear)} - {self.transformer["wte"].weight}
        groups = [
            {"params": [p for p in self.parameters() if p in decay], "weight_decay": 0.1},
            {"params": [p for p in self.parameters() if p not in decay], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["learning_rate"], betas=(0.9, 0.95))
        steps = int(self.trainer.estimated_stepping_batches)
        warm = max(1, round(self.hparams["warmup"] * steps))

        def factor(step: int) -> float:
            progress = (step - warm) / max(1, steps - warm)
            return (step + 1) / warm if step < warm else 0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
