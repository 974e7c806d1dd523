"""Infers roles from the sides of a parameter that grow between base and target, where its name does not show the role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_mue.checks import value_error
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, some
from lightning_mue.parameterizations.rules.roles import Role


def infer_roles(infos: list[ParameterInfo], base: Mapping[str, ParameterInfo]) -> list[ParameterInfo]:
    """Gives roles to layers without one by the sides that grow between base and target, as the package `mup` does.

    Both sides grow: hidden. Only the input side: unembedding. Only the output side: embedding (an input layer). Neither side:
    hidden, or bias for a vector; their cells are then 1 in width.

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
        raise value_error(
            "roles",
            found=f"no role for {some(unknown)}",
            expected=f"one of {', '.join(r.value for r in Role)} for each",
            do=f"Name one by pattern, e.g. roles: {{'{unknown[0].name}': hidden}}, or declare `mue_roles` on the module that "
            "holds the parameter.",
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
