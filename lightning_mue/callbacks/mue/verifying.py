"""Verifies the plan of a fit on its first batch, before the first step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_mue.parameterizations import Parameterization
from lightning_mue.parameterizations.reading.base import Base
from lightning_mue.parameterizations.reading.parameters import list_parameters
from lightning_mue.parameterizations.verifying.verify import verify_plan

_log = logging.getLogger(__name__)

#: None: verify where the module leaves roles to inference. True and "warn" warn of deviations, "raise" raises.
Verify = bool | Literal["warn", "raise"] | None


def infers_roles(pl_module: LightningModule) -> bool:
    """Whether the role of a matrix has to be inferred, because its module does not declare it."""
    return any(info.role is None and len(info.shape) > 1 and info.trainable for info in list_parameters(pl_module))


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
    """Verifies the plan as asked, and tells the outcome on rank zero.

    Raises:
        ValueError: With ``asked="raise"``, if the plan does not keep what a sound plan keeps, or cannot be verified.
    """
    if asked is False or rule.name == "sp" or base is None or base == {}:
        return
    if asked is None and not infers_roles(pl_module):
        return
    if isinstance(base, (str, Path)) or getattr(pl_module, "_device_mesh", None) is not None:
        what = (
            "the base is a file, which holds no module to run"
            if isinstance(base, (str, Path))
            else "weights are sharded"
        )
        _tell(
            asked, f"verify: the plan is not verified, because {what}. Verify it with `lightning-mue explain --verify`."
        )
        return

    def optimizer(model: Any) -> Any:
        model.trainer = trainer
        return model.configure_optimizers()

    try:
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
    except (ValueError, TypeError) as error:
        _tell(asked, str(error))
        return
    if found.passed:
        _log.info("MuECallback: %s", found)
    else:
        _tell("raise" if asked == "raise" else "warn", str(found))


def _tell(asked: Verify, message: str) -> None:
    if asked == "raise":
        raise ValueError(message)
    rank_zero_warn(f"MuECallback: {message}")
