"""Families of optimizers, the kinds of update that they make, and how the update of a Muon depends on a matrix's sides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

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
