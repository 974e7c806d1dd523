"""Families of optimizers, the kinds of update that they make, and how the update of a Muon depends on a matrix's sides."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from lightning_mue.checks import value_error
from lightning_mue.parameterizations.rules.roles import MATRIX_ROLES, Role

#: Families of optimizers, one table each: Adam-like, SGD, HyperSphereOptimizer, Muon.
Family = Literal["adam", "sgd", "sphere", "muon"]
#: The update of one parameter. ``sphere``: Muon on the Frobenius sphere; ``adam_sphere``: Adam's direction on the sphere;
#: ``muon``: Muon without the sphere.
Kind = Literal["sphere", "muon", "adam_sphere", "adamw", "sgd"]
#: The updates of HyperSphereOptimizer, in the order in which it splits a group.
KINDS: tuple[Kind, ...] = ("sphere", "muon", "adam_sphere", "adamw")
#: Not an update: a group of HyperSphereOptimizer whose key `kinds` has the kind of each parameter (`parts_of`).
MIXED = "mixed"
#: The updates that orthogonalize a momentum.
MUON_KINDS: tuple[Kind, ...] = ("sphere", "muon")
#: The updates that have Adam's moments and epsilon.
ADAM_KINDS: tuple[Kind, ...] = ("adamw", "adam_sphere")
#: The updates that keep a weight's Frobenius norm (its radius).
SPHERE_KINDS: tuple[Kind, ...] = ("sphere", "adam_sphere")

#: How a Muon turns its `lr` into the spectral norm of the update of an [out, in] matrix: ``spectral`` and ``rms`` in
#: docs/theory.md section 5.2, ``original`` as torch.optim.Muon has it.
CONVENTIONS: dict[str, Callable[[int, int], float]] = {
    "spectral": lambda out, fan_in: math.sqrt(out / fan_in),
    "rms": lambda out, fan_in: 0.2 * math.sqrt(max(out, fan_in)),
    "original": lambda out, fan_in: math.sqrt(max(1.0, out / fan_in)),
    "unit": lambda out, fan_in: 1.0,
}


def default_kind(role: Role, family: Family) -> Kind:
    """The update that a role gets: Muon for hidden matrices of the sphere and muon families, Adam's for vectors and modulations."""
    if family == "sgd":
        return "sgd"
    if family == "adam" or role not in MATRIX_ROLES - {Role.MODULATION}:
        return "adamw"
    if family == "muon":
        return "adamw" if role is Role.UNEMBEDDING else "muon"
    return "adam_sphere" if role is Role.UNEMBEDDING else "sphere"


def matrix_sides(shape: Sequence[int]) -> tuple[int, int]:
    """Return `(out, in)` of a matrix, of each matrix of a stack (three dimensions), or of a convolution (more)."""
    return (shape[1], shape[2]) if len(shape) == 3 else (shape[0], math.prod(shape[1:]))


def members_of(group: Mapping[str, Any]) -> list[tuple[str | None, Any]]:
    """Return the kind and the `split` of each parameter of a group.

    Raises:
        ValueError: If `kinds` or `splits` of a group do not have one entry for each parameter.
    """
    size, kind = len(group["params"]), group.get("kind")
    kinds = group.get("kinds", ()) if kind == MIXED else [kind] * size
    splits = group.get("splits", [group.get("split")] * size)
    for key, entries in (("kinds", kinds), ("splits", splits)):
        if len(entries) != size:
            found, expected = f"{len(entries)} entries in a param group", f"one for each of its {size} parameters"
            do = "Change it together with `params`; leave `kind` out of a new group to have kinds decided."
            raise value_error(key, found=found, expected=expected, do=do)
    return list(zip(kinds, splits, strict=True))


def parts_of(group: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the groups that a group stands for: of one kind and one `split` each. Most groups stand for themselves.

    A group that is added to a HyperSphereOptimizer stays one group for whoever sets its `lr`, whatever is in it. If it is of
    several kinds, `kinds` and `splits` have one entry for each parameter, and in kind `adamw` its `lr` is multiplied by
    `adamw_lr_factor`, and `adamw_weight_decay` takes the place of its `weight_decay`, where it has these.
    """
    if group.get("kind") != MIXED and "splits" not in group:
        return [group]
    own = ("kinds", "splits", "adamw_lr_factor", "adamw_weight_decay")
    settings = {key: value for key, value in group.items() if key not in own}
    members: dict[tuple[Any, str], list[int]] = {}
    for index, (kind, split) in enumerate(listed := members_of(group)):
        members.setdefault((kind, repr(split)), []).append(index)
    parts: list[Mapping[str, Any]] = []
    for (kind, _), indices in members.items():
        part = {**settings, "kind": kind, "split": listed[indices[0]][1]}
        if "name" in group and kind != group["kind"]:
            part["name"] = f"{group['name']}/{kind}"
        if kind == "adamw" and "adamw_lr_factor" in group:
            part["lr"] = group["lr"] * group["adamw_lr_factor"]
        if kind == "adamw" and "adamw_weight_decay" in group:
            part["weight_decay"] = group["adamw_weight_decay"]
        for key in ("params", "param_names"):
            if group.get(key):
                part[key] = [group[key][index] for index in indices]
        parts.append(part)
    return parts
