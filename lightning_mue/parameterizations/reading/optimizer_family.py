"""Finds the optimizer family, and so the table, of an optimizer."""

from __future__ import annotations

import torch

from lightning_mue.checks import value_error
from lightning_mue.contract import declared_family
from lightning_mue.parameterizations.rules.kinds import Family


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
