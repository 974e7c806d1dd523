"""Residual branches: which matrix, or norm behind it, writes the output of each branch of a layer into the residual stream."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from math import prod

from lightning_mue.checks import listed
from lightning_mue.names import all_indices, in_attention
from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.reading.roles.role_names import layer_of
from lightning_mue.parameterizations.reading.size_inference import residual_widths
from lightning_mue.parameterizations.reading.stacks import Stacks
from lightning_mue.parameterizations.rules.roles import MATRIX_ROLES, Role

_DOWN = (Role.FFN_DOWN, Role.EXPERT_DOWN, Role.SHARED_DOWN)
_UP = (Role.FFN_UP, Role.EXPERT_UP, Role.SHARED_UP)
_OUT = re.compile(
    r"(^|\.)(o_proj|w_?o|out|out_proj|c_proj|out_lin|out_layer|to_out(\.0)?|output|output\.dense|dense|proj|proj_out|o"
    r"|output_proj|down_proj|proj_2)$",
    re.IGNORECASE,
)
# What changes a layer's activations by a condition (a time, a class), or goes round its branches, ends no branch.
_ASIDE = re.compile(
    r"(^|[._])(ada_?ln\w*|\w*modulation|mod_?lin|time\w*|t?emb(ed)?(_?layers?|_?proj)?|cond\w*|film|style|scale_shift\w*"
    r"|shortcut|nin_shortcut|conv_shortcut|skip\w*|downsample\w*|upsample\w*|res_conv|residual_conv|relative_attention_bias)"
    r"(\.|$)",
    re.IGNORECASE,
)


@dataclass
class _Branch:
    """Matrices of one layer that lie in one module, in order; ``flat``: those that the layer holds itself."""

    layer: str
    part: str
    members: list[ParameterInfo] = field(default_factory=list)
    flat: bool = False


def residual_ends(infos: list[ParameterInfo]) -> set[str]:
    """Paths of the layers into which a residual branch's multiplier can be folded: where it is certain."""
    return {path for ends in _decide(infos).values() for path in ends or ()}


def open_branches(infos: list[ParameterInfo]) -> dict[tuple[str, str], list[ParameterInfo]]:
    """(layer, part of it) -> the matrices of each branch whose end is not known."""
    members = {(branch.layer, branch.part): branch.members for branch in _branches(infos)}
    return {key: members[key] for key, ends in _decide(infos).items() if ends is None}


def undecided_branches(infos: list[ParameterInfo], normed: Collection[str] = ()) -> str | None:
    """Why a residual multiplier cannot be folded, naming every branch whose last matrix is not known; None if it can.

    In ``normed`` layers norms behind the branches take it.
    """
    decided = _decide(infos)
    if not decided:
        return "no numbered layers with matrices of known roles were found"
    members = {(branch.layer, branch.part): branch.members for branch in _branches(infos)}
    lacking: dict[str, list[ParameterInfo]] = {}
    for (layer, part), ends in decided.items():
        if ends is None and layer_of(layer) not in normed:
            lacking.setdefault(all_indices(f"{layer}.{part}".rstrip(".")), members[layer, part])
    if not lacking:
        return None
    found = [
        f"{where} ({listed([f'{info.name} {list(info.shape)}' for info in matrices], limit=6)})"
        for where, matrices in lacking.items()
    ]
    return f"the last matrix of the branch is not known in {'; '.join(found)}"


def _decide(infos: list[ParameterInfo]) -> dict[tuple[str, str], set[str] | None]:
    """(layer, part of it) -> paths of what ends the branch; None where it is not known."""
    branches, norms = _branches(infos), _norm_sizes(infos)
    stream = set(residual_widths(infos).values())
    downs = {branch.layer for branch in branches if any(info.role in _DOWN for info in branch.members)}
    parts: dict[str, int] = defaultdict(int)
    for branch in branches:
        parts[branch.layer] += 1
    result: dict[tuple[str, str], set[str] | None] = {}
    chains = _chains(infos)
    for branch in branches:
        if all_indices(branch.layer) in chains:
            continue
        widths = norms.get(branch.layer, set()) | stream
        down = [info for info in branch.members if info.role in _DOWN]
        ends = {info.path for info in down if not _is_gated(info, widths)}
        if not ends and branch.layer in downs and all(info.role in _UP for info in branch.members):
            continue  # the down matrix lies in the module beside it
        if not down:
            last = _last(branch, widths, alone=parts[branch.layer] == 1)
            ends = {_norm_behind(infos, info) for info in last}
        result[branch.layer, branch.part] = ends or None
    return result


