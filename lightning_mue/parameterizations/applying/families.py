"""The family of an optimizer: in which table its factors stand."""

from __future__ import annotations

import inspect

import torch
from torch.optim import Optimizer

from lightning_mue.checks import value_error
from lightning_mue.contract import declared_family
from lightning_mue.namespaces import is_lightning
from lightning_mue.parameterizations.applying.update_probe import inner_optimizer, measured_family, rate_counts
from lightning_mue.parameterizations.rules.kinds import Family

#: torch's own, which need no trial. Subclasses count while they do not override ``step``.
_KNOWN: dict[str, Family] = {
    **dict.fromkeys(("Adam", "AdamW", "NAdam", "RAdam", "Adamax", "SparseAdam", "RMSprop"), "adam"),
    **dict.fromkeys(("SGD", "ASGD"), "sgd"),
}
#: Optimizers that go over to another update later, when no trial sees it.
_CHANGING = ("SWATS", "ScalableShampoo", "AdaBound")


def family_of(optimizer: Optimizer) -> Family:
    """The family whose table holds the factors of an optimizer; of a wrapper (SAM, Lookahead), by its updates as a whole.

    HyperSphereOptimizer declares whether it is on the sphere or a Muon. Of the others, only torch.optim.Muon is recognised as a
    Muon by its type, because only its factors of the matrix shape are known (`split` corrects for them). Another Muon has to
    declare it: ``mue_family = "muon"``. torch's Adams and SGDs are known; whatever else is tried (see `measured_family`), since a
    name says little.

    Raises:
        ValueError: For an optimizer that no table covers, or a wrapper whose updates the rate of the inner one does not scale.
    """
    if is_lightning(optimizer, "LightningOptimizer"):  # what module.optimizers() gives
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    inner = inner_optimizer(optimizer)
    declared: Family | None = declared_family(optimizer) or (declared_family(inner) if inner is not optimizer else None)
    if declared is not None:
        if inner is not optimizer:
            _refuse_unscaled(optimizer, inner)
        return declared
    if inner is optimizer and (muon := getattr(torch.optim, "Muon", None)) is not None and isinstance(optimizer, muon):
        return "muon"
    for one in (optimizer, inner):
        _refuse_unknown_muon(one)
    if inner is optimizer:
        step = inspect.unwrap(type(optimizer).step)
        for name, known in _KNOWN.items():
            if isinstance(optimizer, cls := getattr(torch.optim, name)) and step is inspect.unwrap(cls.step):
                return known
    family, why = measured_family(optimizer)
    if type(inner).__name__ in _CHANGING:
        family, why = None, "which goes over to another update in the middle of a run"
    if family is None:
        raise _no_table(optimizer, inner, why)
    return family


def _no_table(optimizer: Optimizer, inner: Optimizer, why: str) -> ValueError:
    wrapped = f" (around {type(inner).__name__})" if inner is not optimizer else ""
    use = f"Return the {type(inner).__name__} alone from configure_optimizers. " if wrapped else "Use one of them. "
    if why.endswith("in its parameter groups"):
        use = "Build it from param_groups(model, plan) and leave MuECallback out, or use a wrapper (ScheduleFreeWrapper). "
    return value_error(
        "optimizer",
        found=f"{type(optimizer).__name__}{wrapped}, {why}",
        expected="an Adam-like optimizer (Adam, AdamW, Lion), SGD, Muon or HyperSphereOptimizer, for which there are tables",
        do=f"{use}If you know that the updates scale like those of one of them, set the optimizer's attribute mue_family "
        "to 'adam', 'sgd', 'muon' or 'sphere'.",
    )


def _refuse_unscaled(optimizer: Optimizer, inner: Optimizer) -> None:
    right, why = rate_counts(optimizer)
    if not right:
        raise value_error(
            "optimizer",
            found=f"{type(optimizer).__name__} around {type(inner).__name__} with mue_family = "
            f"{declared_family(optimizer) or declared_family(inner)!r}, {why}",
            expected="a wrapper whose updates are scaled by the rate of the optimizer inside",
            do=f"Return the {type(inner).__name__} alone from configure_optimizers.",
        )


def _refuse_unknown_muon(optimizer: Optimizer) -> None:
    if any("muon" in cls.__name__.lower() for cls in type(optimizer).__mro__):
        raise value_error(
            "optimizer",
            found=f"{type(optimizer).__name__}, a Muon whose factors of the matrix shape are not known",
            expected="torch.optim.Muon, or a Muon that declares mue_family = 'muon'",
            do="With mue_family = 'muon' the plan's lr of a matrix is the wanted ratio of its update's spectral norm to the "
            "base's, so the optimizer's own factor must be the same at both sizes (switch it off if it has one).",
        )
