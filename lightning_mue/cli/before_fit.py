"""Optimizers of a module before its fit: plans and their verification need them, and no training follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_mue.callbacks.mue.run import steps
from lightning_mue.checks import value_error
from lightning_mue.parameterizations.rules.kinds import Family
from lightning_mue.parameterizations.verifying.verify import flatten_optimizers


class _BeforeFit:
    """A trainer before its fit, whose number of steps can be asked for: schedules need it."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def estimated_stepping_batches(self) -> int:
        return steps(self._trainer, optimizers=1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


@contextmanager
def attached(model: LightningModule, trainer: Trainer) -> Iterator[None]:
    """Gives a module a trainer while it makes its optimizers."""
    before = getattr(model, "_trainer", None)
    model.trainer = _BeforeFit(trainer)  # type: ignore[assignment]
    try:
        yield
    finally:
        model.trainer = before


def stand_in_optimizers(model: LightningModule, family: Family | None, trainer: Trainer) -> list[Optimizer]:
    """Optimizers for a plan without a run: by default the module's own, at their full rates."""
    if family is not None:
        stand_in = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
        stand_in.mue_family = family  # type: ignore[attr-defined]
        return [stand_in]
    factory = getattr(model, "optimizer", None)
    if callable(factory):
        return [factory(list(model.named_parameters()))]
    try:
        with attached(model, trainer):
            configured = model.configure_optimizers()
    except Exception as error:
        raise value_error(
            f"{type(model).__name__}.configure_optimizers",
            found=f"that it cannot run without a training ({error})",
            expected="optimizers",
            do="Give the model an attribute `optimizer`, a function from parameters to an optimizer; or, to explain only, "
            "give --family adam, sgd, sphere or muon.",
        ) from error
    optimizers = flatten_optimizers(configured)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group.get("initial_lr", group["lr"])  # a schedule has set that of its first step
    return optimizers
