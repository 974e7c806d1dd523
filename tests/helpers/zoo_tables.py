"""What each model of the zoo should be read as, written by hand from the papers' tables, not by the code under test.

A line holds a role and a pattern on names without ``.weight``; ``!`` marks what ends a residual branch, whose multiplier goes into
it. A parameter of two or more dimensions has exactly one line.
"""

from __future__ import annotations

LLAMA_ATTENTION = r"""
embedding    ^model\.embed_tokens
hidden       self_attn\.[qkv]_proj
hidden!      self_attn\.o_proj
unembedding  ^lm_head
"""
LLAMA = (
    LLAMA_ATTENTION
    + r"""
ffn_up       mlp\.(gate|up)_proj
ffn_down!    mlp\.down_proj
"""
)
STACKED = r"""
router       (gate|router)$
expert_up    \.experts\.gate_up_proj$
expert_down! \.experts\.down_proj$
"""
SHARED = r"""
shared_up    shared_experts?\.(gate|up)_proj
shared_down! shared_experts?\.down_proj
"""
#: Where the norm stands behind the branch, it takes the multiplier.
OLMO2 = LLAMA.replace("!", " ") + "norm!  post_(attention|feedforward)_layernorm"
GPT = r"""
embedding    wpe
hidden       attn\.c_attn
hidden!      attn\.c_proj
ffn_up       mlp\.c_fc
ffn_down!    mlp\.c_proj
"""
UNTIED_GPT = GPT + "embedding wte\nunembedding lm_head"
FAIRSEQ = r"""
hidden       attn\.[qkv]_proj
hidden!      attn\.out_proj
ffn_up       \.fc1
ffn_down!    \.fc2
"""
VIT = r"""
embedding    embeddings\.|cls_token|mask_token
hidden       attention\.[qkv]_proj
hidden!      attention\.o_proj
ffn_up       mlp\.fc1
unembedding  classifier
"""
LIT = r"""
embedding    wte|wpe
hidden       attn\.qkv
hidden!      attn\.proj
unembedding  lm_head
"""
MAMBA = r"""
embedding    backbone\.embeddings
hidden       mixer\.(in|x|dt)_proj
hidden!      mixer\.out_proj
scalar       mixer\.A_log
norm         mixer\.conv1d
unembedding  ^lm_head
"""
TABLES = {
    "GPT2": GPT + "tied wte",
    "GPTNeoX": r"""
embedding    embed_in
hidden       query_key_value
hidden!      attention\.dense
ffn_up       dense_h_to_4h
ffn_down!    dense_4h_to_h
unembedding  lm_head
""",
    "OPT": FAIRSEQ + "embedding embed_\nunembedding lm_head",
    "Phi": r"""
embedding    embed_tokens
hidden       self_attn\.[qkv]_proj
hidden!      self_attn\.dense
ffn_up       mlp\.fc1
ffn_down!    mlp\.fc2
unembedding  lm_head
""",
    "Llama": LLAMA,
    "Qwen3": LLAMA,
    "StableLm": LLAMA,
    "Olmo2": OLMO2,
    "Gemma2": LLAMA,
    "Mixtral": LLAMA_ATTENTION + STACKED,
    "Qwen2Moe": LLAMA_ATTENTION + STACKED + SHARED,
    "Qwen3Moe": LLAMA_ATTENTION + STACKED,
    "Olmoe": LLAMA_ATTENTION + STACKED,
    "GptOss": LLAMA_ATTENTION + STACKED + r"bias experts\.gate_up_proj_bias" + "\n" + r"bias! experts\.down_proj_bias",
    "DeepseekV3": STACKED
    + SHARED
    + r"""
embedding    embed_tokens
hidden       self_attn\.(q_a|q_b|kv_b|kv_a)_proj
hidden!      self_attn\.o_proj
ffn_up       mlp\.(gate|up)_proj
ffn_down!    mlp\.down_proj
unembedding  lm_head
""",
    "GraniteMoe": LLAMA_ATTENTION + STACKED,
    "Jamba": LLAMA_ATTENTION
    + STACKED
    + MAMBA.replace("mixer", "mamba")
    .replace("embedding    backbone\\.embeddings\n", "")
    .replace("unembedding  ^lm_head\n", "")
    + "ffn_up feed_forward\\.(gate|up)_proj\nffn_down! feed_forward\\.down_proj",
    "T5": r"""
tied         shared
embedding    relative_attention_bias
hidden       (SelfAttention|EncDecAttention)\.[qkv]
hidden!      (SelfAttention|EncDecAttention)\.o
ffn_up       DenseReluDense\.wi_[01]
ffn_down!    DenseReluDense\.wo
""",
    "MBart": FAIRSEQ + "embedding embed_positions\ntied shared",
    "Bert": r"""
embedding    (position|token_type)_embeddings
hidden       self\.(query|key|value)|transform\.dense
hidden!      attention\.output\.dense
ffn_up       intermediate\.dense
ffn_down!    \d\.output\.dense
tied         word_embeddings
""",
    "Whisper": FAIRSEQ + "embedding conv1|embed_positions\nhidden conv2\ntied embed_tokens",
    "Wav2Vec2": r"""
fixed        feature_extractor
embedding    feature_projection\.projection
hidden       attention\.[qkv]_proj|pos_conv_embed
hidden!      attention\.out_proj
ffn_up       intermediate_dense
ffn_down!    output_dense
unembedding  lm_head
""",
    "ViT": VIT + r"ffn_down! mlp\.fc2",
    "Dinov2": VIT + r"ffn_down! mlp\.fc2" + "\nscalar layer_scale",
    "Swin": VIT + r"ffn_down! mlp\.fc2" + "\nembedding position_bias_table\nhidden downsample",
    "ConvNext": r"""
embedding    patch_embeddings
norm         dwconv
ffn_up       pwconv1
ffn_down!    pwconv2
hidden       downsampling_layer
unembedding  classifier
""",
    "Mamba": MAMBA,
    "Mamba2": MAMBA,
    "minGPT": UNTIED_GPT,
    "nanoGPT": UNTIED_GPT,
    "lecture GPT": r"""
embedding    (token|position)_embedding_table
hidden       heads\.\d+\.(key|query|value)
hidden!      sa\.proj
ffn_up       net\.0
ffn_down!    net\.2
unembedding  lm_head
""",
    "litgpt": LIT + "ffn_up mlp\\.fc_[12]\nffn_down! mlp\\.proj",
    "litgpt moe": LIT + "router mlp\\.gate\nexpert_up \\d\\.fc_[12]\nexpert_down! experts\\.\\d+\\.proj",
    "nanoMoE": LIT.replace("qkv", "c_attn").replace(".proj", ".c_proj")
    + "router w_g\nexpert_up experts\\.c_fc\nexpert_down! experts\\.c_proj",
    "U-Net": r"""
embedding    conv_in|time_embedding\.0
hidden       blocks\.\d+\.(conv1|time_emb_proj)|time_embedding\.2|downsample|upsample|merge
hidden!      blocks\.\d+\.conv2
unembedding  conv_out
""",
    "conv net": "embedding stem\nhidden conv1\nhidden! conv2\nunembedding head",
    "DiT": r"""
embedding    x_embedder|pos_embed|t_embedder\.mlp\.0
hidden       attn\.qkv|adaLN_modulation|t_embedder\.mlp\.2
hidden!      attn\.proj
ffn_up       mlp\.fc1
ffn_down!    blocks\.\d+\.mlp\.fc2
unembedding  final_layer\.linear
""",
}
#: Role -> factors on (learning rate, initial std) when the width grows by d; a tied table has the rule of an embedding.
WIDTH = {
    **dict.fromkeys(
        ("hidden", "ffn_up", "ffn_down", "expert_up", "expert_down", "shared_up", "shared_down"), (-1.0, -0.5)
    ),
    **dict.fromkeys(("router", "unembedding"), (-1.0, -1.0)),
    **dict.fromkeys(("embedding", "tied", "norm", "bias", "scalar", "fixed"), (0.0, 0.0)),
}
#: (model, axis) -> why the plan is refused, and what the error says.
REFUSED = {
    ("Gemma2", "depth"): "starts at zero",  # its gains count from 1, so no multiplier goes into them
    ("JetMoe", "width"): "no role for model.layers.0.self_attention.experts",  # no rule for experts in attention
    ("JetMoe", "depth"): "no role for model.layers.0.self_attention.experts",
    ("JetMoe", "experts"): "no role for model.layers.0.self_attention.experts",
    ("Bart", "width"): "tied embeddings",  # no norm before its head takes the logits' multiplier
}
#: (model, axis) -> what verify finds, rightly: the module's own code leaves the rules.
FOUND = {
    ("Gemma2", "width"): r"embed_tokens.*its square root",
    ("Bart", "depth"): "post-norm layers",
    ("Bert", "depth"): "post-norm layers",
    ("not normalized", "experts"): "norm_topk_prob=True",
    ("Jamba", "experts"): "gates of the active experts probably do not sum to 1",
}
