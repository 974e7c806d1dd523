"""Layouts of public training projects in our own words: names, nesting and shapes as theirs, the arithmetic plain PyTorch.

minGPT, nanoGPT (untied here; tests/helpers/zoo_models.py has GPT-2's tied one), a lecture GPT with its heads in a list, litgpt
dense and with experts, nanoMoE, DiT, a U-Net of diffusion models, and a residual conv net. Linear layers keep torch's own draw.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.zoo_models import VOCABULARY, ZooModel, images, noise

HEAD = 8


def shifted_loss(model: Any, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of [B, T, width] in heads of 8, back to [B, T, width]."""
    q, k, v = (x.unflatten(-1, (-1, HEAD)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class FusedAttention(nn.Module):
    """minGPT's and nanoGPT's: one matrix for queries, keys and values."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__()
        self.n_head = width // HEAD
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(attend(*self.c_attn(x).chunk(3, dim=-1)))


class NanoMLP(nn.Module):
    def __init__(self, width: int, bias: bool = False) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width, bias=bias), nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


def routed(logits: Tensor, top_k: int) -> Tensor:
    """Gates [..., E] that sum to 1 over the top_k experts."""
    top, where = logits.topk(top_k, dim=-1)
    return torch.zeros_like(logits).scatter(-1, where, top.softmax(-1))


class NanoExperts(nn.Module):
    """nanoMoE's: experts as two stacks [E, in, out] for bmm, behind a router of its own."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Module()
        self.router.top_k, self.router.w_g = 2, nn.Linear(width, experts, bias=False)
        self.experts = nn.Module()
        self.experts.c_fc = nn.Parameter(torch.randn(experts, width, 4 * width) * width**-0.5)
        self.experts.c_proj = nn.Parameter(torch.randn(experts, 4 * width, width) * (4 * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        gates = routed(self.router.w_g(x), 2)
        hidden = F.gelu(torch.einsum("btd,edh->bteh", x, self.experts.c_fc))
        return torch.einsum("bteh,ehd,bte->btd", hidden, self.experts.c_proj, gates)


class Block(nn.Module):
    def __init__(self, width: int, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2, self.mlp = nn.LayerNorm(width), attn, nn.LayerNorm(width), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class MinMLP(nn.ModuleDict):
    """minGPT keeps its FFN in a ModuleDict and calls the parts in the block."""

    def __init__(self, width: int) -> None:
        super().__init__({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width), "act": nn.GELU()})

    def forward(self, x: Tensor) -> Tensor:
        return self["c_proj"](self["act"](self["c_fc"](x)))


class GPT(nn.Module):
    def __init__(self, width: int, depth: int, block: Any) -> None:
        super().__init__()
        parts = {"wte": nn.Embedding(VOCABULARY, width), "wpe": nn.Embedding(16, width)}
        self.transformer = nn.ModuleDict(
            {**parts, "h": nn.ModuleList(block(width) for _ in range(depth)), "ln_f": nn.LayerNorm(width)}
        )
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.transformer["wte"](tokens) + self.transformer["wpe"].weight[: tokens.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class Head(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(width, HEAD, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(m(x)[:, None] for m in (self.query, self.key, self.value)), is_causal=True)[:, 0]


class ListedHeads(nn.Module):
    """The heads of a lecture's GPT: a list of modules that stand side by side."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(width) for _ in range(width // HEAD))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class LectureFFN(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class LectureBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.sa, self.ffwd = ListedHeads(width), LectureFFN(width)
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class LectureGPT(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.token_embedding_table, self.position_embedding_table = nn.Embedding(VOCABULARY, width), nn.Embedding(16, width)
        self.blocks = nn.Sequential(*(LectureBlock(width) for _ in range(depth)))
        self.ln_f, self.lm_head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding_table(tokens) + self.position_embedding_table.weight[: tokens.shape[1]]
        return self.lm_head(self.ln_f(self.blocks(x)))


class LitAttention(nn.Module):
    """litgpt's: ``qkv`` and ``proj``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, dim=-1)))


class LitMLP(nn.Module):
    """litgpt's SwiGLU: ``proj`` is the down matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc_1, self.fc_2 = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))


class LitMoE(nn.Module):
    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.n_expert_per_token, self.gate = 2, nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(LitMLP(width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        gates = routed(self.gate(x), 2)
        return sum(gates[..., i, None] * expert(x) for i, expert in enumerate(self.experts))  # type: ignore[return-value]


class LitBlock(nn.Module):
    def __init__(self, width: int, mlp: nn.Module) -> None:
        super().__init__()
        self.norm_1, self.attn, self.norm_2, self.mlp = nn.RMSNorm(width), LitAttention(width), nn.RMSNorm(width), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class DiTBlock(nn.Module):
    """Attention and an FFN whose norms are shifted, scaled and gated by a condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn, self.mlp = LitAttention(width), nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + a[2] * self.attn(self.norm1(x) * (1 + a[1]) + a[0])
        return x + a[5] * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x) * (1 + a[4]) + a[3])))


class DiTFinal(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_final, self.linear = nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, 12)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class DiT(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder = nn.Conv2d(3, width, 2, stride=2), nn.Module()
        self.t_embedder.mlp = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width))
        self.pos_embed = nn.Parameter(0.5 * torch.randn(1, 16, width))
        self.blocks, self.final_layer = nn.ModuleList(DiTBlock(width) for _ in range(depth)), DiTFinal(width)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.t_embedder.mlp(torch.sin(t[:, None] * torch.arange(1, 17)))
        x = self.x_embedder(x).flatten(2).mT + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x, c)


