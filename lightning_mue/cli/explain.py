"""``lightning-mue explain``: the plan of a model, a comparison of rules, and the file of a base."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from rich.console import RenderableType
from torch.optim import Optimizer

from lightning_mue.analysis.training import flatten_optimizers
from lightning_mue.callbacks import MuECallback
from lightning_mue.checks import value_error
from lightning_mue.parameterizations import ScalingPlan
from lightning_mue.parameterizations.planning.compare import compare_rules
from lightning_mue.parameterizations.reading.base import save_base
from lightning_mue.parameterizations.rules.kinds import Family


def compare(
    model: LightningModule, callback: MuECallback, plan: ScalingPlan, rules: str, family: Family | None
) -> RenderableType:
    """Compares rules, given as names separated by commas, for the base, axes and overrides of a callback's plan."""
    of_plan: Family | None = None if "+" in plan.family else plan.family  # type: ignore[assignment]  # "muon+adam"
    return compare_rules(
        model,
        [rule.strip() for rule in rules.split(",")],
        family=family or of_plan,
        base=callback.base,
        alpha=callback.alpha,
        tokens=plan.axes.get("tokens"),
        batch_tokens=plan.axes.get("batch_tokens"),
        roles=callback.roles,
        multipliers=callback.multipliers,
    )


def save_base_of(model: LightningModule, callback: MuECallback, path: str) -> None:
    """Writes the shapes and initialization of a callback's base to a file."""
    # A module on meta has no values to measure; the overrides {} build it again with real ones.
    base = callback.base if callback.base is not None else {}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_base(model, path, base=base, roles=callback.roles, multipliers=callback.multipliers)


def stand_in_optimizers(model: LightningModule, family: Family | None) -> list[Optimizer]:
    """Optimizers for a plan without a run, for which only their family matters.

    Args:
        model: The module; its own optimizers are used if `family` is None.
        family: The family of a stand-in.

    Raises:
        ValueError: The module's ``configure_optimizers`` cannot run without a trainer.
    """
    if family is not None:
        stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
        stand_in.mue_family = family  # type: ignore[attr-defined]
        return [stand_in]
    factory = getattr(model, "optimizer", None)
    if callable(factory):
        return [factory(list(model.named_parameters()))]
    try:
        configured = model.configure_optimizers()
    except Exception as error:
        raise value_error(
            "--family",
            found=f"none, and {type(model).__name__}.configure_optimizers cannot run without a trainer ({error})",
            expected="the family of the optimizer",
            do="Give --family adam, sgd, sphere or muon.",
        ) from error
    return flatten_optimizers(configured)
