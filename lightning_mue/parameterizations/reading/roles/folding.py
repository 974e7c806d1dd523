"""Which parameters a forward multiplier can be folded into (docs/theory.md section 2)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import replace
from itertools import accumulate

from lightning_mue.names import attention_path, in_attention
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, some
from lightning_mue.parameterizations.reading.roles.branches import residual_ends, undecided_branches
from lightning_mue.parameterizations.reading.roles.head import head_norms
from lightning_mue.parameterizations.reading.roles.role_names import layer_of
from lightning_mue.parameterizations.rules.roles import MATRIX_ROLES, Role

_QUERY_NORM = re.compile(r"(^|[._])(q|query)_?(layer_?)?norm(\.|$)|(^|[._])norm_q(\.|$)", re.IGNORECASE)
# Blocks that normalize a branch's output before it is added (Gemma, OLMo): there the norm comes last.
_POST_FFN = re.compile(r"(^|\.)post_(feedforward|ffn|ff|mlp)_?(layer)?norm(\.|$)")
_POST_SELF = re.compile(r"(^|\.)post_self_attn_?(layer)?norm(\.|$)")
_POST_NORM = re.compile(r"(^|\.)post_(feedforward|ffn|ff|mlp|attention|attn|self_attn)_?(layer)?norm(\.|$)")


def mark_folds(infos: list[ParameterInfo]) -> list[ParameterInfo]:
    """Marks the parameters into which a forward multiplier can be folded.

    An FFN's output: its down matrices. A residual branch: its last matrix, or the norm behind it. Attention logits: the query
    norm, the query matrix, or the rows of a fused matrix that make queries. The logits of a tied head: the norm right before it. A
    layer's bias is marked like its matrix.
    """
    folds: dict[str, frozenset[str]] = {info.path: _folds_of(info) for info in infos if info.role in MATRIX_ROLES}
    for path in residual_ends(infos):
        folds[path] = folds.get(path, frozenset()) | {"residual"}
    for info in infos:
        if info.role is Role.BIAS and info.query is not None:
            folds.setdefault(info.path, _folds_of(info))  # the bias of matrices that have other names
    query_norms = {info.path for info in infos if info.role is Role.QK_NORM and _QUERY_NORM.search(info.name)}
    attentions = {_parent(path) for path in query_norms}
    for path, kinds in folds.items():
        if _parent(path) in attentions:  # the norm undoes a factor in front of it
            folds[path] = kinds - {"attention"}
    folds |= dict.fromkeys(query_norms, frozenset({"attention"}))
    normed = {layer_of(info.path) for info in infos if info.role is Role.NORM and _POST_FFN.search(info.name)}
    # GLM-4: the norm behind the attention is post_self_attn_layernorm, and post_attention_layernorm stands before the FFN.
    named_self = {layer_of(info.path) for info in infos if info.role is Role.NORM and _POST_SELF.search(info.name)}
    for info in infos:
        if (layer := layer_of(info.path)) in normed:
            kinds = folds.get(info.path, frozenset())
            match = _POST_NORM.search(info.name) if info.role is Role.NORM else None
            last = match is not None and not (layer in named_self and match[2] in ("attention", "attn"))
            folds[info.path] = kinds | {"residual"} if last else kinds - {"residual"}
    final = set(head_norms(infos))
    for path in final:
        folds[path] = folds.get(path, frozenset()) | {"output"}
    infos = [replace(i, role=Role.FINAL_NORM) if i.path in final and i.role is Role.NORM else i for i in infos]
    return [replace(info, folds=folds.get(_matrix_path(info, folds), frozenset())) for info in infos]


def _matrix_path(info: ParameterInfo, known: Collection[str]) -> str:
    """The path of a parameter's matrix: its own, or ``W_x`` for a bias ``b_x``."""
    parent, _, leaf = info.path.rpartition(".")
    if info.role is Role.BIAS and leaf.lower().startswith("b_"):
        names = (f"{parent}.{w}{leaf[1:]}".lstrip(".") for w in "Ww")
        return next((name for name in names if name in known), info.path)
    return info.path


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _folds_of(info: ParameterInfo) -> frozenset[str]:
    if info.role in (Role.FFN_DOWN, Role.EXPERT_DOWN):
        return frozenset({"ffn", "route"})
    if info.role is Role.SHARED_DOWN:
        return frozenset({"ffn"})  # the route scale is the routed experts' alone
    query = info.query
    if query is not None and info.role in (Role.HIDDEN, Role.BIAS):
        known = query.rows is not None or not query.fused
        return frozenset({"attention"}) if known and not query.normed else frozenset()
    return frozenset()


def why_not_foldable(infos: list[ParameterInfo], kind: str) -> str | None:
    """Why a multiplier of a kind (not of attention logits) cannot be folded into these parameters, or None if it can."""
    if kind == "residual":
        normed = {layer_of(info.path) for info in infos if kind in info.folds and info.role is Role.NORM}
        return undecided_branches(infos, normed)
    wants: dict[tuple[str, str], list[ParameterInfo]] = defaultdict(list)
    has: set[tuple[str, str]] = set()
    for info in infos:
        layer, part = layer_of(info.path), _part(info)
        in_layer = info.position[1] >= 0 and info.role in MATRIX_ROLES - {Role.ROUTER, Role.MODULATION}
        if in_layer:
            wants[layer, part].append(info)
        if kind in info.folds:
            has.add((layer, part))
    if not wants:
        return "no numbered layers with matrices of known roles were found"
    lacking = next((members for key, members in wants.items() if key not in has), None)
    if lacking is None:
        return None
    return f"the last matrix of the branch is not known among {some(lacking, 3)}"


def attention_of(info: ParameterInfo) -> str:
    """Path of the attention that a parameter belongs to; empty if it belongs to none."""
    if path := attention_path(info.path):
        return path
    return _parent(info.path) if info.query is not None else ""


def scaled_attentions(infos: list[ParameterInfo], places: Iterable[str]) -> set[str]:
    """Those attentions whose logits are scaled by a module at one of these places: in them, or around them."""
    inside, around = set(), set(places)
    for place in around:
        inside |= set(accumulate(place.split("."), "{}.{}".format))
    found = {attention_of(info) for info in infos} - {""}
    return {path for path in found if path in inside or {"", *accumulate(path.split("."), "{}.{}".format)} & around}


def without_query(infos: list[ParameterInfo], scaled: set[str]) -> list[ParameterInfo]:
    """Matrices of the first attention, not among the scaled ones, into which no multiplier of its logits can be folded."""
    members: dict[str, list[ParameterInfo]] = defaultdict(list)
    has = {attention_of(info) for info in infos if "attention" in info.folds}
    for info in infos:
        matrix = info.trainable and info.role in MATRIX_ROLES - {Role.ROUTER}
        if matrix and (where := attention_of(info)) and where not in scaled:
            members[where].append(info)
    return next((found for where, found in members.items() if where not in has), [])


def _part(info: ParameterInfo) -> str:
    if in_attention(info.path):
        return "attention"
    ffn = info.role is not None and info.role.value.endswith(("_up", "_down"))
    return "FFN" if ffn else "other"
