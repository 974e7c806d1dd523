"""More layouts of public projects in our own words: x-transformers, torchtitan, timm's ViT, nn.TransformerEncoder."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from helpers.zoo_layouts import HEAD, shifted_loss
from helpers.zoo_models import VOCABULARY, ZooModel, image_loss, images
from torch import Tensor, nn


class SoftmaxAttention(nn.Module):
    """x-transformers': logits, masked and softmaxed by hand, keys and values shared by two query heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k = nn.Linear(width, width, bias=False), nn.Linear(width, width // 2, bias=False)
        self.to_v, self.to_out = nn.Linear(width, width // 2, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (made(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for made in (self.to_q, self.to_k, self.to_v))
        k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        sim = torch.einsum("bhid,bhjd->bhij", q, k) * HEAD**-0.5
        sim = sim.masked_fill(torch.ones(sim.shape[-2:], dtype=torch.bool).triu(1), -torch.finfo(sim.dtype).max)
        return self.to_out((sim.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class XLayers(nn.Module):
    """Attention and feed-forward in turn, each with its norm, in one list."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(depth):
            for branch in (SoftmaxAttention(width), XFeedForward(width)):
                self.layers.append(nn.ModuleList([nn.ModuleList([nn.LayerNorm(width)]), branch]))

    def forward(self, x: Tensor) -> Tensor:
        for (norm,), branch in self.layers:  # type: ignore[misc]
            x = x + branch(norm(x))
        return x


class XFeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ff = nn.Sequential(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU()), nn.Dropout(0.0), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x)


class XTransformer(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.token_emb, self.attn_layers = nn.Embedding(VOCABULARY, width), XLayers(width, depth)
        self.final_norm, self.to_logits = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.to_logits(self.final_norm(self.attn_layers(self.token_emb(tokens))))


class TitanAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.wq, self.wk = nn.Linear(width, width, bias=False), nn.Linear(width, width // 2, bias=False)
        self.wv, self.wo = nn.Linear(width, width // 2, bias=False), nn.Linear(width, width, bias=False)
        self.inner_attention = Inner()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (made(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for made in (self.wq, self.wk, self.wv))
        return self.wo(self.inner_attention(q, k, v).transpose(1, 2).flatten(2))


class Inner(nn.Module):
    """Calls the fused function, with grouped heads and a scale of its own."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.25, is_causal=True, enable_gqa=True)


class TitanFeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.w2 = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TitanBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.feed_forward = TitanAttention(width), TitanFeedForward(width)
        self.attention_norm, self.ffn_norm = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Titan(nn.Module):
    """torchtitan's Llama: layers in a ModuleDict."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleDict({str(i): TitanBlock(width) for i in range(depth)})
        self.norm, self.output = nn.RMSNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_embeddings(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.output(self.norm(x))


class TimmBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = TimmAttention(width)
        self.mlp = nn.Sequential()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TimmAttention(nn.Module):
    """Sees all patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, HEAD)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TimmViT(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.patch_embed = nn.Conv2d(3, width, 2, stride=2)
        self.blocks = nn.Sequential(*(TimmBlock(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Any:
        x = self.patch_embed(x).flatten(2).mT
        x = self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1))
        return type("Output", (), {"logits": self.head(self.norm(x)[:, 0])})


class Encoder(nn.Module):
    """torch's own encoder, causal, with padding; the head is the table itself."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        layer = nn.TransformerEncoderLayer(width, width // HEAD, 2 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        padded = torch.zeros(tokens.shape, dtype=torch.bool)
        padded[0, -3:] = True
        x = self.encoder(self.embed(tokens), mask=hidden, src_key_padding_mask=padded)
        self.last = x @ self.embed.weight.T
        return self.last


PUBLIC = {
    "x-transformers": ZooModel(lambda w, depth, e: XTransformer(w, depth), loss=shifted_loss),
    "torchtitan": ZooModel(lambda w, depth, e: Titan(w, depth), loss=shifted_loss),
    "timm ViT": ZooModel(lambda w, depth, e: TimmViT(w, depth), images, image_loss),
    "nn.TransformerEncoder": ZooModel(lambda w, depth, e: Encoder(w, depth), loss=shifted_loss),
}
