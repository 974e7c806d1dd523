"""What the name of a parameter or module means: wrappers, layer indices, heads, embeddings, vectors; names of run sizes.

The only place that knows such names. Where the module itself is available, its type decides before its name.
"""

from __future__ import annotations

import re
from functools import lru_cache

#: Names under which data modules and models hold the length of a sequence.
LENGTHS = (
    *("context_length", "sequence_length", "seq_length", "seq_len", "max_seq_len", "block_size", "max_length"),
    *("max_seq_length", "max_sequence_length", "context_len", "ctx_len", "n_ctx"),
)
#: Names under which they hold the number of sequences in a batch of one process.
BATCHES = (
    *("batch_size", "train_batch_size", "micro_batch_size", "per_device_train_batch_size", "per_device_batch_size"),
    "per_gpu_batch_size",
)
#: Modules that torch.compile, FSDP1 and activation checkpointing put around another one.
_INSERTED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
#: Attributes under which DistributedDataParallel and PEFT's LoRA layers hold the module that they wrap.
_HOLDERS = frozenset({"module", "base_layer"})
#: What weight_norm and spectral_norm of ``torch.nn.utils`` call the parts of a weight.
_WEIGHT_PARTS = frozenset({"weight_g", "weight_v", "weight_orig"})

#: Common names of the last layer, from the residual stream to logits; every name that ends in "head" is one, too.
_HEADS = frozenset(
    {"classifier", "decoder", "embed_out", "generator", "head_dist", "lm_loss", "logits", "output", "output_layer"}
    | {"output_projection", "proj_out", "qa_outputs", "readout", "score", "to_logits", "vocab_projector"}
)
#: Words in the names of embeddings (look-up tables).
_EMBEDDINGS = frozenset({"emb", "embs", "embed", "embeds", "embedding", "embeddings", "wte", "wpe"})
#: Words in the names of the projections between an embedding and the residual stream, which are matrices.
_PROJECTIONS = frozenset({"proj", "project", "projection", "mapping"})
#: Words in the names of parameters that count as vectors in any shape (a bias of stacked experts is [E, h]).
_VECTORS = frozenset({"bias", "biases", "norm", "layernorm", "rmsnorm", "batchnorm", "ln", "bn"})
#: Parameters of state-space models and RWKV that act on each channel separately although they have two dimensions.
_ELEMENTWISE = frozenset(
    {"a_log", "a_logs", "log_a", "log_a_real", "a_real", "a_imag", "time_decay", "time_first", "time_faaaa", "r_k", "d"}
    | {"inv_a_real"}
)
#: Those of S4's kernels, whose names mean other things elsewhere.
_KERNEL = frozenset({"b", "c", "p"})
#: A part of a path that names an attention layer (x-transformers' ``attn_layers`` holds FFNs, too).
_ATTENTION = re.compile(r"(^|\.)(?!attn_layers\.)(\w*(attn|attention)\w*|(self_|cross_)?att)(\.|$)", re.IGNORECASE)
_EXPERT_NAME = re.compile(r"expert_?\d+$")


@lru_cache(maxsize=1 << 17)
def clean_name(name: str) -> str:
    """Removes what torch.compile, FSDP and activation checkpointing insert into a qualified name.

    Different names stay different, so the result identifies a parameter.

    Example:
        >>> clean_name("_orig_mod.blocks.0._fsdp_wrapped_module.w")
        'blocks.0.w'
    """
    return ".".join(part for part in name.split(".") if part not in _INSERTED)