def gpt(block: Any) -> ZooModel:
    return ZooModel(lambda w, depth, e: GPT(w, depth, lambda width: block(width, e)), loss=shifted_loss)


def dit_loss(model: Any, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0], torch.tensor([0.3, 0.8])), noise(2, 16, 12))


LAYOUTS = {
    "minGPT": gpt(lambda w, e: Block(w, FusedAttention(w), MinMLP(w))),
    "nanoGPT": gpt(lambda w, e: Block(w, FusedAttention(w, bias=False), NanoMLP(w))),
    "lecture GPT": ZooModel(lambda w, depth, e: LectureGPT(w, depth), loss=shifted_loss),
    "litgpt": gpt(lambda w, e: LitBlock(w, LitMLP(w))),
    "litgpt moe": gpt(lambda w, e: LitBlock(w, LitMoE(w, e) if e else LitMLP(w))),
    "nanoMoE": gpt(lambda w, e: Block(w, FusedAttention(w, bias=False), NanoExperts(w, e) if e else NanoMLP(w))),
    "DiT": ZooModel(lambda w, depth, e: DiT(w, depth), images, dit_loss),
}


class ResBlock(nn.Module):
    """A diffusion U-Net's: two convolutions and a shift by the time."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(times, width)
        self.norm2, self.conv2 = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(F.silu(t))[:, :, None, None]
        return x + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """Two levels: ``depth`` blocks down, a strided convolution, ``depth`` blocks in the middle, and up over a skip connection."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        times = 4 * width
        self.time_embedding = nn.Sequential(nn.Linear(16, times), nn.SiLU(), nn.Linear(times, times))
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down_blocks = nn.ModuleList(ResBlock(width, times) for _ in range(depth))
        self.downsample = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.mid_blocks = nn.ModuleList(ResBlock(2 * width, times) for _ in range(depth))
        self.upsample = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.merge = nn.Conv2d(2 * width, width, 1)
        self.up_blocks = nn.ModuleList(ResBlock(width, times) for _ in range(depth))
        self.norm_out, self.conv_out = nn.GroupNorm(4, width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.time_embedding(torch.sin(t[:, None] * torch.arange(1, 17)))
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x, c)
        y = self.downsample(x)
        for block in self.mid_blocks:
            y = block(y, c)
        x = self.merge(torch.cat([x, self.upsample(y)], dim=1))
        for block in self.up_blocks:
            x = block(x, c)
        return self.conv_out(F.silu(self.norm_out(x)))


class ConvBlock(nn.Module):
    """A pre-activation residual block of a conv net."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class ConvNet(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*(ConvBlock(width) for _ in range(depth)))
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


def unet_loss(model: Any, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0], torch.tensor([0.3, 0.8])), noise(2, 3, 8, 8))


LAYOUTS |= {
    "U-Net": ZooModel(lambda w, depth, e: UNet(w, depth), images, unet_loss),
    "conv net": ZooModel(
        lambda w, depth, e: ConvNet(w, depth), images, lambda model, b: F.cross_entropy(model(b[0]), b[1])
    ),
}