def _branches(infos: list[ParameterInfo]) -> list[_Branch]:
    """The matrices in layers by the module that holds them: an attention, an FFN, another child of the layer, the layer."""
    stacks, found = Stacks(infos), dict[tuple[str, str], _Branch]()
    for info in infos:
        layer = stacks.layer(info.name)
        matrix = len(info.shape) >= 2 and info.role in MATRIX_ROLES - {Role.ROUTER, Role.UNEMBEDDING, Role.MODULATION}
        if not layer or not matrix or _is_per_channel(info):
            continue
        inside = info.path[len(layer) + 1 :]
        attention, ffn = in_attention(inside) and "." in inside, info.role in (*_UP, *_DOWN)
        aside = _ASIDE.search(inside) or _ASIDE.search(layer.rpartition(".")[0])
        if not (attention or ffn) and (aside or stacks.is_stage(layer)):
            continue
        part = _attention_part(inside) if attention else inside.partition(".")[0] if "." in inside else ""
        if ffn and not part:
            part = "(FFN)"
        found.setdefault((layer, part), _Branch(layer, part)).members.append(info)
    return _merged(infos, list(found.values()))


def _chains(infos: list[ParameterInfo]) -> set[str]:
    """Lists of layers in which nothing is added: linear layers between activations, and convolutions one behind the other.

    Of the latter (a feature extractor) each element has a single one, and at least one changes the width.
    """
    stacks = Stacks(infos)
    depths, layers = stacks.depths(), defaultdict[str, dict[str, list[ParameterInfo]]](lambda: defaultdict(list))
    for info in infos:
        if len(info.shape) >= 2 and (layer := stacks.layer(info.name)):
            layers[all_indices(layer)][layer].append(info)
    chains = set()
    for element, found in layers.items():
        members = [info for inside in found.values() for info in inside]
        single = len(members) == len(found) > 1 and all(info.form == "conv" for info in members)
        direct = all(info.path == layer for layer, inside in found.items() for info in inside)
        unlike = len({info.shape for info in members}) > 1
        if (single and unlike and any(i.shape[0] != i.shape[1] for i in members)) or (
            direct and element.removesuffix("*") not in depths
        ):
            chains.add(element)
    return chains


def _merged(infos: list[ParameterInfo], branches: list[_Branch]) -> list[_Branch]:
    """Joins the children of a layer that are single matrices, which make up one branch (conv1, conv2), with its own."""
    order = {info.name: i for i, info in enumerate(infos)}
    result, flat = [], dict[str, _Branch]()
    for branch in branches:
        single = len(branch.members) == 1 and not in_attention(branch.part)
        if (single and branch.members[0].role not in (*_UP, *_DOWN)) or not branch.part:
            joined = flat.setdefault(branch.layer, _Branch(branch.layer, "", flat=True))
            joined.members += branch.members
        else:
            result.append(branch)
    # Where the last matrix of a layer is a down matrix without up matrices, a person named it as the branch's end.
    named = {
        branch.layer: max(order[info.name] for info in branch.members)
        for branch in result
        if branch.part == "(FFN)" and not any(info.role in _UP for info in branch.members)
    }
    for branch in flat.values():
        branch.members.sort(key=lambda info: order[info.name])
        if named.get(branch.layer, -1) < order[branch.members[-1].name]:
            result.append(branch)
    return result


def _is_gated(info: ParameterInfo, widths: set[int]) -> bool:
    """True for a matrix in front of a gate (``nn.GLU``), which halves its output: no factor of the branch goes into it."""
    out = info.fans[1]
    return out not in widths and out % 2 == 0 and out // 2 in widths


def _attention_part(inside: str) -> str:
    parts = inside.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if in_attention(part)) + 1])


def _is_per_channel(info: ParameterInfo) -> bool:
    return info.form == "conv" and info.fans[0] == prod(info.shape[2:])


def _last(branch: _Branch, widths: set[int], *, alone: bool) -> list[ParameterInfo]:
    """The matrix that ends a branch, by its usual name, else by order and shape; empty where neither is certain."""
    outs = [info for info in branch.members if info.fans[1] in widths] or []
    named = [info for info in outs if _OUT.search(info.path)]
    attention = in_attention(branch.part)
    if attention and not outs:  # no norm, embedding or head shows the residual width
        named = [info for info in branch.members if _OUT.search(info.path)]
    if len(named) == 1 or (attention and named):
        return named
    last = branch.members[-1]
    if last not in outs:
        return []
    if not branch.flat:
        return [last]
    stems = {re.sub(r"\d+|in_?|out_?", "", info.path[len(branch.layer) + 1 :]).split(".")[0] for info in outs}
    return [last] if (len(outs) == 1 or len(stems) == 1) and (alone or len(branch.members) > 1) else []


def _norm_behind(infos: list[ParameterInfo], last: ParameterInfo) -> str:
    """The path of a convolution that ends a branch, or of the norm right behind it, which undoes a factor in front of it."""
    if last.form == "conv":
        rest = infos[infos.index(last) + 1 :]
        following = next((info for info in rest if info.path != last.path), None)
        parents = [path.rpartition(".")[0] for path in (last.path, following.path if following else "")]
        if following is not None and following.form == "norm" and parents[0] == parents[1]:
            return following.path if following.shape == (last.fans[1],) else last.path
    return last.path


def _norm_sizes(infos: list[ParameterInfo]) -> dict[str, set[int]]:
    """Layer -> sizes of the norms in it."""
    stacks, sizes = Stacks(infos), defaultdict[str, set[int]](set)
    for info in infos:
        if info.role is Role.NORM and len(info.shape) == 1:
            sizes[stacks.layer(info.name)].add(info.shape[0])
    return sizes
