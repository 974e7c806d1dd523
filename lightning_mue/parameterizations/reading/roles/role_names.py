"""Infers roles from the names of parameters, where their modules declare none.

Declared roles, patterns of the user, and the types of embeddings and norms come first (parameters.py). The matrices of FFNs and
experts are left to ffn_roles.py, which compares their shapes with each other and with the base's.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from lightning_mue.names import (
    all_indices,
    in_attention,
    is_elementwise,
    is_embedding,
    is_head,
    is_shared_head,
    split_layer,
)
from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.reading.size_inference import residual_widths
from lightning_mue.parameterizations.rules.roles import Role

EXPERTS = re.compile(r"(^|\.)\w*experts\b(\.\w*experts\b)*", re.IGNORECASE)
SHARED = re.compile(r"(^|\.)shared_(experts?|mlp|ffn)(\.|$)")
_ROUTER = re.compile(
    r"(^|\.)\w*(router|gating|gate_network)(\.|$)|(^|\.)(gate|switch|wg|w_g|w_?noise|shared_expert_gate|shared_gate)$"
)
#: Names that many projects give to up and down matrices. Shapes decide before them (ffn_roles.py).
CALLED_UP = re.compile(
    r"(^|[._])(gate_proj|up_proj|gate_up_proj|w_?gate|w_?up|gate|up|fc_?1|fc_in|w1|w3|w12|w13|linear_?1|lin_?1|wi(_[01])?|c_fc"
    r"|intermediate\.dense|dense_h_to_4h|input_linear)$"
)
CALLED_DOWN = re.compile(
    r"(^|[._])(down_proj|w_?down|down|fc_?2|fc_out|w2|wo|linear_?2|lin_?2|c_proj|output\.dense|dense_4h_to_h|output_linear|value)$"
)
_QK_NORM = re.compile(r"(^|[._])(q|k|query|key)_?(layer_?)?norm(\.|$)|(^|[._])norm_[qk](\.|$)", re.IGNORECASE)
_POSITIONS = re.compile(
    r"(^|[._])(pos(ition(al)?)?(_?emb\w*|_encoding|itions|_bias(_table)?)?|cls(_token)?|reg(ister)?_tokens?|dist_token)$"
)


def name_roles(infos: list[ParameterInfo]) -> list[ParameterInfo]:
    """Gives undeclared parameters (all of a module, in order) the roles that their names and positions make certain."""
    moes = _moes(infos)
    widths = residual_widths(infos)
    layers = [i for i, info in enumerate(infos) if info.position[1] >= 0]
    last_layer = layers[-1] if layers else len(infos)
    named_final = any(info.role is Role.FINAL_NORM for info in infos)  # by a declaration or a pattern
    result = []
    for i, info in enumerate(infos):
        role = info.role
        if role is None and len(info.shape) >= 2:
            role = _matrix_role(info, moes)
            behind = layers and (i > last_layer or is_shared_head(info.path))
            if role is None and behind and _is_head(info, widths.get("norms")):
                role = Role.UNEMBEDDING
        elif role is Role.NORM and _QK_NORM.search(info.name):
            role = Role.QK_NORM
        elif role is Role.NORM and i > last_layer and info.form == "norm" and not named_final:
            role = Role.FINAL_NORM  # behind the layers
        named = replace(info, role=role)
        result.append(_turned(named, _served(info.path, moes) or set()) if role is Role.ROUTER else named)
    return result


def _is_head(info: ParameterInfo, width: int | None) -> bool:
    """True for a linear layer that reads the residual width and has another output width, or is called a head."""
    leaves = info.fans[0] == width != info.fans[1]
    return info.form == "linear" and (leaves or is_head(info.path))


def in_experts(path: str) -> bool:
    """Whether a path leads through routed experts, judged by its name."""
    return bool(EXPERTS.search(path)) and not SHARED.search(path)


def output_layer(infos: list[ParameterInfo], base: Mapping[str, ParameterInfo]) -> str | None:
    """The last matrix behind the layers with fewer outputs than inputs, if no matrix has changed: the output layer."""
    matrices = [info for info in infos if len(info.shape) > 1 and info.role is not Role.ROUTER]
    if any(base[info.name].fans != info.fans for info in matrices if info.name in base):
        return None  # what has grown shows it
    lists = [all_indices(info.name).partition("*")[0] for info in matrices if "*" in all_indices(info.name)]
    layers = Counter(lists).most_common(1)[0][0] if lists else ""
    inside = [i for i, info in enumerate(matrices) if layers and info.name.startswith(layers)]
    behind = matrices[inside[-1] + 1 :] if inside else []
    return next((m.name for m in reversed(behind) if m.fans[1] < m.fans[0] and m.form in ("linear", "conv")), None)


def layer_of(path: str) -> str:
    """A path up to and including its layer index; empty without one."""
    template, layer = split_layer(path)
    return f"{template.split('*')[0]}{layer}" if layer >= 0 else ""


def _moes(infos: list[ParameterInfo]) -> dict[str, set[int]]:
    """Module that holds experts -> how many there may be: elements of a list, or matrices of a stack."""
    numbers: dict[str, set[str]] = {}
    counts: dict[str, set[int]] = {}
    for info in infos:
        match = EXPERTS.search(info.path)
        if match is None and info.role in (Role.EXPERT_UP, Role.EXPERT_DOWN) and len(info.shape) == 3:
            counts.setdefault(info.path.rpartition(".")[0], set()).add(info.shape[0])  # a stack beside its router
        if match is None or SHARED.search(info.path) or len(info.shape) < 2:
            continue
        moe = info.path[: match.start()]
        element = re.match(r"\.\w*?(\d+)(\.|$)", info.path[match.end() :])
        if element:
            numbers.setdefault(info.path[: match.end()], set()).add(element[1])
        counts.setdefault(moe, set()).update({info.shape[0]} if info.form == "raw" and len(info.shape) == 3 else ())
        counts[moe].discard(0)
    for path, found in numbers.items():
        moe = path[: EXPERTS.search(path).start()]  # type: ignore[union-attr]
        counts.setdefault(moe, set()).add(len(found))
    return counts


def _served(path: str, moes: Mapping[str, set[int]]) -> set[int] | None:
    """Numbers of experts that a matrix in the same layer, or beside them, may choose from; None where there are none."""
    layer = layer_of(path)
    near = [
        n
        for moe, n in moes.items()
        if (layer_of(f"{moe}.x") == layer if layer else moe == "" or path.startswith(f"{moe}."))
    ]
    return {sum(max(n, default=0) for n in near)}.union(*near) if near else None  # all groups of experts, or one


def _router(info: ParameterInfo, moes: Mapping[str, set[int]]) -> bool:
    """True for a matrix called router in a layer with experts, with one output for each of them (or 1: a shared expert's gate)."""
    served = _served(info.path, moes) if _ROUTER.search(info.path) else None
    if served is None or len(info.shape) != 2:
        return False
    outputs = {info.fans[1]} if info.form != "raw" else set(info.shape)
    return not served or bool(outputs & (served | {1}))


def routers_by_shape(infos: list[ParameterInfo]) -> list[ParameterInfo]:
    """Gives the role of router to matrices beside experts that have one output for each, by whatever name.

    Called once the experts' own matrices and those of dense FFNs have their roles.
    """
    found: dict[str, ParameterInfo] = {}
    moes = _moes(infos)
    few = [i for i in infos if i.role in (None, Role.ROUTER) and len(i.shape) == 2]
    for moe, counts in moes.items():
        scope, layer = moe, layer_of(f"{moe}.x")
        while counts:
            inside = [i for i in few if i.path.startswith(f"{scope}.") or not scope]
            groups = [max(n) for other, n in moes.items() if n and f"{other}.".startswith(f"{scope}." if scope else "")]
            beside = [i for i in inside if _may_route(i, counts | {sum(groups)})]
            if beside or any(i.role is Role.ROUTER and i.fans[1] > 1 for i in inside) or scope in (layer, ""):
                found |= {i.name: _turned(replace(i, role=Role.ROUTER), counts) for i in beside}
                break
            scope = scope.rpartition(".")[0]
    return [found.get(info.name, info) for info in infos]


def _turned(router: ParameterInfo, counts: set[int]) -> ParameterInfo:
    """A router with its fans swapped if it is a bare parameter that is stored as [d, E]."""
    turned = router.form == "raw" and router.shape[0] not in counts and router.shape[-1] in counts
    return replace(router, fans=(router.shape[0], router.shape[-1])) if turned else router


def _may_route(info: ParameterInfo, counts: set[int]) -> bool:
    if info.role is not None or len(info.shape) != 2 or info.form not in ("linear", "raw"):
        return False
    if EXPERTS.search(info.path) or in_attention(info.path):
        return False
    return info.fans[1] in counts or (info.form == "raw" and info.shape[1] in counts)


def _matrix_role(info: ParameterInfo, moes: Mapping[str, set[int]]) -> Role | None:
    path = info.path
    if is_elementwise(path):
        return Role.SCALAR
    if info.form == "raw" and (_POSITIONS.search(path) or is_embedding(path)):
        return Role.EMBEDDING
    if info.form == "raw" and info.shape[0] == 1 and len(info.shape) == 3 and not in_experts(path):
        return Role.EMBEDDING  # [1, tokens, width], broadcast over a batch
    if _router(info, moes):
        return Role.ROUTER
    if info.position[1] < 0 and not SHARED.search(path):
        return None
    return Role.HIDDEN if in_attention(path) and not in_experts(path) else None
