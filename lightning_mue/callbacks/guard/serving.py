"""What a guard can serve: strategies, and what else stands among the callbacks; and the GradScaler of a run."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.namespaces import is_lightning

#: By name, because ``pytorch_lightning`` has classes of its own.
_SERVED = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
_NOT_SERVED = ("FSDPStrategy", "DeepSpeedStrategy", "SingleDeviceXLAStrategy", "XLAStrategy", "XLAFSDPStrategy")


def refuse(trainer: Trainer, guard: Callback) -> None:
    """Refuses a strategy under which steps cannot be skipped, and a second guard.

    Raises:
        ValueError: Naming it.
    """
    guards = [c for c in trainer.callbacks if isinstance(c, type(guard))]  # type: ignore[attr-defined]
    if len(guards) > 1:
        do = "Give one guard all arguments."
        raise value_error("trainer.callbacks", found=f"{len(guards)} StabilityGuards", expected="one", do=do)
    strategy = trainer.strategy
    served = any(is_lightning(strategy, name) for name in _SERVED)
    if not served or any(is_lightning(strategy, name) for name in _NOT_SERVED):
        raise value_error(
            "strategy",
            found=f"{type(strategy).__name__}, whose optimizer steps are not the optimizer's own, or whose gradients are "
            "not the parameters'",
            expected="one device, DDP or FSDP2 (ModelParallelStrategy)",
            do="Use one of these, or leave StabilityGuard out.",
        )


def refuse_optimizers(optimizers: list[Any]) -> None:
    """Refuses optimizers whose step evaluates the loss several times, with changed weights in between.

    Raises:
        ValueError: Naming it.
    """
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise value_error(
                "optimizer",
                found="LBFGS, whose step evaluates the loss several times with changed weights",
                expected="one that evaluates it once; between two evaluations no step can be skipped without a trace",
                do="Leave StabilityGuard out, or use another optimizer.",
            )


def scaler_of(trainer: Trainer) -> Any:
    """The GradScaler of the run; None without one."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def unscaled(loss: Tensor, scaler: Any) -> Tensor:
    """A loss that was multiplied by the scaler's scale, without it; nothing is read on the host."""
    return loss if scaler is None else loss.detach() / scaler._get_scale_async().to(loss.device)


def mark(scaler: Any, optimizer: Any) -> None:
    """Tells a scaler that the step of an optimizer found an infinite gradient, if only on another rank.

    It then skips the step, and lowers its scale on all ranks alike.
    """
    found = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    for flag in found.values():
        flag.fill_(1.0)


def tell(trainer: Trainer, pl_module: LightningModule) -> None:
    """Tells other callbacks that a step was not taken: those that add something up until it is forget that."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        told = getattr(callback, "on_step_skipped", None)
        if callable(told):
            told(trainer, pl_module)
