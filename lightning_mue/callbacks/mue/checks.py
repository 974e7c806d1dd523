"""What MuECallback refuses and warns of, and the copies of the weights that other callbacks hold."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_mue.parameterizations import ScalingPlan
from lightning_mue.sharded import is_sharded

#: Checkpoints that lr_find and scale_batch_size write to come back from their trials.
_TUNERS_CHECKPOINTS = (".lr_find_", ".scale_batch_size_")
#: The smallest positive float16; half of it, and what is below, is rounded to 0.
_SMALLEST_HALF = 2.0**-24


def refuse_flattening(trainer: Trainer) -> None:
    """Refuses strategies under which a parameter has no shape of its own.

    Raises:
        ValueError: For FSDP1 and DeepSpeed.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy)):
        raise ValueError(
            f"MuECallback: {type(trainer.strategy).__name__} flattens and regroups parameters, so they cannot be scaled by role. "
            "Use FSDP2 (ModelParallelStrategy, with fully_shard in configure_model) or DDP."
        )


def refuse_strange_parameters(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuses an optimizer that was made before configure_model replaced the parameters: it would train nothing.

    Raises:
        ValueError: If an optimizer holds plain tensors while the module's parameters are sharded.
    """
    own = set(map(id, pl_module.parameters()))
    if not any(is_sharded(p) for p in pl_module.parameters()):
        return
    for optimizer in trainer.optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if held and not any(id(p) in own for p in held):
            raise ValueError(
                f"MuECallback: {type(optimizer).__name__} holds none of the module's parameters, because it was made before "
                "configure_model sharded them; it would train nothing. Make it in configure_optimizers (with LightningCLI: "
                "auto_configure_optimizers=False and an OptimizerCallable argument of the module)."
            )


def warn_of_tuners(trainer: Trainer) -> None:
    """Warns where training may start before the plan is applied."""
    if any(type(c).__name__ in ("LearningRateFinder", "BatchSizeFinder") for c in trainer.callbacks):  # type: ignore[attr-defined]
        rank_zero_warn(
            "MuECallback: the tuner callbacks train before the parameterization is applied, so what they find holds for "
            "the unscaled model. Tune on the base model instead."
        )


def warn_of_compiled(pl_module: LightningModule) -> None:
    """Warns of ``trainer.fit(torch.compile(module))``, which traces Lightning's own hooks."""
    if pl_module._compiler_ctx is not None:
        rank_zero_warn(
            "MuECallback: the whole LightningModule was given to torch.compile; with torch 2.13 and Lightning 2.6 self.log then "
            "raises in training_step. Call module.compile() in configure_model, or compile its submodules: names, plan and "
            "multipliers are the same."
        )


def is_tuners(path: str | Path | None) -> bool:
    """True for a checkpoint by which a tuner undoes its trials: it holds no run to resume."""
    return path is not None and Path(path).name.startswith(_TUNERS_CHECKPOINTS)


def resumes(trainer: Trainer) -> bool:
    """True if the trainer has restored a run's checkpoint (one without callback states included)."""
    return trainer.ckpt_path is not None and not is_tuners(trainer.ckpt_path)


def refuse_missing_plan(plan: ScalingPlan) -> None:
    """Refuses to go on from a checkpoint without a plan.

    Raises:
        ValueError: Unless this run's plan changes nothing.
    """
    if not plan.same_size:
        raise ValueError(
            "MuECallback: the checkpoint holds no plan, so it was written by a run without this callback, and going on with "
            "it would change the hyperparameters in the middle. Resume without the callback, or start a new run. The "
            "checkpoint was not changed."
        )


def refuse_differences(saved: ScalingPlan, plan: ScalingPlan) -> None:
    """Refuses to go on under another plan than the checkpoint's.

    Raises:
        ValueError: With the differences.
    """
    differences = saved.diff(plan, init=False)  # the initial weights are in the checkpoint already
    if differences:
        shown = "\n  ".join(differences[:12])
        more = f"\n  and {len(differences) - 12} more" if len(differences) > 12 else ""
        old = saved.axes.get("tokens")
        longer = (
            f" `tokens` counts in the plan, and follows from the Trainer's max_steps unless given: MuECallback(tokens={old:g}, "
            "...) goes on with the old run's scaling."
            if old is not None and old != plan.axes.get("tokens")
            else ""
        )
        raise ValueError(
            "MuECallback: the checkpoint was written by a run with another plan, so going on would change the "
            f"hyperparameters in the middle (checkpoint -> now):\n  {shown}{more}\nRestore the old rule, base and sizes, or "
            f"start a new run from the weights alone.{longer} The checkpoint was not changed."
        )


def warn_of_kept_weights(pl_module: LightningModule, last: ScalingPlan | None, plan: ScalingPlan) -> None:
    """Warns where a module goes on with the weights of its last fit, while this fit's plan would have drawn others.

    Args:
        pl_module: The module.
        last: Plan of its last fit, if there was one.
        plan: Plan of this fit.
    """
    if last is None or plan.same_size:
        return
    if {entry.name: entry.init for entry in last.parameters} != {entry.name: entry.init for entry in plan.parameters}:
        rank_zero_warn(
            f"MuECallback: {type(pl_module).__name__} was fitted before under another plan ({last.rule}; now {plan.rule}). Its "
            "weights were kept, so the initial stds in the table of the plan do not hold. Make a new module to start anew."
        )


def warn_of_optimizers(trainer: Trainer, pl_module: LightningModule, plan: ScalingPlan) -> None:
    """Warns of weight decay that the rules do not mean, and of an epsilon that is 0 in float16."""
    for optimizer in trainer.optimizers:
        coupled = type(optimizer) is torch.optim.Adam and not optimizer.defaults.get("decoupled_weight_decay")
        if coupled and any(group["weight_decay"] for group in optimizer.param_groups):
            rank_zero_warn(
                "MuECallback: torch.optim.Adam adds weight decay to the gradient, while the rules scale decoupled decay. "
                "Use AdamW."
            )
    half = {n for n, p in pl_module.named_parameters() if p.dtype == torch.float16}
    eps = [group["eps"] for o in trainer.optimizers for group in o.param_groups if "betas" in group and "eps" in group]
    factor = min((entry.eps for entry in plan.parameters if entry.name in half), default=None)
    if factor is not None and eps and min(eps) * factor <= _SMALLEST_HALF / 2:
        rank_zero_warn(
            f"MuECallback: the parameters are in float16 (precision '16-true'), in which Adam's scaled eps, "
            f"{min(eps) * factor:.1e}, is 0, so that a gradient of 0 gives NaN. Use 'bf16-true' or '16-mixed', or an eps of "
            f"at least {_SMALLEST_HALF / factor:.0e}."
        )


@torch.no_grad()
def copy_to_averages(trainer: Trainer, pl_module: LightningModule) -> None:
    """Gives the drawn weights to the copies that Lightning's weight averaging callbacks made in ``setup``, before the draw."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = getattr(callback, "_average_model", None)
        if not isinstance(average, nn.Module):
            continue
        copy = getattr(average, "module", average)
        for mine, drawn in zip(copy.parameters(), pl_module.parameters(), strict=True):
            mine.copy_(drawn)
