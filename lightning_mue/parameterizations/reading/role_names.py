"""Infers roles from the names of parameters, where their modules declare none.

Declared roles, patterns of the user, and the types of embeddings and norms come first (parameters.py). Names decide only
inside numbered layers, where an ``up_proj`` is the up matrix of a block; a ``fc1`` of a plain MLP is judged by its sides.
"""

from __future__ import annotations

import re
from dataclasses import replace

from lightning_mue.names import is_elementwise, is_head, split_layer
from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.reading.size_inference import residual_widths
from lightning_mue.parameterizations.rules.roles import Role

_ATTENTION = re.compile(r"(^|\.)\w*(attn|attention)\w*(\.|$)", re.IGNORECASE)
_EXPERTS = re.compile(r"(^|\.)\w*experts\b", re.IGNORECASE)
_SHARED = re.compile(r"(^|\.)shared_(experts?|mlp|ffn)(\.|$)")
_ROUTER = re.compile(r"(^|\.)(router|gating|gate_network)(\.|$)|(^|\.)(gate|wg|shared_expert_gate|shared_gate)$")
_UP = re.compile(
    r"[._](gate_proj|up_proj|gate_up_proj|w_?gate|w_?up|gate|up|fc_?1|fc_in|w1|w3|w12|w13|linear_?1|lin_?1|wi(_[01])?|c_fc"
    r"|intermediate\.dense|dense_h_to_4h|input_linear)$"
)
_DOWN = re.compile(
    r"[._](down_proj|w_?down|down|fc_?2|fc_out|w2|wo|linear_?2|lin_?2|c_proj|output\.dense|dense_4h_to_h|output_linear)$"
)
_QK_NORM = re.compile(r"(^|[._])(q|k|query|key)_?(layer_?)?norm(\.|$)|(^|[._])norm_[qk](\.|$)", re.IGNORECASE)
_POSITIONS = re.compile(
    r"(^|[._])(pos(ition(al)?)?(_?emb\w*|_encoding|itions)?|cls(_token)?|reg(ister)?_tokens?|dist_token)$"
)


def name_roles(infos: list[ParameterInfo]) -> list[ParameterInfo]:
    """Gives undeclared parameters (all of a module, in order) the roles that their names and positions make certain."""
    moes = {_moe_of(info.path) for info in infos if _EXPERTS.search(info.path)}
    widths = residual_widths(infos)
    layers = [i for i, info in enumerate(infos) if info.position[1] >= 0]
    last_layer = layers[-1] if layers else len(infos)
    named_final = any(info.role is Role.FINAL_NORM for info in infos)  # by a declaration or a pattern
    result = []
    for i, info in enumerate(infos):
        role = info.role
        if role is None and len(info.shape) >= 2:
            role = _matrix_role(info, moes)
            if role is None and layers and i > last_layer and _is_head(info, widths.get("norms")):
                role = Role.UNEMBEDDING
        elif role is Role.NORM and _QK_NORM.search(info.name):
            role = Role.QK_NORM
        elif role is Role.NORM and i > last_layer and info.form == "norm" and not named_final:
            role = Role.FINAL_NORM  # behind the layers
        result.append(replace(info, role=role))
    return result


def _is_head(info: ParameterInfo, width: int | None) -> bool:
    """True for a linear layer that reads the residual width and has another output width, or is called a head."""
    leaves = info.fans[0] == width != info.fans[1]
    return info.form == "linear" and (leaves or is_head(info.path))


def in_attention(path: str) -> bool:
    """Whether a path leads through an attention layer, judged by its name."""
    return bool(_ATTENTION.search(path))


def layer_of(path: str) -> str:
    """A path up to and including its layer index; empty without one."""
    template, layer = split_layer(path)
    return f"{template.split('*')[0]}{layer}" if layer >= 0 else ""


def _moe_of(path: str) -> str:
    """The part of a model whose router serves some experts: their layer, else the module that holds them."""
    return layer_of(path) or path[: _EXPERTS.search(path).start()]  # type: ignore[union-attr]


def _serves(path: str, moes: set[str]) -> bool:
    """True for a path in a layer with experts, or beside them."""
    if layer := layer_of(path):
        return layer in moes
    return any(moe == "" or path.startswith(f"{moe}.") for moe in moes)


def _matrix_role(info: ParameterInfo, moes: set[str]) -> Role | None:
    path = info.path
    if is_elementwise(path):
        return Role.SCALAR
    if _POSITIONS.search(path) and info.form == "raw":
        return Role.EMBEDDING
    if info.form == "raw" and info.shape[0] == 1 and len(info.shape) == 3:
        return Role.EMBEDDING  # [1, tokens, width], broadcast over a batch
    if _EXPERTS.search(path) and not _SHARED.search(path):
        if _DOWN.search(path):
            return Role.EXPERT_DOWN
        return Role.EXPERT_UP if _UP.search(path) else None
    if _ROUTER.search(path) and _serves(path, moes):
        return Role.ROUTER
    if info.position[1] < 0 and not _SHARED.search(path):
        return None
    if in_attention(path):
        return Role.HIDDEN
    up, down = (Role.SHARED_UP, Role.SHARED_DOWN) if _SHARED.search(path) else (Role.FFN_UP, Role.FFN_DOWN)
    return down if _DOWN.search(path) else up if _UP.search(path) else None
