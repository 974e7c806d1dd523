"""Finds the parameters that make an attention's queries, and the size and the scale of its heads.

A forward multiplier of attention logits can be folded into them: into a query matrix as a whole, or into those rows of a fused
matrix of queries, keys and values that make queries. Which rows these are follows from the names of layers and classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

from torch import nn

from lightning_mue.names import all_indices, clean_name, plain_name
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, Query
from lightning_mue.parameterizations.rules.roles import Role

_HEAD_DIM: tuple[str, ...] = (
    "head_dim",
    "attention_head_size",
    "head_size",
    "qk_head_dim",
    "key_value_proj_dim",
    "d_kv",
    "dim_head",
    "d_head",
)
_HEAD_DIM += ("dim_per_head", "hidden_size_per_attention_head", "attn_head_size", "per_head_dim", "d_k")
_HEADS: tuple[str, ...] = (
    "num_attention_heads",
    "num_heads",
    "n_head",
    "n_heads",
    "nhead",
    "nheads",
    "num_head",
    "heads",
    "attention_heads",
)
_HEADS += ("n_attn_heads", "num_attn_heads")
_KEY_HEADS = (
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "n_kv_head",
    "n_query_groups",
    "num_query_groups",
    "kv_heads",
)
_SCALES = (
    "scaling",
    "scale",
    "softmax_scale",
    "inv_norm_factor",
    "scale_attn",
    "attn_scale",
    "norm_factor",
    "attention_scale",
)

_QUERY = re.compile(
    r"(q_proj|q_b_proj|q_attn|w_?q(_b)?|query(_proj|_layer)?|queries|q_lin(ear)?|linear_q|lin_q|fc_q|to_q|q)",
    re.IGNORECASE,
)
FUSED_QUERIES = re.compile(
    r"(c_attn|att_proj|(to_|w_?|in_)?qkv(_proj|_lin|_linear)?|query_key_value|in_proj_(weight|bias))", re.IGNORECASE
)
_QUERY_NORM = re.compile(r"(^|[._])(q|query)_?(layer_?)?norm(\.|$)|(^|[._])norm_q(\.|$)", re.IGNORECASE)
#: Classes whose fused matrix holds q, k and v of one head after the other.
_HEAD_BY_HEAD = re.compile(r"GPTNeoX|Bloom|Persimmon")
#: Attention layers that multiply their logits by nothing.
_UNSCALED = frozenset({"GPTNeoSelfAttention"})


@dataclass(frozen=True)
class _Heads:
    """What an attention says of its heads; None for what it does not say."""

    module: nn.Module | None = None
    dim: int | None = None
    n: int | None = None
    n_keys: int | None = None
    scale: float | None = None


def read_queries(model: nn.Module, infos: list[ParameterInfo]) -> list[ParameterInfo]:
    """The parameters, with ``query`` set on those that make or normalize queries."""
    modules = {clean_name(name): module for name, module in model.named_modules()}
    leaves = {_split(info.name) for info in infos}
    scales: dict[str, float] = {}
    result = []
    for info in infos:
        query = _query(info, modules, leaves)
        if query is not None and query.scale is not None:
            # Layers of a stack are alike; some divide their scale by the number of the layer, too.
            query = replace(query, scale=scales.setdefault(all_indices(info.name), query.scale))
        result.append(replace(info, query=query))
    return result


def head_size(model: nn.Module) -> int | None:
    """Size of a head of the first attention, judged by the names of classes, that says it."""
    attentions = (module for module in model.modules() if "attention" in type(module).__name__.lower())
    return next((dim for module in attentions if (dim := _number(_sources(module), _HEAD_DIM, int))), None)


def _split(name: str) -> tuple[str, str]:
    """(path of the attention, name of the layer in it): ``blocks.0.attn.qkv.weight`` -> ``("blocks.0.attn", "qkv")``."""
    path = plain_name(name)
    if path.endswith((".weight", ".bias")):
        path = path.rpartition(".")[0]
    around, _, leaf = path.rpartition(".")
    return around, leaf if leaf.startswith("in_proj_") else re.sub("_(weight|bias)$", "", leaf)


def _query(info: ParameterInfo, modules: Mapping[str, nn.Module], leaves: set[tuple[str, str]]) -> Query | None:
    around, leaf = _split(info.name)
    chain = list(_ancestors(info.name, modules))
    if info.role is Role.QK_NORM:
        if not _QUERY_NORM.search(info.name):
            return None
        heads = _heads(chain, None)
        return Query(heads.dim, _scale(heads))
    if not 1 <= len(info.shape) <= 4 or info.role in (Role.EMBEDDING, Role.NORM, Role.ROUTER):
        return None
    dim = 1 if len(info.shape) == 2 and info.form == "linear" and type(chain[0]).__name__ == "Conv1D" else 0
    if _QUERY.fullmatch(leaf) and any((around, key) in leaves for key in _keys(leaf)):
        alone = re.search(r"heads\.\d+$", around) is not None  # a list of heads, each with its own query matrix
        heads = _heads(chain, info.shape[dim], alone=alone)
        return Query(heads.dim, _scale(heads), normed=_is_normed(heads.module))
    if FUSED_QUERIES.fullmatch(leaf) or (leaf == "attn" and _n_groups(chain) is not None):
        heads = _fused_heads(_heads(chain, None), info.shape[dim])
        rows = _rows(leaf, info.shape[dim], heads)
        return Query(
            heads.dim, _scale(heads), (dim, *rows) if rows else None, fused=True, normed=_is_normed(heads.module)
        )
    return None


def _ancestors(name: str, modules: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """The modules around a parameter, from its owner outwards."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        if path in modules:
            yield modules[path]


