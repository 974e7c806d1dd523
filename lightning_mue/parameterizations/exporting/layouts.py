"""Where each weight of a transformer stands in the code bases that people train with: one table, read in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

#: Layout -> place -> names, alternatives in order. ``{l}`` stands for the layer, ``{e}`` for an expert of a list.
#: A name of several places (``q+k+v``) is one weight that holds them all.
LAYOUTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "lightning_mue": {
        "embedding": ("embedding.weight",),
        "unembedding": ("unembedding.weight",),
        "final_norm": ("final_norm.weight",),
        "attention_norm": ("blocks.{l}.attention_norm.weight",),
        "ffn_norm": ("blocks.{l}.ffn_norm.weight",),
        **{place: (f"blocks.{{l}}.attention.w_{place}",) for place in "qkvo"},
        "attention_gate": ("blocks.{l}.attention.w_g",),
        "q_norm": ("blocks.{l}.attention.q_norm.weight",),
        "k_norm": ("blocks.{l}.attention.k_norm.weight",),
        **{place: (f"blocks.{{l}}.ffn.w_{place}",) for place in ("gate", "up", "down")},
        **{f"{place}.bias": (f"blocks.{{l}}.ffn.b_{place}",) for place in ("gate", "up", "down")},
        "router": ("blocks.{l}.ffn.router.weight",),
        "shared_router": ("blocks.{l}.ffn.shared_gate.weight",),
        **{f"expert_{place}": (f"blocks.{{l}}.ffn.experts.w_{place}",) for place in ("gate", "up", "down")},
        **{f"expert_{place}.bias": (f"blocks.{{l}}.ffn.experts.b_{place}",) for place in ("gate", "up", "down")},
        **{f"shared_{place}": (f"blocks.{{l}}.ffn.shared.w_{place}",) for place in ("gate", "up", "down")},
        **{f"shared_{place}.bias": (f"blocks.{{l}}.ffn.shared.b_{place}",) for place in ("gate", "up", "down")},
    },
    # Llama, Mistral, Qwen2, Qwen3, Mixtral, OLMoE, DeepSeek without latent attention; stacked experts (transformers 5) and lists.
    "transformers": {
        "embedding": ("embed_tokens.weight",),
        "unembedding": ("lm_head.weight",),
        "final_norm": ("model.norm.weight",),
        "attention_norm": ("layers.{l}.input_layernorm.weight",),
        "ffn_norm": ("layers.{l}.post_attention_layernorm.weight",),
        **{place: (f"layers.{{l}}.self_attn.{place}_proj.weight",) for place in "qkvo"},
        **{f"{place}.bias": (f"layers.{{l}}.self_attn.{place}_proj.bias",) for place in "qkvo"},
        "q_norm": ("layers.{l}.self_attn.q_norm.weight",),
        "k_norm": ("layers.{l}.self_attn.k_norm.weight",),
        **{place: (f"layers.{{l}}.mlp.{place}_proj.weight",) for place in ("gate", "up", "down")},
        "router": ("layers.{l}.mlp.gate.weight", "layers.{l}.block_sparse_moe.gate.weight"),
        "shared_router": ("layers.{l}.mlp.shared_expert_gate.weight",),
        "expert_gate+expert_up": ("layers.{l}.mlp.experts.gate_up_proj",),
        "expert_gate": (
            "layers.{l}.mlp.experts.{e}.gate_proj.weight",
            "layers.{l}.block_sparse_moe.experts.{e}.w1.weight",
        ),
        "expert_up": ("layers.{l}.mlp.experts.{e}.up_proj.weight", "layers.{l}.block_sparse_moe.experts.{e}.w3.weight"),
        "expert_down": (
            "layers.{l}.mlp.experts.down_proj",
            "layers.{l}.mlp.experts.{e}.down_proj.weight",
            "layers.{l}.block_sparse_moe.experts.{e}.w2.weight",
        ),
        **{
            f"shared_{place}": tuple(
                f"layers.{{l}}.mlp.{name}.{place}_proj.weight" for name in ("shared_expert", "shared_experts")
            )
            for place in ("gate", "up", "down")
        },
    },
    # torchtitan 0.3, and the names of 0.1 and 0.2 where they differ.
    "torchtitan": {
        "embedding": ("tok_embeddings.weight",),
        "unembedding": ("lm_head.weight", "output.weight"),
        "final_norm": ("norm.weight",),
        "attention_norm": ("layers.{l}.attention_norm.weight",),
        "ffn_norm": ("layers.{l}.ffn_norm.weight",),
        "q+k+v": ("layers.{l}.attention.qkv_linear.wqkv.weight",),
        **{
            place: (f"layers.{{l}}.attention.qkv_linear.w{place}.weight", f"layers.{{l}}.attention.w{place}.weight")
            for place in "qkv"
        },
        "o": ("layers.{l}.attention.wo.weight",),
        "q_norm": ("layers.{l}.attention.q_norm.weight",),
        "k_norm": ("layers.{l}.attention.k_norm.weight",),
        "gate": ("layers.{l}.feed_forward.w1.weight",),
        "down": ("layers.{l}.feed_forward.w2.weight",),
        "up": ("layers.{l}.feed_forward.w3.weight",),
        "router": ("layers.{l}.moe.router.gate.weight",),
        **{
            f"expert_{place}": (
                f"layers.{{l}}.moe.routed_experts.inner_experts.{w}_{sides}",
                f"layers.{{l}}.moe.experts.{w}",
            )
            for place, w, sides in (("gate", "w1", "EFD"), ("down", "w2", "EDF"), ("up", "w3", "EFD"))
        },
        **{
            f"shared_{place}": (f"layers.{{l}}.moe.shared_experts.{w}.weight",)
            for place, w in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
        },
    },
    # Megatron core 0.12 and later: experts of SequentialMLP and TEGroupedMLP; norms of the local and the fused layer specs.
    "megatron": {
        "embedding": ("embedding.word_embeddings.weight",),
        "unembedding": ("output_layer.weight",),
        "final_norm": ("decoder.final_layernorm.weight",),
        "attention_norm": (
            "decoder.layers.{l}.input_layernorm.weight",
            "decoder.layers.{l}.self_attention.linear_qkv.layer_norm_weight",
        ),
        "ffn_norm": (
            "decoder.layers.{l}.pre_mlp_layernorm.weight",
            "decoder.layers.{l}.mlp.linear_fc1.layer_norm_weight",
        ),
        "q+k+v": ("decoder.layers.{l}.self_attention.linear_qkv.weight",),
        "o": ("decoder.layers.{l}.self_attention.linear_proj.weight",),
        "q_norm": ("decoder.layers.{l}.self_attention.q_layernorm.weight",),
        "k_norm": ("decoder.layers.{l}.self_attention.k_layernorm.weight",),
        "gate+up": ("decoder.layers.{l}.mlp.linear_fc1.weight",),
        "down": ("decoder.layers.{l}.mlp.linear_fc2.weight",),
        "router": ("decoder.layers.{l}.mlp.router.weight",),
        "expert_gate+expert_up": (
            "decoder.layers.{l}.mlp.experts.local_experts.{e}.linear_fc1.weight",
            "decoder.layers.{l}.mlp.experts.linear_fc1.weight{e}",
        ),
        "expert_down": (
            "decoder.layers.{l}.mlp.experts.local_experts.{e}.linear_fc2.weight",
            "decoder.layers.{l}.mlp.experts.linear_fc2.weight{e}",
        ),
        "shared_router": ("decoder.layers.{l}.mlp.shared_experts.gate_weight",),
        "shared_gate+shared_up": ("decoder.layers.{l}.mlp.shared_experts.linear_fc1.weight",),
        "shared_down": ("decoder.layers.{l}.mlp.shared_experts.linear_fc2.weight",),
    },
}


@dataclass(frozen=True)
class Place:
    """What a parameter is in a transformer.

    Attributes:
        parts: ``("q",)``; several for a fused weight: ``("expert_gate", "expert_up")``.
        layer: Its layer, or None for what stands outside the layers.
    """

    parts: tuple[str, ...]
    layer: int | None


def place_of(name: str) -> Place | None:
    """The place of a parameter, by its name in any of the layouts; None where no layout has it.

    Example:
        >>> place_of("model.layers.3.self_attn.q_proj.weight")
        Place(parts=('q',), layer=3)
    """
    for pattern, parts in _patterns():
        if (found := pattern.search(name)) is not None:
            layer = found.groupdict().get("layer")
            return Place(parts, None if layer is None else int(layer))
    return None


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]:
    return tuple(
        (_pattern(name), tuple(places.split("+")))
        for layout in LAYOUTS.values()
        for places, names in layout.items()
        for name in names
    )


def _pattern(name: str) -> re.Pattern[str]:
    escaped = re.escape(name).replace(r"\{l\}", r"(?P<layer>\d+)").replace(r"\{e\}", r"\d+")
    return re.compile(rf"(^|\.){escaped}$")
