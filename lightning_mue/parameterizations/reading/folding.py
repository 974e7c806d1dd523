"""Which parameters a forward multiplier can be folded into (docs/theory.md section 2)."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace

from lightning_mue.parameterizations.reading.head import head_norms
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, some
from lightning_mue.parameterizations.reading.role_names import in_attention, layer_of
from lightning_mue.parameterizations.rules.roles import MATRIX_ROLES, Role

_QUERY = re.compile(r"\.(q_proj|w_?q|query|q_lin|to_q|q)$")
_OUT = re.compile(r"\.(o_proj|w_?o|out_proj|c_proj|out_lin|to_out(\.0)?|output\.dense|dense|proj|o)$")
_QUERY_NORM = re.compile(r"(^|[._])(q|query)_?(layer_?)?norm(\.|$)|(^|[._])norm_q(\.|$)", re.IGNORECASE)
# Blocks that normalize a branch's output before it is added (Gemma, OLMo): there the norm comes last.
_POST_FFN = re.compile(r"(^|\.)post_(feedforward|ffn|ff|mlp)_?(layer)?norm(\.|$)")
_POST_NORM = re.compile(r"(^|\.)post_(feedforward|ffn|ff|mlp|attention|attn|self_attn)_?(layer)?norm(\.|$)")


def mark_folds(infos: list[ParameterInfo]) -> list[ParameterInfo]:
    """Marks the parameters into which a forward multiplier can be folded.

    An FFN's output: its down matrices. A residual branch: its last matrix, or the norm behind it. Attention logits: the query
    norm, or the query matrix. The logits of a tied head: the norm right before it. A layer's bias is marked like its matrix.
    """
    folds: dict[str, frozenset[str]] = {info.path: _folds_of(info) for info in infos if info.role in MATRIX_ROLES}
    query_norms = {info.path for info in infos if info.role is Role.QK_NORM and _QUERY_NORM.search(info.name)}
    attentions = {_parent(path) for path in query_norms}
    for path, kinds in folds.items():
        if _parent(path) in attentions:  # the norm undoes a factor in front of it
            folds[path] = kinds - {"attention"}
    folds |= dict.fromkeys(query_norms, frozenset({"attention"}))
    normed = {layer_of(info.path) for info in infos if info.role is Role.NORM and _POST_FFN.search(info.name)}
    for info in infos:
        if layer_of(info.path) in normed:
            kinds = folds.get(info.path, frozenset())
            last = info.role is Role.NORM and _POST_NORM.search(info.name)
            folds[info.path] = kinds | {"residual"} if last else kinds - {"residual"}
    final = set(head_norms(infos))
    for path in final:
        folds[path] = folds.get(path, frozenset()) | {"output"}
    infos = [replace(i, role=Role.FINAL_NORM) if i.path in final and i.role is Role.NORM else i for i in infos]
    return [replace(info, folds=folds.get(info.path, frozenset())) for info in infos]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _folds_of(info: ParameterInfo) -> frozenset[str]:
    if info.role in (Role.FFN_DOWN, Role.EXPERT_DOWN):
        return frozenset({"ffn", "route", "residual"})
    if info.role is Role.SHARED_DOWN:
        return frozenset({"ffn", "residual"})  # the route scale is the routed experts' alone
    if info.role is Role.HIDDEN and in_attention(info.path):
        if _QUERY.search(info.path):
            return frozenset({"attention"})
        if _OUT.search(info.path):
            return frozenset({"residual"})
    return frozenset()


def why_not_foldable(infos: list[ParameterInfo], kind: str) -> str | None:
    """Why a multiplier of a kind cannot be folded into these parameters, or None if it can."""
    wants: dict[tuple[str, str], list[ParameterInfo]] = defaultdict(list)
    has: set[tuple[str, str]] = set()
    for info in infos:
        layer, part = layer_of(info.path), _part(info)
        in_layer = info.position[1] >= 0 and info.role in MATRIX_ROLES - {Role.ROUTER}
        if in_layer and (kind != "attention" or part == "attention"):
            wants[layer, part].append(info)
        if kind in info.folds:
            has.add((layer, part))
            if info.role is Role.NORM:  # a norm behind a branch may belong to either branch
                has |= {(layer, "attention"), (layer, "FFN")}
    if not wants:
        return "no numbered layers with matrices of known roles were found"
    lacking = next((members for key, members in wants.items() if key not in has), None)
    if lacking is None:
        return None
    what = "the query matrix" if kind == "attention" else "the last matrix of the branch"
    return f"{what} is not known among {some(lacking, 3)}"


def _part(info: ParameterInfo) -> str:
    if in_attention(info.path):
        return "attention"
    ffn = info.role is not None and info.role.value.endswith(("_up", "_down"))
    return "FFN" if ffn else "other"
