"""The run that TransferMonitor watches: its plan and its length."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_mue.callbacks.mue.callback import MuECallback
from lightning_mue.callbacks.mue.run import steps
from lightning_mue.checks import value_error
from lightning_mue.parameterizations import ScalingPlan, plan
from lightning_mue.parameterizations.applying.families import family_of


def plan_in_force(
    trainer: Trainer, pl_module: LightningModule, roles: dict[str, str] | None
) -> tuple[MuECallback | None, ScalingPlan]:
    """The Trainer's MuECallback, if it has made a plan, and the plan; else one that only knows the roles.

    Raises:
        ValueError: For a parameter without a role.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set through a connector
    mue = next((c for c in callbacks if isinstance(c, MuECallback) and c.plan is not None), None)
    if mue is not None and mue.plan is not None:
        return mue, mue.plan
    try:
        family = family_of(trainer.optimizers[0]) if trainer.optimizers else "adam"
    except ValueError:  # no table covers it; the roles are the same
        family = "adam"
    try:
        return None, plan(pl_module, rule="sp", family=family, roles=roles)
    except ValueError as error:
        raise ValueError(
            f"{error} TransferMonitor needs every parameter's role: give it roles=..., or add MuECallback."
        ) from error


def total_steps(trainer: Trainer) -> int:
    """Optimizer steps of the run, of which the progress is a fraction.

    Raises:
        ValueError: If they are not known.
    """
    try:
        return steps(trainer)
    except LookupError:
        found = f"{trainer.max_steps} with max_epochs={trainer.max_epochs}, so the length of this run is not known"
        expected = "a known length, of which TransferMonitor's progress is a fraction"
        raise value_error("max_steps", found=found, expected=expected, do="Set max_steps of the Trainer.") from None
