"""Parts of weights (weight norm, spectral norm, parametrizations, LoRA) are refused in every place, all in one message."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lightning_mue import plan
from lightning_mue.parameterizations.reading.weight_parts import weight_parts


class Adapted(nn.Module):
    """A LoRA layer with the names of PEFT."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})


class LoRALinear(nn.Linear):
    """One as people write it."""

    def __init__(self, inputs, outputs, rank=2):
        super().__init__(inputs, outputs)
        self.A, self.B = nn.Parameter(torch.randn(rank, inputs)), nn.Parameter(torch.zeros(outputs, rank))


def old_weight_norm(m):
    for layer in (m.embed, m.conv, m.lin, m.head):
        nn.utils.weight_norm(layer)
    nn.utils.weight_norm(m.attention, "in_proj_weight")
    nn.utils.weight_norm(m.rnn, "weight_hh_l0")


def new_weight_norm(m):
    for layer in (m.embed, m.conv, m.lin, m.head):
        parametrizations.weight_norm(layer)
    parametrizations.weight_norm(m.attention, "in_proj_weight")
    parametrizations.weight_norm(m.rnn, "weight_hh_l0")


def old_spectral_norm(m):
    for layer in (m.embed, m.conv, m.lin, m.head):
        nn.utils.spectral_norm(layer)


def new_spectral_norm(m):
    for layer in (m.embed, m.conv, m.lin, m.head):
        parametrizations.spectral_norm(layer)


def orthogonal(m):
    parametrizations.orthogonal(m.lin)


def lora(m):
    m.lin, m.head = Adapted(m.lin), Adapted(m.head)


def own_lora(m):
    m.lin = LoRALinear(*m.lin.weight.T.shape)


PARTS = {
    old_weight_norm: 12,
    new_weight_norm: 12,
    old_spectral_norm: 4,
    new_spectral_norm: 4,
    orthogonal: 1,
    lora: 4,
    own_lora: 2,
}


class Model(nn.Module):
    def __init__(self, width=8, change=None):
        super().__init__()
        self.hparams = {"width": width, "change": change}
        self.embed, self.conv, self.lin = nn.Embedding(10, width), nn.Conv1d(width, width, 3), nn.Linear(width, width)
        self.attention, self.rnn = nn.MultiheadAttention(width, width // 4), nn.LSTM(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)
        if change is not None:
            change(self)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", PARTS, ids=lambda change: change.__name__)
def test_parts_are_refused_together(change):
    target = Model(16, change)
    parts = set(weight_parts(target))
    assert len(parts) == PARTS[change]
    with pytest.raises(
        ValueError, match=rf"model: found {PARTS[change]} parameter\(s\) that are parts of a weight"
    ) as error:
        plan(target, base={"width": 8}, rule="mup")
    assert all(name in str(error.value) for name in parts)
    assert plan(Model(8, change), base={"width": 8}, rule="mup").same_size


def test_the_remedies_work():
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm((old := Model(16)).lin)
    nn.utils.remove_weight_norm(old.lin)
    new = Model(16, new_spectral_norm)
    for layer in (new.embed, new.conv, new.lin, new.head):
        parametrize.remove_parametrizations(layer, "weight")
    assert weight_parts(old) == weight_parts(new) == {}
    for model in (old, new):
        assert plan(model, base=lambda: Model(8), rule="mup")["lin.weight"].lr == 0.5


def test_what_only_looks_like_a_part_is_none():
    model = Model(8)
    model.w_g, model.w_v = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))  # gates and values
    model.explore = copy.deepcopy(model.lin)
    assert weight_parts(model) == {}
    model.w_g = nn.Parameter(torch.ones(8, 1))
    assert weight_parts(model) == {"w_g": "weight norm", "w_v": "weight norm"}
    model.w_g = nn.Parameter(torch.ones(1, 8))  # the gate of the only head
    assert weight_parts(model) == {}
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.lin, dim=1)  # a length for each column
    assert weight_parts(model) == {"lin.weight_g": "weight norm", "lin.weight_v": "weight norm"}


def test_frozen_parts_are_not_in_the_way():
    frozen = Model(16, new_weight_norm)
    for name in weight_parts(frozen):
        frozen.get_parameter(name).requires_grad_(False)
    base = Model(8, new_weight_norm)
    for name in weight_parts(base):
        base.get_parameter(name).requires_grad_(False)
    assert plan(frozen, base=base, rule="mup")["norm.weight"].lr == 1.0
