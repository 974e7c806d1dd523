"""The converters of `convert/`, with `MoELayer` as the class that they make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_mue.moe.convert import pretrained, replacing, upcycling
from lightning_mue.moe.layer import MoELayer


def moe_from_ffn(
    module: nn.Module | Sequence[nn.Module],
    n_experts: int,
    top_k: int = 2,
    *,
    layer_class: type[MoELayer] = MoELayer,
    **arguments: Any,
) -> MoELayer:
    """Makes a layer out of a dense feed-forward network: see `convert/upcycling.py` for the arguments."""
    return upcycling.moe_from_ffn(module, n_experts, top_k, layer_class=layer_class, **arguments)


def moe_from_transformers(block: nn.Module, *, layer_class: type[MoELayer] = MoELayer, **arguments: Any) -> MoELayer:
    """Makes a layer that equals a transformers MoE block: see `convert/pretrained.py` for the arguments."""
    return pretrained.moe_from_transformers(block, layer_class=layer_class, **arguments)


def replace_moe_blocks(model: nn.Module, *, layer_class: type[MoELayer] = MoELayer, **arguments: Any) -> list[str]:
    """Replaces a model's MoE blocks by layers, in place: see `convert/replacing.py` for the arguments."""
    return replacing.replace_moe_blocks(model, layer_class=layer_class, **arguments)