def _keys(leaf: str) -> set[str]:
    """Names that the key matrix beside a query matrix may have."""
    pairs = (
        ("query", "key"),
        ("queries", "keys"),
        ("q", "k"),
        ("Q", "K"),
        ("q", "kv"),
        ("q", "qkv"),
        ("q_b", "kv_b"),
        ("q_attn", "c_attn"),
    )
    return {leaf.replace(old, new) for old, new in pairs if old in leaf}


def _sources(module: nn.Module) -> list[Any]:
    """Where a module may say its sizes: itself, its configuration, its hyperparameters."""
    return [module, getattr(module, "config", None), getattr(module, "hparams", None)]


def _number(sources: list[Any], names: tuple[str, ...], kind: type) -> Any:
    for source in sources:
        for name in names:
            value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
            if isinstance(value, kind) and not isinstance(value, bool):
                return value
    return None


def _heads(chain: list[nn.Module], out: int | None, *, alone: bool = False) -> _Heads:
    """What the nearest module says that says anything of its heads; ``out`` is the width of all queries together, if known."""
    for i, module in enumerate(chain):
        sources = _sources(module)
        dim, n = _number(sources, _HEAD_DIM, int), _number(sources, _HEADS, int)
        if alone:
            dim, n = out, 1
        elif out is not None and n and out % n == 0:
            dim = out // n
        if dim or n:
            scales = [*chain[:i], module]
            return _Heads(module, dim, n, _number(sources, _KEY_HEADS, int), _number(scales, _SCALES, float))
    return _Heads()