@lru_cache(maxsize=1 << 17)
def plain_name(name: str) -> str:
    """The name that the model's author wrote, without the traces of any wrapper; it shows what a parameter is.

    Several parameters may share it (the parts of a weight-normed weight), so it does not identify a parameter.

    Example:
        >>> plain_name("module.embed.parametrizations.weight.original1")
        'embed.weight'
        >>> plain_name("base_model.model.lm_head.modules_to_save.default.weight")
        'base_model.model.lm_head.weight'
    """
    parts, kept = clean_name(name).split("."), list[str]()
    while parts:
        part = parts.pop(0)
        if part == "modules_to_save":  # modules_to_save.<adapter>
            del parts[:1]
        elif part == "parametrizations" and parts:  # parametrizations.<name>.original, .original0, .original1
            kept.append(parts.pop(0))
            if parts and parts[0].startswith("original"):
                del parts[0]
        elif part not in _HOLDERS:
            kept.append(part)
    if len(kept) > 1 and kept[-1] in _WEIGHT_PARTS:
        kept[-1] = "weight"
    return ".".join(kept) or name


def _is_expert_index(parts: list[str], i: int) -> bool:
    return i > 0 and "expert" in parts[i - 1].lower()


@lru_cache(maxsize=1 << 17)
def split_layer(name: str) -> tuple[str, int]:
    """Splits off the layer index: the first number in a qualified name that is not the index of an expert in a list.

    Returns:
        (name with the layer index replaced by ``*``, the index; -1 if there is none).

    Example:
        >>> split_layer("blocks.3.ffn.w_up")
        ('blocks.*.ffn.w_up', 3)
        >>> split_layer("moe.experts.3.w_up")
        ('moe.experts.3.w_up', -1)
    """
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and not _is_expert_index(parts, i):
            return ".".join([*parts[:i], "*", *parts[i + 1 :]]), int(part)
    return name, -1


@lru_cache(maxsize=1 << 17)
def all_indices(name: str) -> str:
    """A name with every layer index replaced by ``*`` and every expert's index by ``each``.

    Example:
        >>> all_indices("layers.1.blocks.0.experts.3.w1")
        'layers.*.blocks.*.experts.each.w1'
        >>> all_indices("block.1.mlp.experts.expert_3.wi")
        'block.*.mlp.experts.each.wi'
    """
    parts = name.split(".")
    replaced = ["each" if _is_expert_index(parts, i) else "*" for i in range(len(parts))]
    named = ("each" if _EXPERT_NAME.match(part) else part for part in parts)
    return ".".join(new if part.isdigit() else part for part, new in zip(named, replaced, strict=True))


def is_numbered_layer(name: str) -> bool:
    """Whether a module is an element of the outermost list of layers, whose output is the residual stream.

    Example:
        >>> [is_numbered_layer(name) for name in ("blocks.3", "blocks.3.ffn.1", "moe.experts.1", "head")]
        [True, False, False, False]
    """
    *around, last = all_indices(name).split(".")
    return last == "*" and not {"*", "each"} & set(around)


def is_head(name: str) -> bool:
    """Whether a parameter or module outside the numbered layers has the name of an output head.

    The members of a list of heads (``heads.0``) are heads. The layers of one head in a Sequential (``head.0``) are not: their
    shapes must tell which is the last.

    Example:
        >>> is_head("model.lm_head.weight"), is_head("decoder.layers.0.fc1.weight"), is_head("layers.0.head")
        (True, False, False)
        >>> is_head("resnet.fc"), is_head("layers.9.shared_head.head.weight")
        (True, True)
    """
    if is_shared_head(name):
        return True
    layer, index, inside = _owner(name)
    if inside:
        return False
    if index:
        return layer.endswith("heads")
    if layer == "fc":  # ResNet's; one deeper inside is a part of something else
        return plain_name(name).removesuffix(".weight").removesuffix(".bias").count(".") <= 1
    return layer in _HEADS or layer.endswith("head") or "unembed" in layer


def is_shared_head(name: str) -> bool:
    """Whether a parameter is the head of a layer that predicts further tokens (DeepSeek: ``layers.61.shared_head.head``)."""
    return bool(re.search(r"(^|\.)shared_head\.head(\.weight|\.bias)?$", plain_name(name)))


