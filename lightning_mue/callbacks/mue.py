"""MuECallback: applies a parameterization to any LightningModule at fit start."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_mue.callbacks import layout
from lightning_mue.parameterizations import Parameterization, ScaledStep, ScalingPlan, get_rule, initialize, plan
from lightning_mue.parameterizations.apply import family_of, has_weights, keep_weights
from lightning_mue.parameterizations.base import Base
from lightning_mue.parameterizations.multipliers import set_multipliers
from lightning_mue.parameterizations.render import as_markdown, headline, wide_console

_log = logging.getLogger(__name__)


class MuECallback(Callback):
    """Trains a model of any size with the hyperparameters that were tuned on a smaller base.

    Write the learning rate, weight decay and initialization that are best for the base; the callback scales them to the
    target by a paper's rule: it draws the initial weights, sets the forward multipliers, and swaps scaled parameter groups
    into the optimizer for the duration of each step. The user's own groups, schedulers and checkpoints never see them. At
    base size it changes nothing, bit for bit.

    Args:
        rule: ``complete-mue``, ``hyperp`` (for HyperSphereOptimizer), ``complete-p``, ``mup``, ``sp``.
        base: The tuned model: keyword overrides of the module's own hyperparameters, e.g. ``{width: 64, n_experts: 0}``
            (from Python also a module or a factory). May hold the base run's ``tokens`` and ``batch_tokens``.
        alpha: Depth exponent in [1/2, 1].
        tokens: Training length of this run in tokens, if it is to count; needs ``base: {tokens: ...}``.
        batch_tokens: Batch size of this run in tokens, if it is to count; needs ``base: {batch_tokens: ...}``.
        roles: Regular expression on parameter names -> role, for modules that declare none.
        seed: Seed of the initial weights.
        initialize: Draw the initial weights. Set it to False to train on from weights loaded by hand (`load_state_dict`, or
            `load_from_checkpoint` of a module other than this package's).
        verbose: Print the plan at fit start.

    Raises:
        ValueError: At fit start, before step 0: for a base that does not fit the module, an optimizer or role that the rule
            does not cover, or a checkpoint of a run with another plan.
    """

    def __init__(
        self,
        rule: str = "complete-mue",
        base: dict[str, Any] | nn.Module | Callable[[], nn.Module] | None = None,
        alpha: float = 1.0,
        tokens: float | None = None,
        batch_tokens: float | None = None,
        roles: dict[str, str] | None = None,
        seed: int = 0,
        initialize: bool = True,
        verbose: bool = True,
    ) -> None:
        self.rule: Parameterization = get_rule(rule)
        self.base: Base | None = base
        self.alpha, self.tokens, self.batch_tokens = alpha, tokens, batch_tokens
        self.roles, self.seed, self.initialize, self.verbose = roles, seed, initialize, verbose
        #: The plan in force, from fit start on.
        self.plan: ScalingPlan | None = None
        self._steps: list[ScaledStep] = []
        self._saved_plan: ScalingPlan | None = None
        self._module: weakref.ref[nn.Module] | None = None

    def make_plan(self, module: nn.Module, optimizers: list[Optimizer]) -> ScalingPlan:
        """The plan for a module (which may be on ``meta``) and its optimizers, which must be of one family."""
        families = {family_of(optimizer) for optimizer in optimizers} or {next(iter(self.rule.tables))}
        if len(families) > 1:
            raise ValueError(
                f"optimizer: found optimizers of several families ({', '.join(sorted(families))}); a plan covers one. Use "
                "optimizers of one family."
            )
        return plan(
            module,
            base=self.base,
            rule=self.rule,
            family=families.pop(),
            alpha=self.alpha,
            tokens=self.tokens,
            batch_tokens=self.batch_tokens,
            roles=self.roles,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warns where training may start before the plan is applied."""
        if any(type(c).__name__ in ("LearningRateFinder", "BatchSizeFinder") for c in trainer.callbacks):  # type: ignore[attr-defined]
            rank_zero_warn(
                "MuECallback: the tuner callbacks train before the parameterization is applied, so what they find holds for "
                "the unscaled model. Tune on the base model instead."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Applies the plan: multipliers always; initial weights once; scaled steps for this fit."""
        self._detach()
        self.plan, self._module = self.make_plan(pl_module, trainer.optimizers), weakref.ref(pl_module)
        self._refuse_other_plan(resumed=trainer.ckpt_path is not None)
        self._warn_of_coupled_decay(trainer)
        drawn = self.initialize and trainer.ckpt_path is None and not has_weights(pl_module)
        if drawn:
            initialize(pl_module, self.plan, seed=self.seed)
        else:  # restored, loaded, or trained before: the weights stay
            set_multipliers(pl_module, self.plan.multipliers)
        keep_weights(pl_module)
        if not self.plan.same_size:
            self._steps = [ScaledStep(optimizer, self.plan, pl_module) for optimizer in trainer.optimizers]
            layout.register(trainer, "Training", {"Effective learning rate by role": ["mue/lr/.*"]})
        self._announce(trainer, drawn)

    def _refuse_other_plan(self, resumed: bool) -> None:
        assert self.plan is not None
        saved, self._saved_plan = self._saved_plan, None
        if resumed and saved is None and not self.plan.same_size:
            raise ValueError(
                "MuECallback: the checkpoint holds no plan, so it was written by a run without this callback, and going on with "
                "it would change the hyperparameters in the middle. Resume without the callback, or start a new run. The "
                "checkpoint was not changed."
            )
        # The initial weights are in the checkpoint already.
        differences = saved.diff(self.plan, init=False) if resumed and saved is not None else []
        if differences:
            shown = "\n  ".join(differences[:12])
            more = f"\n  and {len(differences) - 12} more" if len(differences) > 12 else ""
            raise ValueError(
                "MuECallback: the checkpoint was written by a run with another plan, so going on would change the "
                f"hyperparameters in the middle (checkpoint -> now):\n  {shown}{more}\nRestore the old rule, base and sizes, or "
                "start a new run from the weights alone. The checkpoint was not changed."
            )

    def _warn_of_coupled_decay(self, trainer: Trainer) -> None:
        for optimizer in trainer.optimizers:
            coupled = type(optimizer) is torch.optim.Adam and not optimizer.defaults.get("decoupled_weight_decay")
            if coupled and any(group["weight_decay"] for group in optimizer.param_groups):
                rank_zero_warn(
                    "MuECallback: torch.optim.Adam adds weight decay to the gradient, while the rules scale decoupled decay. "
                    "Use AdamW."
                )

    def _announce(self, trainer: Trainer, drawn: bool) -> None:
        assert self.plan is not None
        if not trainer.is_global_zero:
            return
        if not self.plan.same_size:
            _log.info("MuECallback: initial weights %s", "drawn by the plan" if drawn else "kept as they are")
        if not self.verbose:
            _log.info("MuECallback: %s", headline(self.plan))
        else:
            wide_console().print(self.plan)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("parameterization", as_markdown(self.plan), 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the TensorBoard page, unless another callback has."""
        layout.write(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the learning rate that each role really had, on log steps."""
        self._restore()
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._steps and every and trainer.global_step % every == 0:
            for step in self._steps:
                pl_module.log_dict({f"mue/lr/{role}": lr for role, lr in step.effective_lr.items()})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the optimizers their own groups back, so that what is saved now stays readable."""
        self._restore()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saved optimizer states hold the user's own groups."""
        self._restore()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detaches from the optimizers; the module keeps its weights and multipliers."""
        self._detach()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the multipliers where no fit has."""
        self._set_multipliers(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the multipliers where no fit has."""
        self._set_multipliers(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the multipliers where no fit has."""
        self._set_multipliers(trainer, pl_module)

    def _set_multipliers(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._module is not None and self._module() is pl_module:
            return
        # The weights of a checkpoint need the multipliers that they were trained with.
        saved, self._saved_plan = self._saved_plan, None
        # Multipliers do not depend on the optimizer's family, so any that the rule has a table for serves.
        self.plan, self._module = saved or self.make_plan(pl_module, []), weakref.ref(pl_module)
        set_multipliers(pl_module, self.plan.multipliers)

    def state_dict(self) -> dict[str, Any]:
        """The plan, as plain types: a resumed run must have the same one."""
        return {} if self.plan is None else {"plan": self.plan.to_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keeps the saved plan until fit start, where it is compared with the new one."""
        self._saved_plan = ScalingPlan.from_dict(state_dict["plan"]) if "plan" in state_dict else None

    def _restore(self) -> None:
        for step in self._steps:
            step.restore()

    def _detach(self) -> None:
        for step in self._steps:
            step.remove()
        self._steps = []


__all__ = ["MuECallback"]
