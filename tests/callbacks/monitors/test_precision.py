"""PrecisionMonitor: healthy attention has float32's error, an attention that rounds one way is named by layer."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional as F

from lightning_mue.callbacks import PrecisionMonitor

ERROR, BIAS = "stability/attention_error/attention", "stability/attention_bias/attention"


def test_a_core_that_is_wrong_is_named(toy):
    model = toy.make_model()
    core, right = model.blocks[1].attention.core, model.blocks[1].attention.core.forward
    core.forward = lambda q, k, v: 1.05 * right(q, k, v)
    _, logger = toy.fit([PrecisionMonitor()], model=model)
    assert len(logger.values(f"{ERROR}/00")) == 6
    assert max(logger.values(f"{ERROR}/00")) < 1e-6
    assert max(logger.values(f"{BIAS}/00")) < 1e-6
    assert logger.values(f"{BIAS}/01") == pytest.approx([0.05] * 6, rel=1e-4)
    assert logger.values(f"{ERROR}_max") == pytest.approx([0.05] * 6, rel=1e-4)


class SelfAttention(nn.Module):
    """As public code has it: one matrix, and torch's fused function."""

    def __init__(self, dropout):
        super().__init__()
        self.qkv, self.proj, self.dropout = nn.Linear(16, 48), nn.Linear(16, 16), dropout

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        return self.proj(y.transpose(1, 2).flatten(2))


class Foreign(LightningModule):
    """A model that declares nothing."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.wte, self.attn, self.lm_head = nn.Embedding(11, 16), SelfAttention(dropout), nn.Linear(16, 11)

    def training_step(self, tokens, batch_idx):
        x = self.wte(tokens)
        return F.cross_entropy(self.lm_head(x + self.attn(x)).flatten(0, 1), tokens.flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_attention_of_any_project(toy):
    _, logger = toy.fit([PrecisionMonitor()], model=Foreign())
    (tag,) = [tag for tag in logger.tags() if tag.startswith(f"{ERROR}/")]
    assert 0 < max(logger.values(tag)) < 1e-6


def test_dropout_is_no_error_and_said_not_to_be_measured(toy):
    with pytest.warns(UserWarning, match="saw no forward pass"):
        _, logger = toy.fit([PrecisionMonitor()], model=Foreign(dropout=0.5))
    assert not [tag for tag in logger.tags() if tag.startswith("stability/")]
