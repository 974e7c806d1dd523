"""What an undeclared module's parameters do, and its sizes: from names that the field agrees on, and from which sides grow.

Declared roles, patterns of the user, and the types of embeddings and norms come first (modules.py). Names are believed only
inside numbered layers, where an ``up_proj`` is the up matrix of a block; a ``fc1`` of a plain MLP is judged by its sides.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from lightning_mue.names import all_indices, is_elementwise, is_head, split_layer
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, some
from lightning_mue.parameterizations.rules.roles import MATRIX_ROLES, Role

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
_QUERY = re.compile(r"\.(q_proj|w_?q|query|q_lin|to_q|q)$")
_OUT = re.compile(r"\.(o_proj|w_?o|out_proj|c_proj|out_lin|to_out(\.0)?|output\.dense|dense|proj|o)$")
_QK_NORM = re.compile(r"(^|[._])(q|k|query|key)_?(layer_?)?norm(\.|$)|(^|[._])norm_[qk](\.|$)", re.IGNORECASE)
_QUERY_NORM = re.compile(r"(^|[._])(q|query)_?(layer_?)?norm(\.|$)|(^|[._])norm_q(\.|$)", re.IGNORECASE)
# Blocks that normalize what a branch puts out, before it is added (Gemma, OLMo): there the norm comes last.
_POST_FFN = re.compile(r"(^|\.)post_(feedforward|ffn|ff|mlp)_?(layer)?norm(\.|$)")
_POST_NORM = re.compile(r"(^|\.)post_(feedforward|ffn|ff|mlp|attention|attn|self_attn)_?(layer)?norm(\.|$)")
_POSITIONS = re.compile(
    r"(^|[._])(pos(ition(al)?)?(_?emb\w*|_encoding|itions)?|cls(_token)?|reg(ister)?_tokens?|dist_token)$"
)


def name_roles(infos: list[ParameterInfo]) -> list[ParameterInfo]:
    """Gives undeclared parameters the roles that their names and places leave no doubt about.

    Args:
        infos: All parameters of a module, in order.
    """
    moes = {_moe_of(info.path) for info in infos if _EXPERTS.search(info.path)}
    widths = residual_widths(infos)
    layers = [i for i, info in enumerate(infos) if info.position[1] >= 0]
    last_layer = layers[-1] if layers else len(infos)
    result = []
    for i, info in enumerate(infos):
        role = info.role
        if role is None and len(info.shape) >= 2:
            role = _matrix_role(info, moes)
            if role is None and layers and i > last_layer and _is_head(info, widths.get("norms")):
                role = Role.UNEMBEDDING
        elif role is Role.NORM and _QK_NORM.search(info.name):
            role = Role.QK_NORM
        elif role is Role.NORM and i > last_layer and info.form == "norm":
            role = Role.FINAL_NORM  # outside the layers and after them
        result.append(replace(info, role=role))
    return result


def _is_head(info: ParameterInfo, width: int | None) -> bool:
    """True for a linear layer outside and after the layers that leaves the residual width, or is called a head."""
    leaves = info.fans[0] == width != info.fans[1]
    return info.form == "linear" and (leaves or is_head(info.path))


def _layer_of(path: str) -> str:
    """A path up to and with its layer index, or the empty path."""
    template, layer = split_layer(path)
    return f"{template.split('*')[0]}{layer}" if layer >= 0 else ""


def _moe_of(path: str) -> str:
    """Where the router that serves some experts stands: in their layer, else beside them."""
    return _layer_of(path) or path[: _EXPERTS.search(path).start()]  # type: ignore[union-attr]


def _serves(path: str, moes: set[str]) -> bool:
    """True for a path in a layer with experts, or beside them."""
    if layer := _layer_of(path):
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
    if _ATTENTION.search(path):
        return Role.HIDDEN
    up, down = (Role.SHARED_UP, Role.SHARED_DOWN) if _SHARED.search(path) else (Role.FFN_UP, Role.FFN_DOWN)
    return down if _DOWN.search(path) else up if _UP.search(path) else None


def orient(infos: list[ParameterInfo], width: float | None) -> list[ParameterInfo]:
    """Turns the fans of expert stacks that are stored as [E, in, out], recognised by which side is the residual width."""
    result = []
    for info in infos:
        fan_in, fan_out = info.fans
        up, down = info.role is Role.EXPERT_UP, info.role is Role.EXPERT_DOWN
        turned = (up and fan_out == width != fan_in) or (down and fan_in == width != fan_out)
        result.append(replace(info, fans=(fan_out, fan_in)) if turned and info.form == "raw" else info)
    return result


def infer_roles(infos: list[ParameterInfo], base: Mapping[str, ParameterInfo]) -> list[ParameterInfo]:
    """Gives roles to layers that have none yet, by which of their sides grow between base and target (mup's idea).

    Both sides grow: hidden. Only the input side: unembedding. Only the output side: embedding (an input layer). A
    matrix neither side of which grows is hidden, and a vector a bias: their cells are then 1 in width.

    Args:
        infos: The target's parameters.
        base: Target name -> matched parameter of the base.

    Raises:
        ValueError: If a trainable parameter of another form has no role, listing all of them. (Frozen ones are left out.)
    """
    result, unknown = [], []
    for info in infos:
        role = info.role or _role_by_growth(info, base.get(info.name))
        if role is not None:
            result.append(replace(info, role=role))
        elif info.trainable:
            unknown.append(info)
    if unknown:
        raise ValueError(
            f"roles: no role is known for {some(unknown)}. Name one by pattern, e.g. roles: {{'{unknown[0].name}': hidden}}"
            f" (roles: {', '.join(r.value for r in Role)}), or declare `mue_roles` on the module that holds the parameter."
        )
    return result


def _role_by_growth(info: ParameterInfo, old: ParameterInfo | None) -> Role | None:
    if len(info.shape) <= 1:
        return Role.BIAS if info.shape else Role.SCALAR
    if info.name.endswith(("weight_g", "weight_v")):
        return None  # weight_norm: the scale of the one does not scale what the layer does
    if old is None or info.form not in ("linear", "conv"):
        return None
    grows_in, grows_out = (new != was for new, was in zip(info.fans, old.fans, strict=True))
    return {(True, False): Role.UNEMBEDDING, (False, True): Role.EMBEDDING}.get((grows_in, grows_out), Role.HIDDEN)


def mark_folds(infos: list[ParameterInfo]) -> list[ParameterInfo]:
    """Marks the parameters into which a forward multiplier can be folded (theory.md section 2).

    An FFN's output: its down matrices. A residual branch: its last matrix, or the norm behind it. Attention logits: the query
    norm, or the query matrix. A layer's bias goes with its matrix.
    """
    folds: dict[str, frozenset[str]] = {info.path: _folds_of(info) for info in infos if info.role in MATRIX_ROLES}
    query_norms = {info.path for info in infos if info.role is Role.QK_NORM and _QUERY_NORM.search(info.name)}
    attentions = {_parent(path) for path in query_norms}
    for path, kinds in folds.items():
        if _parent(path) in attentions:  # the norm undoes what stands before it
            folds[path] = kinds - {"attention"}
    folds |= dict.fromkeys(query_norms, frozenset({"attention"}))
    normed = {_layer_of(info.path) for info in infos if info.role is Role.NORM and _POST_FFN.search(info.name)}
    for info in infos:
        if _layer_of(info.path) in normed:
            kinds = folds.get(info.path, frozenset())
            last = info.role is Role.NORM and _POST_NORM.search(info.name)
            folds[info.path] = kinds | {"residual"} if last else kinds - {"residual"}
    return [replace(info, folds=folds.get(info.path, frozenset())) for info in infos]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def is_attention(info: ParameterInfo) -> bool:
    """True for a matrix of an attention layer, judged by its name."""
    return len(info.shape) == 2 and bool(_ATTENTION.search(info.path))


def _folds_of(info: ParameterInfo) -> frozenset[str]:
    if info.role in (Role.FFN_DOWN, Role.EXPERT_DOWN):
        return frozenset({"ffn", "route", "residual"})
    if info.role is Role.SHARED_DOWN:
        return frozenset({"ffn", "residual"})  # the route scale is the routed experts' alone
    if info.role is Role.HIDDEN and _ATTENTION.search(info.path):
        if _QUERY.search(info.path):
            return frozenset({"attention"})
        if _OUT.search(info.path):
            return frozenset({"residual"})
    return frozenset()


def why_not_foldable(infos: list[ParameterInfo], kind: str) -> str | None:
    """Why a multiplier of a kind cannot be folded into these parameters, or None if it can."""
    wants: dict[str, list[ParameterInfo]] = defaultdict(list)
    has: set[str] = set()
    for info in infos:
        part = _part(info)
        if (
            info.position[1] >= 0
            and info.role in MATRIX_ROLES - {Role.ROUTER}
            and not (kind == "attention" and part != "attention")
        ):
            wants[f"{_layer_of(info.path)}, {part}"].append(info)
        if kind in info.folds:
            has |= {f"{_layer_of(info.path)}, {part}"}
            if info.role is Role.NORM:  # the norm behind a branch may stand for either branch
                has |= {f"{_layer_of(info.path)}, {p}" for p in ("attention", "FFN")}
    if not wants:
        return "no numbered layers with matrices of known roles were found"
    lacking = next((members for key, members in wants.items() if key not in has), None)
    if lacking is None:
        return None
    what = "the query matrix" if kind == "attention" else "the last matrix of the branch"
    return f"{what} is not known among {some(lacking, 3)}"


def _part(info: ParameterInfo) -> str:
    if _ATTENTION.search(info.path):
        return "attention"
    ffn = info.role is not None and info.role.value.endswith(("_up", "_down"))
    return "FFN" if ffn else "other"


def infer_sizes(infos: list[ParameterInfo], attributes: Mapping[str, float]) -> dict[str, float]:
    """Sizes that a module does not declare, as far as its parameters and attributes tell them.

    Args:
        infos: Its parameters with roles.
        attributes: Its ``head_dim`` and ``top_k``, which leave no trace in the shapes.

    Returns:
        Name of an axis -> size.

    Raises:
        ValueError: If there are experts, but how many are active is not known.
    """
    sizes: dict[str, float] = {}
    if depths := stack_depths(infos):
        sizes["depth"] = max(depths.values())
    for name, role in (("ffn_width", Role.FFN_DOWN), ("expert_width", Role.EXPERT_DOWN)):
        if widths := [info.fans[0] for info in infos if info.role is role]:
            sizes[name] = widths[0]
    head_dims = [i.shape[0] for i in infos if i.role is Role.QK_NORM and i.shape]
    if "head_dim" in attributes or head_dims:
        sizes["head_dim"] = attributes.get("head_dim") or head_dims[0]
    if (experts := _n_experts(infos)) > 1:
        if not ("top_k" in attributes and "expert_width" in sizes):
            missing = "their width" if "top_k" in attributes else "how many of them a token uses"
            raise ValueError(
                f"base: there are {experts} experts, but {missing} is not known. Give the module a method `mue_axes()` that "
                "returns its sizes: width, depth, n_experts, top_k, expert_width, active_width."
            )
        shared = [info.fans[0] for info in infos if info.role is Role.SHARED_DOWN]
        active_width = attributes["top_k"] * sizes["expert_width"] + (shared[0] if shared else 0)
        sizes |= {"n_experts": experts, "top_k": attributes["top_k"], "active_width": active_width}
    elif sizes.get("ffn_width"):
        sizes |= {"n_experts": 1, "top_k": 1}
    return sizes


def residual_widths(infos: Iterable[ParameterInfo]) -> dict[str, int]:
    """What may be the residual width, by where it is seen: the size of most norms, of embeddings, of the unembedding."""
    infos = list(infos)
    norms = [i.shape[0] for i in infos if i.role in (Role.NORM, Role.FINAL_NORM) and len(i.shape) == 1]
    tables = [i.shape[-1] if i.form in ("embedding", "raw") else i.fans[1] for i in infos if i.role is Role.EMBEDDING]
    heads = [i.fans[0] for i in infos if i.role is Role.UNEMBEDDING]
    seen = {"norms": norms, "embeddings": tables, "unembedding": heads}
    return {where: Counter(found).most_common(1)[0][0] for where, found in seen.items() if found}


def stack_depths(infos: Iterable[ParameterInfo]) -> dict[str, int]:
    """Name of each stack of like layers (an encoder, a decoder, ...) -> how many layers it has, nested ones multiplied out."""
    layers: dict[str, set[str]] = defaultdict(set)
    for info in infos:
        if info.position[1] >= 0 and info.role in MATRIX_ROLES:
            layers[all_indices(info.name)].add(info.name)
    depths: dict[str, int] = {}
    for template, names in layers.items():
        found = {split_layer(name)[1] for name in names}
        nested = template.count("*") > 1
        if nested or found == set(range(len(found))):  # 0, 1, 2 and on: not the linear layers between activations
            stack = template.rpartition("*")[0]
            depths[stack] = max(depths.get(stack, 0), len(names))
    return depths


def _n_experts(infos: list[ParameterInfo]) -> int:
    stacks = [i.shape[0] for i in infos if i.role is Role.EXPERT_DOWN and len(i.shape) == 3]
    if stacks:
        return stacks[0]
    # A list of experts, each a module of its own: the second index of the name counts them.
    numbers = {int(m[1]) for i in infos if i.role is Role.EXPERT_DOWN and (m := re.search(r"experts\.(\d+)\.", i.name))}
    return len(numbers)
