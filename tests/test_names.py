"""One reading of names: the same module is a head, a table or a vector for the plan, the optimizer and the monitors."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_mue import plan
from lightning_mue.callbacks import LogitsZMonitor
from lightning_mue.names import (
    all_indices,
    clean_name,
    is_elementwise,
    is_embedding,
    is_head,
    is_vector,
    plain_name,
    split_layer,
)
from lightning_mue.optim import HyperSphereOptimizer

VOCAB = 24


class Model(LightningModule):
    """Two numbered blocks between a table and what a test adds, at a dotted path."""

    def __init__(self, path, make, width):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"norm": nn.LayerNorm(width), "fc1": nn.Linear(width, 2 * width), "fc2": nn.Linear(2 * width, width)}
            )
            for _ in range(2)
        )
        self.norm_f = nn.LayerNorm(width)
        *parents, leaf = path.split(".")
        owner = self
        for parent in parents:
            if not hasattr(owner, parent):
                setattr(owner, parent, nn.Module())
            owner = getattr(owner, parent)
        setattr(owner, leaf, make(width))


class StateSpace(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.A_log = nn.Parameter(torch.arange(1.0, 5.0).log().expand(width, 4).clone())


def linear(width):
    return nn.Linear(width, VOCAB, bias=False)


def table(width):
    return nn.Embedding(VOCAB, width)


def normed_table(width):
    return nn.utils.parametrizations.weight_norm(nn.Embedding(VOCAB, width))


def normed_head(width):
    return nn.utils.parametrizations.weight_norm(nn.Linear(width, VOCAB, bias=False))


def several(make):
    return lambda width: nn.ModuleList([make(width), make(width)])


def saved_head(width):
    """As PEFT keeps a head that is trained beside its adapters."""
    wrapper = nn.Module()
    wrapper.original_module = linear(width).requires_grad_(False)
    wrapper.modules_to_save = nn.ModuleDict({"default": linear(width)})
    return wrapper


def saved_table(width):
    wrapper = nn.Module()
    wrapper.modules_to_save = nn.ModuleDict({"default": table(width)})
    return wrapper


REFUSED = None  # the plan does not scale the parts of a weight norm by themselves
HEAD, TABLE = ("unembedding", "adam_sphere", True), ("embedding", "adamw", False)
HIDDEN_UP = ("ffn_up", "sphere", False)

CASES = [
    *((name, linear, HEAD) for name in ("lm_head", "head", "output", "score", "classifier", "embed_out", "readout")),
    *((name, linear, HEAD) for name in ("generator", "proj_out", "to_logits", "decoder", "output_layer", "mlm_head")),
    *((name, linear, HEAD) for name in ("unembed", "net.lm_head", "output_projection", "cls.predictions.decoder")),
    ("heads", several(linear), HEAD),
    ("lm_head", saved_head, HEAD),
    ("module.lm_head", linear, HEAD),
    ("lm_head", normed_head, (REFUSED, "adam_sphere", True)),
    ("embed_tokens", table, TABLE),
    ("value_embeds", several(table), TABLE),
    ("word_embeddings", saved_table, TABLE),
    ("embedding", normed_table, (REFUSED, "adamw", False)),
    ("wpe", table, TABLE),
    ("mixer", StateSpace, ("scalar", "adamw", False)),
]


def added(model):
    known = {id(p) for part in (model.tokens, model.blocks, model.norm_f) for p in part.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in known and p.requires_grad and p.ndim > 1}


@pytest.mark.parametrize(
    ("path", "make", "expected"), CASES, ids=[f"{path}-{make.__name__}" for path, make, _ in CASES]
)
def test_plan_optimizer_and_monitor_read_a_name_alike(path, make, expected):
    role, kind, watched = expected
    model = Model(path, make, 32)
    parameters = added(model)
    assert parameters

    arguments = {"base": lambda: Model(path, make, 16), "rule": "hyperp", "family": "sphere"}
    if role is REFUSED:
        with pytest.raises(
            ValueError, match=r"model: found 2 parameter.s. that are parts of a weight .*original0.*original1"
        ):
            plan(model, **arguments)
    else:
        made = plan(model, **arguments)
        assert {made[name].role for name in parameters} == {role}
        assert {made[name].kind for name in parameters} == {kind}

    optimizer = HyperSphereOptimizer((name, p) for name, p in parameters.items() if not name.endswith("original0"))
    assert {group["kind"] for group in optimizer.param_groups} == {kind}

    probes = [
        probe for probe in LogitsZMonitor().find_probes(model) if not probe.optional
    ]  # a table may be a head, too
    found = [probe for probe in probes if probe.label.startswith("lm_logits")]
    assert bool(found) is watched


@pytest.mark.parametrize(
    ("path", "make", "kind"),
    [
        ("blocks.0.head", linear, "sphere"),  # of an attention: a head of the model is outside the blocks
        ("decoder.layers.0.fc1", linear, "sphere"),
        ("head.0", linear, "sphere"),  # of a Sequential: its shapes tell which layer is the last
        ("time_embed.2", linear, "sphere"),
        ("embed_proj", linear, "sphere"),
        ("blocks.0.out_proj", linear, "sphere"),
        ("blocks.0.out_proj.parametrizations.weight.original0", linear, "adamw"),  # lengths
    ],
)
def test_names_that_only_look_like_heads_and_tables(path, make, kind):
    (group,) = HyperSphereOptimizer([(path if "original" in path else f"{path}.weight", make(8).weight)]).param_groups
    assert group["kind"] == kind
    assert not is_head(path)


def test_names_identify_and_names_mean():
    parts = ("embed.parametrizations.weight.original0", "embed.parametrizations.weight.original1")
    assert {plain_name(part) for part in parts} == {"embed.weight"}
    assert {clean_name(part) for part in parts} == set(parts)  # two parameters stay two
    assert plain_name("module.lm_head.base_layer.weight") == "lm_head.weight"
    assert plain_name("embed.weight_v") == "embed.weight"
    assert plain_name("module") == "module"
    assert split_layer("_orig_mod.blocks.3.w") == ("_orig_mod.blocks.*.w", 3)


#: Qualified names of released models -> head, embedding, vector, elementwise, or "" for a matrix; and the layer index.
REAL = {
    # transformers: Llama, OPT, BERT, RoBERTa, DistilBERT, XLNet, T5, ALBERT, ELECTRA, GPT-NeoX, Bloom, CLIP, gpt-oss, DeepSeek-V3
    "model.embed_tokens.weight": ("embedding", -1),
    "model.layers.11.input_layernorm.weight": ("vector", 11),
    "model.layers.11.self_attn.o_proj.weight": ("", 11),
    "model.decoder.project_out.weight": ("", -1),
    "bert.embeddings.LayerNorm.weight": ("vector", -1),
    "bert.encoder.layer.0.output.dense.weight": ("", 0),
    "bert.encoder.layer.0.output.LayerNorm.weight": ("vector", 0),
    "cls.predictions.decoder.weight": ("head", -1),
    "lm_head.dense.weight": ("", -1),
    "lm_head.decoder.weight": ("head", -1),
    "vocab_projector.weight": ("head", -1),
    "vocab_layer_norm.weight": ("vector", -1),
    "lm_loss.weight": ("head", -1),
    "qa_outputs.weight": ("head", -1),
    "shared.weight": ("embedding", -1),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": ("vector", 0),
    "encoder.embedding_hidden_mapping_in.weight": ("", -1),
    "electra.embeddings_project.weight": ("", -1),
    "gpt_neox.embed_in.weight": ("embedding", -1),
    "embed_out.weight": ("head", -1),
    "transformer.word_embeddings_layernorm.weight": ("vector", -1),
    "vision_model.embeddings.class_embedding": ("embedding", -1),
    "model.layers.3.mlp.experts.gate_up_proj": ("", 3),
    "model.layers.3.mlp.experts.gate_up_proj_bias": ("vector", 3),
    "model.layers.3.mlp.experts.17.down_proj.weight": ("", 3),
    "model.layers.3.mlp.gate.e_score_correction_bias": ("vector", 3),
    "model.layers.61.shared_head.head.weight": ("head", 61),
    # Megatron and fairseq
    "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": ("vector", 0),
    "decoder.embed_positions.weight": ("embedding", -1),
    "decoder.output_projection.weight": ("head", -1),
    "decoder.layers.5.encoder_attn.k_proj.weight": ("", 5),
    # timm
    "patch_embed.proj.weight": ("", -1),
    "pos_embed": ("embedding", -1),
    "reg_token": ("embedding", -1),
    "blocks.0.norm1.weight": ("vector", 0),
    "layer1.0.bn2.weight": ("vector", 0),
    "layers.0.blocks.1.attn.relative_position_bias_table": ("vector", 0),
    "head.fc.weight": ("head", -1),
    "head.norm.weight": ("vector", -1),
    "head.pre_logits.fc.weight": ("", -1),
    "head_dist.weight": ("head", -1),
    # litgpt
    "transformer.h.7.norm_1.weight": ("vector", 7),
    "transformer.h.7.mlp.fc_1.weight": ("", 7),
    "transformer.wte.weight": ("embedding", -1),
    # Mamba, VMamba and S4
    "backbone.layers.0.mixer.A_log": ("elementwise", 0),
    "backbone.layers.0.mixer.dt_bias": ("vector", 0),
    "backbone.layers.0.mixer.x_proj.weight": ("", 0),
    "backbone.norm_f.weight": ("vector", -1),
    "layers.0.blocks.0.op.A_logs": ("elementwise", 0),
    "layer.0.kernel.log_A_real": ("elementwise", 0),
    # RWKV 4 to 7
    "emb.weight": ("embedding", -1),
    "blocks.0.att.time_decay": ("elementwise", 0),
    "blocks.0.att.time_faaaa": ("elementwise", 0),
    "blocks.0.att.time_decay_w1": ("", 0),
    "blocks.0.att.r_k": ("elementwise", 0),
    "blocks.0.att.ln_x.weight": ("vector", 0),
}


@pytest.mark.parametrize(("name", "expected"), REAL.items(), ids=REAL)
def test_names_of_released_models(name, expected):
    kinds = {"head": is_head, "embedding": is_embedding, "vector": is_vector, "elementwise": is_elementwise}
    kind, layer = expected
    assert [known for known, holds in kinds.items() if holds(name)] == ([kind] if kind else [])
    assert split_layer(name)[1] == layer


def test_an_expert_in_a_list_is_no_layer():
    assert split_layer("experts.deepspeed_experts.17.w1") == ("experts.deepspeed_experts.17.w1", -1)
    name = "model.layers.3.block_sparse_moe.experts.17.w1.weight"
    assert all_indices(name) == "model.layers.*.block_sparse_moe.experts.each.w1.weight"
