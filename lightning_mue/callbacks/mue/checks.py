"""What MuECallback refuses and warns of: in ``setup``, at fit start, and about the checkpoint of a resumed run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_mue.checks import listed, mismatch, require_choice, require_integer, require_types, value_error
from lightning_mue.moe.balance_callbacks import warn_of_missing_callbacks
from lightning_mue.parameterizations import ScalingPlan
from lightning_mue.parameterizations.applying.initial_weights import check_draws, has_weights, without_multiplier
from lightning_mue.parameterizations.applying.loaded import drawn_over
from lightning_mue.parameterizations.applying.update_probe import inner_optimizer
from lightning_mue.parameterizations.planning.plan import check_plan_arguments
from lightning_mue.parameterizations.reading.base import Base
from lightning_mue.sharded import is_sharded

#: Strategies under which a parameter has no shape of its own. By name: ``pytorch_lightning`` has classes of its own.
_FLATTENING = {"FSDPStrategy", "DeepSpeedStrategy"}
#: Checkpoints that lr_find and scale_batch_size write to come back from their trials.
_TUNERS_CHECKPOINTS = (".lr_find_", ".scale_batch_size_")
#: The smallest positive float16; half of it, and what is below, is rounded to 0.
_SMALLEST_HALF = 2.0**-24


def check_arguments(cls: type, given: Mapping[str, Any]) -> None:
    """Refuses arguments of MuECallback (cls) that no module makes right.

    Raises:
        TypeError: One is of another type.
        ValueError: One is out of range, no regular expression, or none of the choices.
    """
    check_draws(given["initialize"])
    require_choice("verify", given["verify"], (None, True, False, "warn", "raise"))
    require_types(cls.__init__, given)  # type: ignore[misc]
    check_plan_arguments(*(given[name] for name in ("alpha", "tokens", "batch_tokens", "roles", "multipliers")))
    if given["seed"] is not None:
        require_integer("seed", given["seed"], 0)


def check_setup(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuses strategies that flatten the parameters, and warns where training may start before the plan is applied.

    Raises:
        ValueError: For FSDP1 and DeepSpeed, and a second MuECallback.
    """
    own = [c for c in trainer.callbacks if any(base.__name__ == "MuECallback" for base in type(c).__mro__)]  # type: ignore[attr-defined]
    if len(own) > 1:
        do = "Remove all but one; on the command line, --mue.KEY VALUE changes the one of the config."
        raise value_error("trainer.callbacks", found=f"{len(own)} MuECallbacks", expected="one", do=do)
    strategy = type(trainer.strategy)
    if _FLATTENING & {base.__name__ for base in strategy.__mro__}:
        raise value_error(
            "strategy",
            found=f"{strategy.__name__}, which flattens and regroups parameters",
            expected="one under which parameters keep their shapes, so that they can be scaled by role",
            do="Use FSDP2 (ModelParallelStrategy, with fully_shard in configure_model) or DDP.",
        )
    if any(type(c).__name__ in ("LearningRateFinder", "BatchSizeFinder") for c in trainer.callbacks):  # type: ignore[attr-defined]
        rank_zero_warn(
            "MuECallback: the tuner callbacks train before the parameterization is applied, so what they find holds for "
            "the unscaled model. Tune on the base model instead."
        )
    if pl_module._compiler_ctx is not None:  # trainer.fit(torch.compile(module)) traces Lightning's own hooks
        rank_zero_warn(
            "MuECallback: the whole LightningModule was given to torch.compile; with torch 2.13 and Lightning 2.6 self.log then "
            "raises in training_step. Call module.compile() in configure_model, or compile its submodules: names, plan and "
            "multipliers are the same."
        )