def is_embedding(name: str) -> bool:
    """Whether a parameter or module has the name of an embedding; so have the members of a list (``value_embeds.0``).

    A parameter called ``..._token`` or ``..._tokens`` (``reg_token`` [1, n, d] of a ViT) counts as an embedding.

    Example:
        >>> is_embedding("transformer.wte.weight"), is_embedding("value_embeds.3.weight"), is_embedding("embed_proj")
        (True, True, False)
    """
    layer, index, inside = _owner(name)
    words = set(layer.split("_"))
    if index and not words & {"embs", "embeds", "embeddings"}:
        return False
    if layer == "shared":  # T5's table
        return not inside
    table = bool(words & _EMBEDDINGS) or name.lower().endswith(("_token", "_tokens"))
    return table and not words & (_PROJECTIONS | _VECTORS) and not is_head(name)


def is_vector(name: str) -> bool:
    """Whether a parameter has the name of a bias, belongs to a norm by its name, or holds the lengths of weight_norm.

    Example:
        >>> is_vector("blocks.0.experts.b_up"), is_vector("blocks.0.norm1.weight"), is_vector("blocks.0.w_up")
        (True, True, False)
    """
    if name.endswith((".original0", "weight_g")):
        return True
    leaf = plain_name(name).lower().rpartition(".")[2]
    words = {word.rstrip("0123456789") for word in _owner(name)[0].split("_")}
    return bool(words & _VECTORS) or leaf.endswith("bias") or leaf.startswith("b_")


def is_elementwise(name: str) -> bool:
    """Whether a parameter acts on each channel separately although it has two dimensions, e.g. ``A_log`` of Mamba.

    Example:
        >>> is_elementwise("backbone.layers.0.mixer.A_log"), is_elementwise("layers.0.kernel.C"), is_elementwise("C")
        (True, True, False)
    """
    *around, leaf = plain_name(name).lower().split(".")
    return leaf in _ELEMENTWISE or (leaf in _KERNEL and around[-1:] == ["kernel"])


def in_attention(path: str) -> bool:
    """Whether a path leads through an attention layer, judged by its name.

    Example:
        >>> in_attention("layers.0.self_attn.q_proj"), in_attention("layers.0.mlp.up")
        (True, False)
    """
    return bool(_ATTENTION.search(path))


def attention_path(path: str) -> str:
    """The path up to and including the outermost attention layer that it leads through; empty if there is none.

    A linear layer with such a name (``attn_out``) is no attention layer, but belongs to what is around it.
    """
    match = _ATTENTION.search(path)
    if match is None:
        return ""
    return path[: match.end()].rstrip(".") if match.end() < len(path) else path.rpartition(".")[0]


def is_time_scale(name: str) -> bool:
    """Whether a parameter sets time scales of a state-space model, whose initial values follow a formula and are kept."""
    return is_elementwise(name) or plain_name(name).lower().endswith(("dt_bias", "dt_proj.bias"))


@lru_cache(maxsize=1 << 17)
def _owner(name: str) -> tuple[str, bool, bool]:
    """(lower-case name of a parameter's layer, whether a number follows it, whether it lies inside a numbered layer)."""
    path = plain_name(name).lower().split(".")
    if len(path) > 1 and path[-1] in ("weight", "bias"):
        path = path[:-1]
    if path[-2:] == ["head", "fc"]:  # timm's classifier heads: a norm, then ``fc``
        path = path[:-1]
    last = max((i for i, part in enumerate(path) if not part.isdigit()), default=0)
    return path[last], last < len(path) - 1, any(part.isdigit() for part in path[:last])


#: Characters that loggers treat specially in the key of a metric.
_SPECIAL = re.compile(r"[^\w.\-]+")


def metric_name(name: str) -> str:
    """A qualified name as part of a metric's key, without characters that loggers treat specially; ``root`` if empty."""
    return _SPECIAL.sub("_", name) or "root"