def _fused_heads(heads: _Heads, out: int) -> _Heads:
    """The heads of a fused matrix with ``out`` rows: sizes that are not said follow from each other."""
    if heads.dim is None and heads.n is not None:
        keys = heads.n_keys if heads.n_keys is not None else heads.n
        groups = heads.n + 2 * keys
        return replace(heads, dim=out // groups) if out % groups == 0 else heads
    if heads.dim is not None and heads.n is None and out % (3 * heads.dim) == 0 and heads.n_keys is None:
        return replace(heads, n=out // (3 * heads.dim))
    return heads


def _scale(heads: _Heads) -> float | None:
    """What logits are multiplied by; an attribute that holds its inverse is recognised by its value."""
    if type(heads.module).__name__ in _UNSCALED:
        return 1.0
    scale, dim = heads.scale, heads.dim
    if scale and dim and dim > 1 and any(isclose(scale, divisor, rel_tol=1e-4) for divisor in (dim**0.5, dim)):
        return 1 / scale
    return float(scale) if scale else None


def _is_normed(attention: nn.Module | None) -> bool:
    """True if an attention normalizes its queries by a module without weights, which would undo a factor in front of it."""
    children = attention.named_children() if attention is not None else ()
    return any(
        _QUERY_NORM.search(name) and not isinstance(child, nn.Identity) and not list(child.parameters())
        for name, child in children
    )


def _n_groups(chain: list[nn.Module]) -> int | None:
    """Number of query groups, which litgpt's layers read from their configuration."""
    return _number([getattr(module, "config", None) for module in chain[:2]], ("n_query_groups",), int)


def _rows(leaf: str, out: int, heads: _Heads) -> tuple[int, int] | None:
    """(how many rows make queries, after how many rows that repeats); None if the layout is not known."""
    kind, dim, n = type(heads.module).__name__, heads.dim, heads.n
    if kind.startswith("CodeGen"):
        return out // 12, out // 4  # four parts of q, v, k
    if heads.module is None or dim is None or n is None:
        known = leaf.lower() != "query_key_value" and leaf != "attn" and out % 3 == 0
        return (out // 3, out) if known else None
    keys = heads.n_keys if heads.n_keys is not None else n
    if leaf == "attn" or (kind.startswith("Falcon") and getattr(heads.module, "new_decoder_architecture", False)):
        group = n // keys  # group by group: its queries, its key, its value
        return (group * dim, (group + 2) * dim) if out == (n + 2 * keys) * dim else None
    if kind.startswith(("Falcon", "GPTBigCode")):
        if getattr(heads.module, "multi_query", False):
            return (n * dim, out) if out == (n + 2) * dim else None
        return (dim, 3 * dim) if out == 3 * n * dim else None
    legacy = any(type(child).__name__ == "QKVAttentionLegacy" for child in heads.module.children())
    if legacy or (leaf == "query_key_value" and _HEAD_BY_HEAD.search(kind)):
        return (dim, 3 * dim) if out == 3 * n * dim else None
    if leaf == "query_key_value" or "Lightning" in kind:
        return None
    return (n * dim, out) if out == (n + 2 * keys) * dim else None


def key_of(info: ParameterInfo, infos: list[ParameterInfo], model: nn.Module) -> tuple[ParameterInfo, int, int] | None:
    """Finds the keys that the queries of a matrix are multiplied by.

    Returns:
        (the matrix that makes them, which is ``info`` itself if fused; the first of their rows and how many, in every
        ``info.query.rows`` period); None if ``info`` makes no queries, or the layout of its keys is not known.
    """
    query = info.query
    if query is None or query.head_dim is None or len(info.shape) != 2 or info.role is Role.QK_NORM:
        return None
    if query.fused:
        if query.rows is None:
            return None
        _, count, period = query.rows
        keys = (period - count) // 2
        modules = {clean_name(name): module for name, module in model.named_modules()}
        last = any(type(module).__name__.startswith("CodeGen") for module in _ancestors(info.name, modules))
        return info, period - keys if last else count, keys  # CodeGen's order: queries, values, keys
    around, leaf = _split(info.name)
    names = {(around, key) for key in _keys(leaf) if "kv" not in key}
    other = next((o for o in infos if _split(o.name) in names and len(o.shape) == 2 and o.form == info.form), None)
    return None if other is None or other.query is not None else (other, 0, max(other.fans[1], 1))
