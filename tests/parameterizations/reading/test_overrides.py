"""Overrides of a base inside configurations of all forms."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_mue.parameterizations.reading.base import build_base, changes


@dataclass
class Config:
    n_embd: int = 64
    n_head: int = 4
    head_dim: int | None = None

    def __post_init__(self):
        self.head_dim = self.head_dim or self.n_embd // self.n_head


def llama():
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaConfig(hidden_size=64, num_attention_heads=4, vocab_size=30)


def width_of(config):
    values = config if isinstance(config, dict) else vars(config)
    return values.get("n_embd", values.get("hidden_size"))


class Kept(LightningModule):
    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters()
        self.seen, self.layer = config, nn.Linear(width_of(config), 2)


class Flat(LightningModule):
    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters(config)
        self.seen, self.layer = self.hparams, nn.Linear(self.hparams["n_embd"], 2)


class Plain(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = self.seen = config
        self.layer = nn.Linear(width_of(config), 2)


FORMS = {
    "dict": lambda: Kept({"n_embd": 64, "n_head": 4}),
    "Namespace": lambda: Kept(argparse.Namespace(n_embd=64, n_head=4)),
    "dataclass": lambda: Kept(Config()),
    "all hparams": lambda: Flat({"n_embd": 64, "n_head": 4}),
    "attribute": lambda: Plain(Config()),
    "transformers": lambda: Kept(llama()),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_part_is_replaced_and_the_rest_kept(form):
    model = FORMS[form]()
    name, heads = ("hidden_size", "num_attention_heads") if form == "transformers" else ("n_embd", "n_head")
    before = copy.deepcopy(model.seen)
    for base in ({f"config.{name}": 16}, {"config": {name: 16}}, {name: 16}):
        made = build_base(model, base)
        assert made.layer.weight.shape == (2, 16)
        assert (made.seen[heads] if isinstance(made.seen, dict) else getattr(made.seen, heads)) == 4
        if form in ("dataclass", "attribute", "transformers"):
            assert made.seen.head_dim == 4  # 16 / 4, not the target's 64 / 4
        assert (model.seen, model.layer.weight.shape) == (before, (2, 64))
    with pytest.raises(
        ValueError, match=rf"base\.config\.{name}x: found 'config\.{name}x'.*Did you mean 'config\.{name}'"
    ):
        build_base(model, {f"config.{name}x": 16})
    with pytest.raises(ValueError, match=r"base.*zzz"):
        build_base(model, {"config": {"zzz": 16}})
    with pytest.raises(ValueError, match=r"^base"):
        build_base(model, {"config": {name: "wide"}})


def test_modules_that_replace_blocks_are_planned_on_meta():
    transformers = pytest.importorskip("transformers")
    from lightning_mue import plan
    from lightning_mue.moe import replace_moe_blocks

    class Replaced(LightningModule):
        def __init__(self, width=32):
            super().__init__()
            self.save_hyperparameters()
            sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_local_experts": 2}
            heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8}
            self.model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
            replace_moe_blocks(self.model)

    with torch.device("meta"):
        target = Replaced()
    scaling = plan(target, base={"width": 16})
    assert scaling["model.model.layers.0.mlp.moe.experts.w_up"].lr == 0.5


class Inner(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)


class Outer(LightningModule):
    def __init__(self, net: Inner, depth: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net


@pytest.mark.parametrize("base", [{"net.init_args.width": 8}, {"net": {"init_args": {"width": 8}}}, {"net.width": 8}])
def test_a_base_of_lightning_cli_can_be_rebuilt_in_its_turn(base):
    """A verification makes the target near the base, and rebuilds it for its plan."""
    outer = Outer(Inner())
    inner = {"class_path": f"{__name__}.Inner", "init_args": {"width": 32}}
    outer._set_hparams({"net": inner, "depth": 2, "_instantiator": "lightning.pytorch.cli.instantiate_module"})
    assert [change[1:] for change in changes(outer, base)] == [(32, 8)]
    made = build_base(outer, base)
    assert made.net.linear.in_features == 8
    assert build_base(made, {"net.init_args.width": 16}).net.linear.in_features == 16
    assert build_base(made, {}).net.linear.in_features == 8


def test_values_are_paired_at_any_depth():
    keeps = Flat.__new__(Flat)
    nn.Module.__init__(keeps)
    keeps._hparams_initial = None
    keeps._set_hparams({"a": {"b": {"c": 3}, "d": 4}, "e": 5})
    base = {"a": {"b": {"c": 1}}, "a.d": 2, "e": 1, "f": 7}
    assert sorted(changes(keeps, base)) == [("a.b.c", 3, 1), ("a.d", 4, 2), ("e", 5, 1)]  # there is no f
