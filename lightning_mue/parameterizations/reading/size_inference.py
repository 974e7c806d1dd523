"""Infers the sizes that a model does not declare, from its parameters and attributes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

from lightning_mue.checks import value_error
from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.reading.stacks import count_experts, stack_depths
from lightning_mue.parameterizations.rules.roles import Role


def infer_sizes(infos: list[ParameterInfo], attributes: Mapping[str, float]) -> dict[str, float]:
    """Axis -> size, from parameters with roles, and from ``head_dim`` and ``top_k``, which the shapes do not show.

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
    if (experts := count_experts(infos)) > 1:
        if not ("top_k" in attributes and "expert_width" in sizes):
            missing = "their width" if "top_k" in attributes else "how many of them a token uses"
            raise value_error(
                "base",
                found=f"{experts} experts, but {missing} is not known",
                expected="experts of known width, of which a known number is active",
                do="Give the module a method `mue_axes()` that returns its sizes: width, depth, n_experts, top_k, "
                "expert_width, active_width.",
            )
        shared = [info.fans[0] for info in infos if info.role is Role.SHARED_DOWN]
        active_width = attributes["top_k"] * sizes["expert_width"] + (shared[0] if shared else 0)
        sizes |= {"n_experts": experts, "top_k": attributes["top_k"], "active_width": active_width}
    elif sizes.get("ffn_width"):
        sizes |= {"n_experts": 1, "top_k": 1}
    return sizes


def residual_widths(infos: Iterable[ParameterInfo]) -> dict[str, int]:
    """Candidates for the residual width, by where they are found: most norms, embeddings, the unembedding."""
    infos = list(infos)
    norms = [i.shape[0] for i in infos if i.role in (Role.NORM, Role.FINAL_NORM) and len(i.shape) == 1]
    tables = [i.shape[-1] if i.form in ("embedding", "raw") else i.fans[1] for i in infos if i.role is Role.EMBEDDING]
    heads = [i.fans[0] for i in infos if i.role is Role.UNEMBEDDING]
    seen = {"norms": norms, "embeddings": tables, "unembedding": heads}
    return {where: Counter(found).most_common(1)[0][0] for where, found in seen.items() if found}


#: TransformerLens' names of its parameters -> role.
_LENS = {
    **dict.fromkeys(("W_E", "W_pos"), Role.EMBEDDING),
    **dict.fromkeys(("W_Q", "W_K", "W_V", "W_O"), Role.HIDDEN),
    **dict.fromkeys(("W_in", "W_gate"), Role.FFN_UP),
    **dict.fromkeys(("b_Q", "b_K", "b_V", "b_O", "b_in", "b_out", "b_U"), Role.BIAS),
    "W_out": Role.FFN_DOWN,
    "W_U": Role.UNEMBEDDING,
}


def read_transformer_lens(infos: list[ParameterInfo]) -> list[ParameterInfo]:
    """Gives roles and fans to the parameters of a TransformerLens model, known by its ``W_E`` and ``W_U``.

    It stores matrices as [in, out], and those of an attention head by head: [heads, d, head_dim], ``W_O`` [heads, head_dim, d].
    """
    leaves = {info.name.rpartition(".")[2] for info in infos}
    if not {"W_E", "W_U"} <= leaves:
        return infos
    result = []
    for info in infos:
        leaf, shape = info.name.rpartition(".")[2], info.shape
        role = _LENS.get(leaf) if info.form == "raw" else None
        if role not in (None, Role.BIAS, Role.EMBEDDING) and len(shape) >= 2:
            heads = prod(shape[:-2])
            fans = (heads * shape[-2], shape[-1]) if leaf == "W_O" else (shape[-2], heads * shape[-1])
            info = replace(info, fans=fans)
        result.append(replace(info, role=info.role or role))
    return result


def orient(infos: list[ParameterInfo], width: float | None) -> list[ParameterInfo]:
    """Swaps the fans of expert stacks that are stored as [E, in, out], recognised by the side that is the residual width."""
    result = []
    for info in infos:
        fan_in, fan_out = info.fans
        up, down = info.role is Role.EXPERT_UP, info.role is Role.EXPERT_DOWN
        turned = (up and fan_out == width != fan_in) or (down and fan_in == width != fan_out)
        result.append(replace(info, fans=(fan_out, fan_in)) if turned and info.form == "raw" else info)
    return result
