"""Roles for those who only watch a model: as a plan reads them, and without its refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_mue import MoELanguageModel, plan
from lightning_mue.parameterizations.planning.model_roles import read_parameters


def roles(model, patterns=None):
    return {info.name: None if info.role is None else str(info.role) for info in read_parameters(model, patterns)}


def test_of_a_model_that_a_plan_takes_the_roles_are_the_plans():
    with torch.device("meta"):
        model = MoELanguageModel(vocab_size=11, width=8, n_heads=2, depth=2, n_experts=3, top_k=2, context_length=5)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2)
    for module in (model, encoder):
        assert roles(module) == {entry.name: entry.role for entry in plan(module, rule="sp").parameters}


class Strange(nn.Module):
    """A matrix of no kind that has a role, beside layers whose roles are plain."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(4), "fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 4)}) for _ in range(2)
        )
        self.mixing = nn.Parameter(torch.randn(3, 4))
        self.lm_head = nn.Linear(4, 7, bias=False)


def test_what_a_plan_refuses_has_the_roles_that_can_be_told():
    model = Strange()
    with pytest.raises(ValueError, match=r"no role for mixing"):
        plan(model, rule="sp")
    found = roles(model)
    assert found.pop("mixing") is None
    assert found["embed.weight"] == "embedding"
    assert found["layers.1.norm.weight"] == "norm"
    assert (found["layers.0.fc1.weight"], found["layers.0.fc2.weight"]) == ("ffn_up", "ffn_down")
    assert found["layers.0.fc1.bias"] == "bias"
    assert found["lm_head.weight"] == "unembedding"
    assert None not in found.values()
    assert roles(model, {"mixing": "hidden"})["mixing"] == "hidden"
    with pytest.raises(ValueError, match=r"roles\['mixing'\]: found 'hiden'"):
        roles(model, {"mixing": "hiden"})
