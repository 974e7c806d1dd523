"""Checks of the arguments of a language model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from lightning_mue.checks import (
    mismatch,
    require_non_negative,
    require_number,
    require_positive,
    require_size,
    require_type,
    type_error,
    value_error,
)
from lightning_mue.moe import MoELayer
from lightning_mue.moe.settings import require_groups


def check_sizes(given: Mapping[str, Any]) -> None:
    """Refuses sizes and numbers of the wrong type or out of range."""
    sizes = ("vocab_size", "context_length", "width", "depth", "n_heads", "moe_every", "n_expert_groups")
    optional = [name for name in ("n_kv_heads", "head_dim", "ffn_width", "expert_width") if given[name] is not None]
    require_positive(**{name: given[name] for name in (*sizes, *optional)})
    require_size(n_experts=given["n_experts"], top_k=given["top_k"])
    for name in ("qk_norm", "tie_embeddings", "ffn_bias", "gated_attention", "uniform_init"):
        require_type(name, given[name], bool, "true or false")
    for name in ("rope_base", "bytes_per_token"):
        require_number(name, given[name], above=0)
    factors = [name for name in given if name.endswith(("_std", "_multiplier")) and given[name] is not None]
    require_non_negative(**{name: given[name] for name in factors})
    if given["uniform_init"] and given["init_std"] is not None:
        do = "Leave init_std out, or set uniform_init to false."
        raise value_error(
            "init_std", found=given["init_std"], expected="null with uniform_init, which sets the std", do=do
        )


def check_effects(given: Mapping[str, Any]) -> None:
    """Refuses or warns of arguments that have no effect; not those of experts in a model without, which may be a base."""
    if given["tie_embeddings"] and given["embedding_std"] != 1.0:
        expected = "its default with tie_embeddings=True, where unembedding_std is the standard deviation of both"
        raise value_error("embedding_std", found=given["embedding_std"], expected=expected, do="Give unembedding_std.")
    if given["n_experts"] and given["moe_every"] > given["depth"]:  # warned of only: it may be a dense base
        found = (
            f"{given['moe_every']} with depth={given['depth']} and n_experts={given['n_experts']}: no block has experts"
        )
        do = "Lower moe_every, or set n_experts=0."
        expected = "at most the depth"
        warnings.warn(mismatch("moe_every", found=found, expected=expected, do=do), stacklevel=3)


def check_options(n_experts: int, top_k: int, n_groups: int, options: Mapping[str, Any]) -> None:
    """Refuses what an MoE layer would refuse, in a model without one too: it may be the base of a model with experts."""
    for name, own in (("bias", "ffn_bias"), ("n_groups", "n_expert_groups")):
        if name in options:
            raise type_error(
                name, found=options[name], expected=f"nothing: the model calls it {own}", do=f"Give {own}."
            )
    if n_experts:
        require_groups(n_groups, n_experts, top_k, "n_expert_groups")
    else:
        n_experts = top_k = n_groups
    shared_width = options.get("shared_width") or 1
    with torch.device("meta"):
        MoELayer(1, 1, n_experts, top_k, n_groups=n_groups, **{**options, "shared_width": shared_width})


def infer_head_dim(width: int, n_heads: int, n_kv_heads: int, head_dim: int | None) -> int:
    """The given head dimension, or ``width / n_heads``. Refuses numbers of heads that do not divide what they must."""
    if n_heads % n_kv_heads:
        expected = f"a divisor of n_heads={n_heads}: every key/value head serves equally many query heads"
        raise value_error("n_kv_heads", found=n_kv_heads, expected=expected)
    if head_dim is not None:
        return head_dim
    if width % n_heads:
        do = "Choose a divisor, or give head_dim."
        raise value_error("n_heads", found=n_heads, expected=f"a divisor of width={width}", do=do)
    return width // n_heads
