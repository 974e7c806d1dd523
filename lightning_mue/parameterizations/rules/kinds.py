"""Families of optimizers, the kinds of update that they make, and how the update of a Muon depends on a matrix's sides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from lightning_mue.checks import value_error
from lightning_mue.contract import declared_family
from lightning_mue.parameterizations.rules.roles import MATRIX_ROLES, Role

#: Families of optimizers, one table each: Adam-like, SGD, HyperSphereOptimizer, Muon.
Family = Literal["adam", "sgd", "sphere", "muon"]
#: The update of one parameter. ``sphere``: Muon on the Frobenius sphere; ``adam_sphere``: Adam's direction on the sphere;
#: ``muon``: Muon without the sphere.
Kind = Literal["sphere", "muon", "adam_sphere", "adamw", "sgd"]
#: The updates of HyperSphereOptimizer, in the order in which it splits a group.
KINDS: tuple[Kind, ...] = ("sphere", "muon", "adam_sphere", "adamw")
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
    """The update that a role gets: Muon for hidden matrices of the sphere and muon families, Adam's for vectors."""
    if family == "sgd":
        return "sgd"
    if family == "adam" or role not in MATRIX_ROLES:
        return "adamw"
    if family == "muon":
        return "adamw" if role is Role.UNEMBEDDING else "muon"
    return "adam_sphere" if role is Role.UNEMBEDDING else "sphere"


def matrix_sides(shape: Sequence[int]) -> tuple[int, int]:
    """Return `(out, in)` of a matrix, of each matrix of a stack (three dimensions), or of a convolution (more)."""
    return (shape[1], shape[2]) if len(shape) == 3 else (shape[0], math.prod(shape[1:]))


def family_of(optimizer: torch.optim.Optimizer) -> Family:
    """The family whose table holds the factors of an optimizer.

    HyperSphereOptimizer declares whether it is on the sphere or a Muon. Of the others, only torch.optim.Muon is recognised as a
    Muon by its type, because only its factors of the matrix shape are known (`split` corrects for them). Another Muon has to
    declare it: ``mue_family = "muon"``.

    Raises:
        ValueError: For an optimizer that no table covers.
    """
    declared = declared_family(optimizer)
    if declared is not None:
        return declared
    if (muon := getattr(torch.optim, "Muon", None)) is not None and isinstance(optimizer, muon):
        return "muon"
    classes = [cls.__name__ for cls in type(optimizer).__mro__]  # a subclass of AdamW by any name updates like Adam
    if any("muon" in name.lower() for name in classes):
        raise value_error(
            "optimizer",
            found=f"{type(optimizer).__name__}, a Muon whose factors of the matrix shape are not known",
            expected="torch.optim.Muon, or a Muon that declares mue_family = 'muon'",
            do="With mue_family = 'muon' the plan's lr of a matrix is the wanted ratio of its update's spectral norm to the "
            "base's, so the optimizer's own factor must be the same at both sizes (switch it off if it has one).",
        )
    for name in classes:
        for family in ("adam", "sgd"):
            if family in name.lower():
                return family  # type: ignore[return-value]
    raise value_error(
        "optimizer",
        found=type(optimizer).__name__,
        expected="an Adam-like optimizer (Adam, AdamW), SGD, Muon or HyperSphereOptimizer, for which there are tables",
        do="If yours updates like one of them, set its attribute mue_family to 'adam', 'sgd', 'muon' or 'sphere'.",
    )
