"""MuECallback: applies a parameterization to any LightningModule at fit start."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer

from lightning_mue.callbacks import tensorboard_page
from lightning_mue.callbacks.mue import checks, companions
from lightning_mue.callbacks.mue.announcement import announce, rates_by_role
from lightning_mue.callbacks.mue.run import known_to, refuse_other_sizes, run_sizes
from lightning_mue.callbacks.mue.verifying import verify
from lightning_mue.callbacks.rewinding import rewind_to_step
from lightning_mue.parameterizations import Parameterization, ScaledStep, ScalingPlan, get_rule, plan
from lightning_mue.parameterizations.applying import initial_weights as weights
from lightning_mue.parameterizations.applying.families import family_of
from lightning_mue.parameterizations.applying.loaded import versions
from lightning_mue.parameterizations.reading.base import Base
from lightning_mue.parameterizations.reading.parameters import named_tensors
from lightning_mue.parameterizations.reading.sites import read_multipliers
from lightning_mue.parameterizations.rules.kinds import Family
from lightning_mue.seeds import run_seed

#: Attribute of a module that holds the plan of its last fit.
_LAST_PLAN = "_mue_last_plan"


class MuECallback(Callback):
    """Trains a model of any size with the hyperparameters that were tuned on a smaller base.

    Write the learning rate, weight decay and initialization that are best for the base; the callback scales them to the
    target by a paper's rule: it draws the initial weights, sets the forward multipliers, and swaps scaled parameter groups
    into the optimizers for the duration of each update. The user's own groups, schedulers and checkpoints never see them. At
    base size it changes nothing, bit for bit. Logs ``mue/lr/<role>``, the rate that each role really had.

    Works on one device, with DDP, and with FSDP2 (ModelParallelStrategy); several optimizers (automatic or manual
    optimization) may be of different families. Under DDP it also tells each HyperSphereOptimizer without a ``process_group``
    that the ranks are replicas, so that each rank orthogonalizes a part of the matrices and none is orthogonalized twice. (Not
    where DDP ignores some of the module's parameters, or averages weights instead of gradients.)

    Args:
        rule: ``complete-mue``, ``complete-p``, ``moe-dmft``, ``mssp``, ``hyperp`` (for HyperSphereOptimizer or Muon), ``mup``,
            ``sp``.
        base: The tuned model: keyword overrides of the module's own hyperparameters, e.g. ``{width: 64, n_experts: 0}``, or
            the path of a saved base (from Python also a module or a factory). May hold the base run's ``tokens`` and
            ``batch_tokens``, which then count.
        alpha: Depth exponent in [1/2, 1].
        tokens: Training length of this run in tokens, or ``"N per parameter"`` (see :func:`plan`). Where the base holds its
            own and this is None, it is inferred: optimizer steps times ``batch_tokens``.
        batch_tokens: Batch size of this run in tokens, over all ranks and accumulated batches. Where the base holds its own
            and this is None, it is inferred from the datamodule's (or module's) batch size and sequence length.
        roles: Regular expression on parameter names -> role, for modules that declare none.
        multipliers: Kind of forward multiplier -> regular expression on dotted paths of attributes, for modules that declare
            none.
        preset: Name of the constants that the rule's paper reports, to be used as the tuned base.
        verify: Run base and target for one step on the first batch, near the base's size on the CPU, and compare what a sound plan
            keeps (:func:`lightning_mue.verify_plan`). True or ``"warn"`` warns of deviations, ``"raise"`` raises; None does it
            where a role of the module is inferred, False never.
        seed: Seed of the initial weights; None: that of `seed_everything`, or 0.
        initialize: Which initial weights are drawn, where the plan asks for some. True: all. False: none, to train on from
            loaded weights. ``changed``: those of parameters whose shape or initial std differs from the base's, or that it lacks.
            A list of regular expressions: those of parameters in whose name one of them is found (``[head, "adapter.*down"]``);
            all others stay as they are. Values that the constructor did not draw (loaded in ``__init__``, computed) are kept in
            any case, and a warning names what would be drawn over although it was loaded or trained afterwards.
        verbose: Print the plan at fit start.

    Raises:
        ValueError: Before step 0: for a base that does not fit the module, an optimizer or role that the rule does not cover, a
            strategy that flattens parameters (FSDP1, DeepSpeed), or a checkpoint of a run with another plan or none.
    """

    def __init__(
        self,
        rule: str = "complete-mue",
        base: dict[str, Any] | nn.Module | Callable[[], nn.Module] | str | Path | None = None,
        alpha: float = 1.0,
        tokens: float | str | None = None,
        batch_tokens: float | None = None,
        roles: dict[str, str] | None = None,
        seed: int | None = None,
        initialize: bool | Literal["changed"] | list[str] = True,
        verbose: bool = True,
        multipliers: dict[str, str] | None = None,
        preset: str | None = None,
        verify: bool | Literal["warn", "raise"] | None = None,
    ) -> None:
        self.rule: Parameterization = get_rule(rule)
        checks.check_arguments(MuECallback, {**locals(), "rule": ""})
        self.base: Base | None = base
        self.alpha, self.tokens, self.batch_tokens = alpha, tokens, batch_tokens
        self.roles, self.multipliers, self.preset = roles, multipliers, preset
        self.seed, self.initialize, self.verbose = seed, initialize, verbose
        self.verify, self._to_verify = verify, False
        self._own_multipliers: dict[str, float] = {}
        #: The plan in force, from fit start on.
        self.plan: ScalingPlan | None = None
        self._steps: list[ScaledStep] = []
        self._resumed = False
        self._versions: dict[str, int] = {}
        self._saved_plan: ScalingPlan | None = None
        #: Sizes of the resumed run, until its data is loaded.
        self._kept: dict[str, float] = {}
        self._module: weakref.ref[nn.Module] | None = None
        self._logged = 0

    def make_plan(
        self,
        module: nn.Module,
        optimizers: list[Optimizer],
        trainer: Trainer | None = None,
        datamodule: LightningDataModule | None = None,
        *,
        trains: bool = True,
    ) -> ScalingPlan:
        """The plan for a module and its optimizers; nothing is changed.

        Args:
            module: The module, which may be on ``meta``.
            optimizers: Its optimizers. Only their families count, and which parameters they hold if families differ.
            trainer: The trainer, from which run sizes that the base holds and the callback does not are inferred. It need not
                be set up.
            datamodule: The datamodule, for the same purpose; by default the trainer's.
            trains: False where no training follows: unknown run sizes are then the base's.

        Raises:
            ValueError: See the class.
        """
        made = plan(
            module,
            base=self.base,
            rule=self.rule,
            family=self._families(module, optimizers),
            alpha=self.alpha,
            roles=self.roles,
            multipliers=self.multipliers,
            preset=self.preset,
            **self._run_sizes(module, trainer, datamodule, trains=trains, optimizers=len(optimizers)),
        )
        return weights.choose_draws(made, self.initialize)

    def _run_sizes(self, module: nn.Module, trainer: Trainer | None, datamodule: Any = None, **options: Any) -> Any:
        preset = self.rule.presets.get(self.preset) if self.preset is not None else None
        known = known_to(self.base if self.base or preset is None else preset.base)
        given = {"tokens": self.tokens, "batch_tokens": self.batch_tokens}
        given = {key: self._kept.get(key) if value is None and key in known else value for key, value in given.items()}
        return run_sizes(known, given, trainer, module, datamodule or getattr(trainer, "datamodule", None), **options)

    def _families(self, module: nn.Module, optimizers: list[Optimizer]) -> Family | dict[str, Family]:
        """The optimizers' family; parameter name -> family if they are of several."""
        families = [family_of(optimizer) for optimizer in optimizers] or [next(iter(self.rule.tables))]
        if len(set(families)) == 1:
            return families[0]
        held = {
            id(p): family
            for optimizer, family in zip(optimizers, families, strict=True)
            for group in optimizer.param_groups
            for p in group["params"]
        }
        # What no optimizer holds is not trained, but has a row in the plan.
        return {name: held.get(id(p), families[0]) for name, p in named_tensors(module).items()}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses strategies that flatten the parameters, and warns where training may start before the plan is applied."""
        self._resumed, self._saved_plan, self._kept = False, None, {}
        # Before a strategy copies weights between ranks, or a tuner restores them.
        self._versions = versions(pl_module)
        checks.check_setup(trainer, pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the plan out of a checkpoint, and refuses another one where fit has begun already (FSDP2)."""
        if checks.is_tuners(trainer.ckpt_path):
            return
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        self._saved_plan = ScalingPlan.from_dict(state["plan"]) if "plan" in state else None
        self._resumed = True
        if trainer.state.fn == TrainerFn.FITTING and trainer.strategy.restore_checkpoint_after_setup:
            assert self.plan is not None
            checks.refuse_other_plan(self._saved_plan, self.plan, self._own_multipliers)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Applies the plan: multipliers always; initial weights once; scaled steps for this fit."""
        self._detach()
        checks.refuse_unsupported_parameters(trainer, pl_module)
        has_checkpoint = checks.resumes(trainer)
        self._kept = dict(self._saved_plan.axes) if has_checkpoint and self._saved_plan is not None else {}
        self.plan = plan = self.make_plan(pl_module, trainer.optimizers, trainer)
        self._own_multipliers = read_multipliers(pl_module)
        self._module = weakref.ref(pl_module)
        # A strategy that restores after setup has not read the checkpoint yet; it will overwrite what is drawn here.
        late = trainer.strategy.restore_checkpoint_after_setup
        resumed = not late and (self._resumed or has_checkpoint)
        if resumed:
            checks.refuse_other_plan(self._saved_plan, plan, self._own_multipliers)
        starts = bool(self.initialize) and not (resumed or has_checkpoint)
        last = getattr(pl_module, _LAST_PLAN, None) if starts else None
        checks.warn_at_fit_start(trainer, pl_module, plan, last=last)
        if starts:
            checks.warn_of_weights(trainer, pl_module, plan, self._versions, self.base)
        copies = companions.copies_in_optimizers(trainer)
        # Restored, loaded, or trained before: the weights stay.
        drawn = weights.apply_plan(
            pl_module, plan, seed=run_seed(self.seed), draw=bool(self.initialize) and not resumed
        )
        setattr(pl_module, _LAST_PLAN, plan)
        if drawn:
            companions.copy_to_averages(trainer, pl_module)
            companions.copy_to_optimizers(copies)
        companions.tell_optimizers(trainer, pl_module)
        if not plan.same_size:
            self._steps, self._logged = [ScaledStep(each, plan, pl_module) for each in trainer.optimizers], 0
            tensorboard_page.register(trainer, "Training", {"Effective learning rate by role": ["mue/lr/.*"]})
        self._to_verify = not (plan.same_size or has_checkpoint)
        announce(trainer, plan, drawn=drawn, verbose=self.verbose)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Holds the sizes of the run against its data."""
        early = bool(self._kept) or trainer.strategy.restore_checkpoint_after_setup
        if early and self.plan is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._kept = {}
            sizes = self._run_sizes(pl_module, trainer, optimizers=len(trainer.optimizers))
            refuse_other_sizes(self.plan, sizes, self._saved_plan)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Verifies the plan on the first batch of a run."""
        if self._to_verify:
            self._to_verify = False
            names = ("base", "rule", "alpha", "roles", "multipliers")
            verify(self.verify, trainer, pl_module, batch, **{name: getattr(self, name) for name in names})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the learning rate that each role really had, on log steps."""
        self._restore()
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not (self._steps and every and trainer.loggers):
            return
        # Manual optimization may step several optimizers a batch, and global_step counts each of them.
        done = trainer.global_step // len(self._steps)
        if done // every > self._logged // every:
            self._logged = done
            rates = self.effective_rates()
            for logger in trainer.loggers:
                logger.log_metrics(rates, step=done - 1)
            tensorboard_page.write(trainer, rates)

    def effective_rates(self) -> dict[str, float]:
        """``mue/lr/<role>`` -> learning rate of the last step.

        A role with several rates has one tag each: ``<role>/<kind>``, ``<role>/group1``, ``<role>/x0.25`` (factor of the plan),
        and ``<role>/AdamW-1`` where several optimizers hold it.
        """
        return rates_by_role(self._steps)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the optimizers their own groups back, so that what is saved now stays readable."""
        self._restore()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Saved optimizer states hold the user's own groups, and counts those of the last step."""
        self._restore()
        rewind_to_step(trainer, checkpoint)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detaches from the optimizers; the module keeps its weights and multipliers."""
        self._detach()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the multipliers where no fit has."""
        if self._module is not None and self._module() is pl_module:
            return
        # The weights of a checkpoint need the multipliers that they were trained with. Where there is none: multipliers do not
        # depend on the optimizer's family, so any that the rule has a table for serves.
        self.plan = self._saved_plan or self.make_plan(pl_module, [], trainer, trains=False)
        self._module = weakref.ref(pl_module)
        weights.set_multipliers(pl_module, self.plan.multipliers)

    on_test_start = on_predict_start = on_validation_start

    def state_dict(self) -> dict[str, Any]:
        """The plan, as plain types: a resumed run must have the same one."""
        return {} if self.plan is None else {"plan": self.plan.to_dict()}

    def _restore(self) -> None:
        for step in self._steps:
            step.restore()

    def _detach(self) -> None:
        for step in self._steps:
            step.remove()
        self._steps = []
