"""Verifies the plan of a fit on its first batch, before the first step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.optim import Optimizer

from lightning_mue.checks import value_error
from lightning_mue.parameterizations import Parameterization
from lightning_mue.parameterizations.reading.base import Base
from lightning_mue.parameterizations.reading.parameters import list_parameters
from lightning_mue.parameterizations.verifying.verify import flatten_optimizers, verify_plan

_log = logging.getLogger(__name__)

#: None: verify where the module leaves roles to inference. True and "warn" warn of deviations, "raise" raises.
Verify = bool | Literal["warn", "raise"] | None


def infers_roles(pl_module: LightningModule) -> bool:
    """Whether the role of a matrix has to be inferred, because its module does not declare it."""
    return any(info.role is None and len(info.shape) > 1 and info.trainable for info in list_parameters(pl_module))


class _Stage:
    """What the throw-away modules take for their trainer: the real one, but without loggers."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer, self.logger = trainer, DummyLogger()
        self.loggers = [self.logger]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


def verify(
    asked: Verify,
    trainer: Trainer,
    pl_module: LightningModule,
    batch: Any,
    *,
    base: Base | None,
    rule: Parameterization,
    alpha: float,
    roles: dict[str, str] | None,
    multipliers: dict[str, str] | None,
) -> None:
    """Verifies the plan as asked, and tells the outcome on rank zero. Every rank verifies: a loss may communicate.

    Nothing of the run is changed: no weights, loggers or random numbers.

    Raises:
        ValueError: On every rank, with ``asked="raise"``, if on one the plan does not keep what a sound plan keeps, or cannot be
            verified.
    """
    if asked is False or rule.name == "sp" or (base is None and asked is None) or base == {}:
        return
    if asked is None and not infers_roles(pl_module):
        return
    if (why := _why_not(base, pl_module)) is not None:
        _tell(
            asked,
            f"verify: the plan is not verified, because {why}. Verify it with `lightning-mue explain --verify true`.",
        )
        return
    assert base is not None
    stage = _Stage(trainer)

    def optimizer(model: Any) -> Any:
        model.trainer = stage
        made = model.configure_optimizers()
        return made if flatten_optimizers(made) else _like(trainer.optimizers, model)

    passed = False
    try:
        with isolate_rng():
            found = verify_plan(
                pl_module,
                batch,
                base=base,
                rule=rule,
                optimizer=optimizer,
                alpha=alpha,
                roles=roles,
                multipliers=multipliers,
            )
        passed, message = found.passed, str(found)
    except Exception as error:  # the module's own code may raise anything; the run itself need not
        ours = isinstance(error, ValueError) and str(error).startswith("verify")
        message = str(error) if ours else f"verify: the plan could not be verified ({type(error).__name__}: {error})"
    if asked == "raise":  # together, lest a rank waits for one that has stopped
        passed = trainer.strategy.reduce_boolean_decision(passed, all=True)
    if passed:
        _log.info("MuECallback: %s", message)
    else:
        _tell(asked, message)


def _why_not(base: Base | None, pl_module: LightningModule) -> str | None:
    if base is None:
        return "it has no base to run"
    if isinstance(base, (str, Path)):
        return "the base is a file, which holds no module to run"
    return "weights are sharded" if getattr(pl_module, "_device_mesh", None) is not None else None


def _like(optimizers: list[Optimizer], model: nn.Module) -> Optimizer:
    """An optimizer like the run's only one, for a module without one of its own: LightningCLI configures the target's instance."""
    if len(optimizers) != 1 or len(optimizers[0].param_groups) != 1:
        found = f"no optimizer from {type(model).__name__}.configure_optimizers()"
        raise value_error("verify", found=found, expected="one", do="Configure it in the module, or give verify=False.")
    return type(optimizers[0])(model.parameters(), **optimizers[0].defaults)


def _tell(asked: Verify, message: str) -> None:
    if asked == "raise":
        raise ValueError(message)
    rank_zero_warn(f"MuECallback: {message}")
