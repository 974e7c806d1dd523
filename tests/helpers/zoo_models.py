"""Tiny models of transformers, each built anew at a width, a depth and a number of experts, with a batch and a loss.

Heads have 8 dimensions at every width. ``experts`` is 0 for the dense form, where the architecture has one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers needs Python 3.11")
transformers.logging.set_verbosity_error()
VOCABULARY = 48
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tokens(seed: int = 0) -> torch.Tensor:
    """Two samples of 12 tokens, shape [2, 12]."""
    return torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class ZooModel:
    """One architecture: ``make(width, depth, experts)``, its batch, and its loss (model, batch) -> scalar."""

    make: Callable[[int, int, int], torch.nn.Module]
    batch: Callable[[], Any] = tokens
    loss: Callable[[Any, Any], torch.Tensor] = field(
        default=lambda model, batch: model(input_ids=batch, labels=batch).loss
    )


def build(kind: str, head: str, **sizes: Any) -> torch.nn.Module:
    return getattr(transformers, kind + head)(getattr(transformers, f"{kind}Config")(**sizes))


#: Llama's names of sizes, for a model of two layers; what another architecture calls otherwise has its default.
CAUSAL_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 4, **TOKENS}
CAUSAL_SIZES |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}


def causal(kind: str, moe: Callable[[int, int], dict[str, Any]] | None = None, **own: Any) -> ZooModel:
    """A causal language model whose config names its sizes as Llama's does."""

    def make(width: int, depth: int, experts: int) -> torch.nn.Module:
        heads = width // 8
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "intermediate_size": 2 * width, **TOKENS}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": 8}
        sizes |= {"tie_word_embeddings": False, "use_cache": False} | own
        return build(kind, "ForCausalLM", **sizes | (moe(width, experts) if moe else {}))

    return ZooModel(make)


def named(kind: str, head: str, names: str, **own: Any) -> ZooModel:
    """A language model with other names of sizes: of width, depth, heads and FFN, separated by spaces."""
    width_name, depth_name, heads_name, ffn_name = names.split()

    def make(width: int, depth: int, experts: int) -> torch.nn.Module:
        sizes = {width_name: width, depth_name: depth, heads_name: width // 8, ffn_name: 2 * width}
        return build(kind, head, **{**TOKENS, **sizes, **own})

    return ZooModel(make)


def seq2seq(kind: str, **own: Any) -> ZooModel:
    """Bart's names of sizes; encoder and decoder have the same depth and see different tokens."""

    def make(width: int, depth: int, experts: int) -> torch.nn.Module:
        sizes = {"d_model": width, **TOKENS, "decoder_start_token_id": 1}
        for stack in ("encoder", "decoder"):
            sizes |= {f"{stack}_layers": depth, f"{stack}_attention_heads": width // 8, f"{stack}_ffn_dim": 2 * width}
        return build(kind, "ForConditionalGeneration", **{**sizes, **own})

    return ZooModel(
        make, lambda: (tokens(), tokens(1)), lambda model, batch: model(input_ids=batch[0], labels=batch[1]).loss
    )


def t5(width: int, depth: int, experts: int) -> torch.nn.Module:
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 2 * width, "num_layers": depth, "num_heads": width // 8}
    own = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    return build("T5", "ForConditionalGeneration", **{**TOKENS, **sizes, **own})


def whisper(width: int, depth: int, experts: int) -> torch.nn.Module:
    made = seq2seq("Whisper", num_mel_bins=8, max_source_positions=8, max_target_positions=16)
    return made.make(width, depth, experts)


def mamba(kind: str) -> ZooModel:
    def make(width: int, depth: int, experts: int) -> torch.nn.Module:
        own = {"head_dim": 8, "num_heads": width // 4, "n_groups": 1, "chunk_size": 4} if kind == "Mamba2" else {}
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "state_size": 8, "tie_word_embeddings": False}
        return build(kind, "ForCausalLM", **{**TOKENS, **sizes, **own})

    return ZooModel(make)


def vision(kind: str, **own: Any) -> ZooModel:
    def make(width: int, depth: int, experts: int) -> torch.nn.Module:
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 8}
        sizes |= {"intermediate_size": 2 * width, "image_size": 8, "patch_size": 2, "num_channels": 3, "num_labels": 10}
        return build(kind, "ForImageClassification", **{**sizes, **own})

    return ZooModel(make, images, image_loss)


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return noise(2, 3, 8, 8), torch.tensor([1, 7])


def image_loss(model: Any, batch: Any) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch[0]).logits, batch[1])