def refuse_unsupported_parameters(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuses an optimizer that was made before configure_model sharded the parameters: it would train nothing.

    Raises:
        ValueError: If an optimizer holds plain tensors while the module's parameters are sharded.
    """
    own = set(map(id, pl_module.parameters()))
    if not any(is_sharded(p) for p in pl_module.parameters()):
        return
    for optimizer in trainer.optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if held and not any(id(p) in own for p in held):
            raise value_error(
                "optimizer",
                found=f"{type(optimizer).__name__}, which holds none of the module's parameters, because it was made before "
                "configure_model sharded them",
                expected="one that holds the sharded parameters; this one would train nothing",
                do="Make it in configure_optimizers (with LightningCLI: auto_configure_optimizers=False and an "
                "OptimizerCallable argument of the module).",
            )


def is_tuners(path: str | Path | None) -> bool:
    """Whether a tuner wrote this checkpoint to undo its trials: it holds no run to resume."""
    return path is not None and Path(path).name.startswith(_TUNERS_CHECKPOINTS)


def resumes(trainer: Trainer) -> bool:
    """Whether the trainer has restored a run's checkpoint (one without callback states included)."""
    return trainer.ckpt_path is not None and not is_tuners(trainer.ckpt_path)


def refuse_other_plan(saved: ScalingPlan | None, plan: ScalingPlan, own: Mapping[str, float]) -> None:
    """Refuses to go on from the checkpoint of a run with another plan, or with none unless this run's changes nothing.

    ``own`` holds the module's own multipliers: a rule that set fewer of them in an older version left these as they were.

    Raises:
        ValueError: With the differences.
    """
    expected = "one of a run with this plan; going on would change the hyperparameters in the middle"
    if saved is None:
        if not plan.same_size:
            raise value_error(
                "ckpt_path",
                found="a checkpoint that holds no plan, so it was written by a run without MuECallback",
                expected=expected,
                do="Resume without the callback, or start a new run. The checkpoint was not changed.",
            )
        return
    left = {path: value for path, value in own.items() if plan.multipliers.get(path) == value}
    differences = replace(saved, multipliers={**left, **saved.multipliers}).diff(
        plan, init=False
    )  # the initial weights are in the checkpoint already
    if not differences:
        return
    shown = "\n  ".join(differences[:12])
    more = f"\n  and {len(differences) - 12} more" if len(differences) > 12 else ""
    raise value_error(
        "ckpt_path",
        found="a checkpoint of a run with another plan",
        expected=expected,
        do=f"The differences (checkpoint -> now) are:\n  {shown}{more}\nRestore the old rule, base and sizes, or start a "
        f"new run from the weights alone.{_how_to_train_longer(saved, plan)} The checkpoint was not changed.",
    )


def _how_to_train_longer(saved: ScalingPlan, plan: ScalingPlan) -> str:
    old = saved.axes.get("tokens")
    if old is None or old == plan.axes.get("tokens"):
        return ""
    return (
        f" `tokens` counts in the plan, and follows from the Trainer's max_steps unless given: MuECallback(tokens={old:g}, "
        "...) goes on with the old run's scaling."
    )


def warn_at_fit_start(
    trainer: Trainer, pl_module: LightningModule, plan: ScalingPlan, *, last: ScalingPlan | None
) -> None:
    """Warns of kept weights, coupled weight decay, a vanishing epsilon, and callbacks that a balance needs.

    ``last`` is the plan of the module's last fit, if it goes on with the weights of that one.
    """
    if last is not None and not plan.same_size:
        _warn_of_kept_weights(pl_module, last, plan)
    _warn_of_coupled_decay(trainer)
    if not plan.same_size:
        _warn_of_radius(trainer)
    _warn_of_vanishing_eps(trainer, pl_module, plan)
    warn_of_missing_callbacks(trainer, pl_module)


def warn_of_weights(
    trainer: Trainer, pl_module: LightningModule, plan: ScalingPlan, versions: Mapping[str, int], base: Base | None
) -> None:
    """Warns of weights that will be drawn over or kept, where the other may be meant."""
    _warn_of_loaded_weights(trainer, pl_module, plan, versions, base)
    _warn_of_missing_multipliers(pl_module, plan)


def _warn_of_loaded_weights(
    trainer: Trainer, pl_module: LightningModule, plan: ScalingPlan, versions: Mapping[str, int], base: Base | None
) -> None:
    """Warns of weights that will be drawn over although they are not what the module's constructor drew.

    ``versions``: how often each tensor had been written to in ``setup``.
    """
    if plan.same_size or has_weights(pl_module) or not trainer.is_global_zero:
        return
    if names := drawn_over(pl_module, plan, versions, base):
        message = mismatch(
            "initialize",
            found=f"a plan that draws over {len(names)} parameter(s) which were loaded, trained or set by hand after their "
            f"constructor had drawn them: {listed(names)}",
            expected="weights as the constructor draws them",
            do="To keep them, give MuECallback(initialize='changed'), which draws only what differs from the base in shape or "
            "initial std, or a list of regular expressions, which draws only what they match, or False, which draws nothing.",
        )
        rank_zero_warn(f"MuECallback: {message}")


def _warn_of_missing_multipliers(pl_module: LightningModule, plan: ScalingPlan) -> None:
    """Warns of weights that are kept while the plan folds a forward multiplier into them."""
    kept = {} if has_weights(pl_module) else without_multiplier(plan)
    if kept:
        message = mismatch(
            "initialize",
            found=f"{len(kept)} weight(s) to be kept, into which the plan folds a forward multiplier: "
            + listed([f"{name} x {factor:.4g}" for name, factor in kept.items()], limit=8),
            expected="weights that hold it, as those of a run under this plan do",
            do="Others keep their function; the multiplier is then missing in it. If it is to count, multiply them before the fit, "
            "or let initialize draw them.",
        )
        rank_zero_warn(f"MuECallback: {message}")


def _warn_of_kept_weights(pl_module: LightningModule, last: ScalingPlan, plan: ScalingPlan) -> None:
    """Warns where this fit's plan would have drawn other weights than those that the module keeps from its last fit."""
    if {entry.name: entry.init for entry in last.parameters} != {entry.name: entry.init for entry in plan.parameters}:
        rank_zero_warn(
            f"MuECallback: {type(pl_module).__name__} was fitted before under another plan ({last.rule}; now {plan.rule}). Its "
            "weights were kept, so the initial stds in the table of the plan do not hold. Make a new module to draw new weights."
        )


def _warn_of_coupled_decay(trainer: Trainer) -> None:
    """Warns of weight decay that the rules do not mean."""
    for optimizer in trainer.optimizers:
        coupled = type(optimizer) is torch.optim.Adam and not optimizer.defaults.get("decoupled_weight_decay")
        if coupled and any(group["weight_decay"] for group in optimizer.param_groups):
            rank_zero_warn(
                "MuECallback: torch.optim.Adam adds weight decay to the gradient, while the rules scale decoupled decay. "
                "Use AdamW."
            )


def _warn_of_radius(trainer: Trainer) -> None:
    """Warns of the radius of a sharpness-aware wrapper, for which no rule has a factor."""
    for optimizer in trainer.optimizers:
        radii = [group["rho"] for group in optimizer.param_groups if "rho" in group]
        if radii and inner_optimizer(optimizer) is not optimizer:
            rank_zero_warn(
                f"MuECallback: {type(optimizer).__name__}'s rho={radii[0]:g} is not scaled: the rates of the optimizer inside "
                "are, but no rule here has a factor for the radius of the perturbation. Tune rho again at the target's size."
            )


def _warn_of_vanishing_eps(trainer: Trainer, pl_module: LightningModule, plan: ScalingPlan) -> None:
    """Warns of an epsilon that is 0 in float16."""
    half = {n for n, p in pl_module.named_parameters() if p.dtype == torch.float16}
    eps = [group["eps"] for o in trainer.optimizers for group in o.param_groups if "betas" in group and "eps" in group]
    factor = min((entry.eps for entry in plan.parameters if entry.name in half), default=None)
    if factor is not None and eps and min(eps) * factor <= _SMALLEST_HALF / 2:
        rank_zero_warn(
            f"MuECallback: the parameters are in float16 (precision '16-true'), in which Adam's scaled eps, "
            f"{min(eps) * factor:.1e}, is 0, so that a gradient of 0 gives NaN. Use 'bf16-true' or '16-mixed', or an eps of "
            f"at least {_SMALLEST_HALF / factor:.0e}."
        )
