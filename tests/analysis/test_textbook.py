"""The coordinate check of a textbook language model that knows nothing of this package."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mue.analysis import coordinate_check


class Layer(nn.Module):
    """Pre-norm, default initialization, heads of 16; attention as torch's module or as one fused matrix."""

    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.heads = width // 16
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = None if fused else nn.MultiheadAttention(width, self.heads, batch_first=True)
        if fused:
            self.qkv, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc, self.proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, h: torch.Tensor) -> torch.Tensor:
        if self.attn is not None:
            mask = nn.Transformer.generate_square_subsequent_mask(h.shape[1])
            return self.attn(h, h, h, attn_mask=mask, need_weights=False, is_causal=True)[0]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, -1))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attend(self.ln_1(x))
        return x + self.proj(F.gelu(self.fc(self.ln_2(x))))


class Textbook(nn.Module):
    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(64, width), nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Layer(width, fused) for _ in range(2))
        self.ln_f, self.head = nn.LayerNorm(width), nn.Linear(width, 64, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tok(ids) + self.pos(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


def batches(seed: int, count: int = 15) -> list[torch.Tensor]:
    """Sequences with skewed frequencies, in which a token often repeats the one before."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(1 / torch.arange(1.0, 65), count * 8 * 33, replacement=True, generator=generator)
    ids = drawn.view(count, 8, 33)
    again = torch.rand(ids.shape, generator=generator) < 0.5
    return list(torch.where(again, ids.roll(1, -1), ids))


def check(rule: str, fused: bool, seed: int):
    return coordinate_check(
        lambda width: Textbook(width, fused),
        [{"width": width} for width in (64, 128, 256)],
        batches(seed),
        rule=rule,
        loss=lambda model, ids: F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        seeds=range(3 * seed, 3 * seed + 3),
    )


@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "MultiheadAttention"])
def test_a_sound_plan_passes_and_sp_fails(fused):
    good = check("complete-p", fused, seed=0)
    assert good.passed, good.verdict
    settled = [slope.name for slope in good.slopes() if slope.status == "settles"]
    assert settled in ([], ["head"])
    assert ("larger sizes" in good.verdict) == bool(settled)
    bad = check("sp", fused, seed=0)
    assert not bad.passed
    assert "settles" not in {slope.status for slope in bad.slopes()}