def stages(kind: str) -> ZooModel:
    """Swin and ConvNeXt: two stages of ``depth`` blocks, the second twice as wide."""

    def make(width: int, depth: int, experts: int) -> torch.nn.Module:
        sizes: dict[str, Any] = {"num_channels": 3, "num_labels": 10, "patch_size": 2, "depths": [depth, depth]}
        if kind == "Swin":
            sizes |= {"embed_dim": width, "num_heads": [width // 8, width // 4], "image_size": 8, "window_size": 2}
        else:
            sizes |= {
                "hidden_sizes": [width, 2 * width],
                "num_stages": 2,
                "image_size": 8,
                "layer_scale_init_value": 1.0,
            }
        return build(kind, "ForImageClassification", **sizes)

    return ZooModel(make, images, image_loss)


def wav2vec2(width: int, depth: int, experts: int) -> torch.nn.Module:
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": width // 8}
    sizes |= {"intermediate_size": 2 * width, "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3)}
    own = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0}
    own |= {"ctc_zero_infinity": True, "do_stable_layer_norm": True}
    return build("Wav2Vec2", "ForCTC", **{**TOKENS, **sizes, **own})


def plain_wav2vec2(width: int, depth: int, experts: int) -> torch.nn.Module:
    """Without the weight norm of its position convolution."""
    model = wav2vec2(width, depth, experts)
    convolution = model.wav2vec2.encoder.pos_conv_embed.conv  # type: ignore[union-attr]
    torch.nn.utils.parametrize.remove_parametrizations(convolution, "weight")
    return model


def experts_of(kind: str, top: str = "num_experts_per_tok", **own: Any) -> Callable[[int, int], dict[str, Any]]:
    """Sizes of a Mixture of Experts whose config calls their number ``kind``."""
    return lambda width, experts: {kind: experts, top: 2, "moe_intermediate_size": width, **own}


def qwen2_moe(width: int, experts: int) -> dict[str, Any]:
    sizes = experts_of("num_experts")(width, experts)
    return {**sizes, "shared_expert_intermediate_size": width, "norm_topk_prob": True}


def deepseek(width: int, experts: int) -> dict[str, Any]:
    ranks = {"q_lora_rank": width // 2, "kv_lora_rank": width // 2, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
    moe = {"n_routed_experts": experts, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
    return {**ranks, "v_head_dim": 8, "head_dim": 4, **moe, "moe_intermediate_size": width, "first_k_dense_replace": 1,
            "num_key_value_heads": width // 8}  # fmt: skip


def jamba(width: int, experts: int) -> dict[str, Any]:
    moe = {"num_experts": experts, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
    return {**moe, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False}


GPT_NAMES = "n_embd n_layer n_head n_inner"
BERT_NAMES = "hidden_size num_hidden_layers num_attention_heads intermediate_size"
DENSE = {
    "GPT2": named("GPT2", "LMHeadModel", GPT_NAMES),
    "GPTNeoX": named("GPTNeoX", "ForCausalLM", BERT_NAMES),
    "OPT": named(
        "OPT", "ForCausalLM", "hidden_size num_hidden_layers num_attention_heads ffn_dim", tie_word_embeddings=False
    ),
    "Phi": named("Phi", "ForCausalLM", BERT_NAMES),
    "Llama": causal("Llama"),
    "Qwen3": causal("Qwen3"),
    "Olmo2": causal(
        "Olmo2", initializer_range=0.2
    ),  # at 0.02 its branches would lie below the eps of the norms behind them
    "Gemma2": causal("Gemma2"),
    "StableLm": causal("StableLm"),
}
MOE = {
    "Mixtral": causal("Mixtral", experts_of("num_local_experts")),
    "Qwen2Moe": causal("Qwen2Moe", qwen2_moe),
    "Qwen3Moe": causal("Qwen3Moe", experts_of("num_experts", norm_topk_prob=True)),
    "Olmoe": causal("Olmoe", experts_of("num_experts", norm_topk_prob=True)),
    "not normalized": causal("Qwen3Moe", experts_of("num_experts", norm_topk_prob=False)),
    "GptOss": causal("GptOss", experts_of("num_local_experts")),
    "DeepseekV3": causal("DeepseekV3", deepseek),
    "GraniteMoe": causal("GraniteMoe", experts_of("num_local_experts")),
    "JetMoe": causal("JetMoe", experts_of("num_local_experts"), kv_channels=8),
    "Jamba": causal("Jamba", jamba),
}
OTHERS = {
    "T5": ZooModel(t5, lambda: (tokens(), tokens(1)), lambda model, b: model(input_ids=b[0], labels=b[1]).loss),
    "Bart": seq2seq("Bart"),
    "MBart": seq2seq("MBart"),
    "Bert": named("Bert", "ForMaskedLM", BERT_NAMES),
    "Whisper": ZooModel(
        whisper, lambda: (noise(2, 8, 16), tokens()), lambda model, b: model(input_features=b[0], labels=b[1]).loss
    ),
    "Wav2Vec2": ZooModel(
        plain_wav2vec2, lambda: (noise(2, 400), tokens()[:, :4]), lambda model, b: model(b[0], labels=b[1]).loss
    ),
    "ViT": vision("ViT"),
    "Dinov2": vision("Dinov2"),
    "Swin": stages("Swin"),
    "ConvNext": stages("ConvNext"),
    "Mamba": mamba("Mamba"),
    "Mamba2": mamba("Mamba2"),
}
