"""``verify_plan``: runs base and target near the base's size, and tests that the plan keeps what a sound plan keeps."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_mue.checks import require_integer, require_types, type_error, value_error
from lightning_mue.namespaces import is_lightning
from lightning_mue.parameterizations.applying.families import family_of
from lightning_mue.parameterizations.applying.initial_weights import initialize
from lightning_mue.parameterizations.applying.scaled_step import ScaledStep
from lightning_mue.parameterizations.planning.plan import check_plan_arguments, plan
from lightning_mue.parameterizations.planning.scaling_plan import ScalingPlan
from lightning_mue.parameterizations.reading.base import RUN_KEYS, Base
from lightning_mue.parameterizations.rules.axes import Axes
from lightning_mue.parameterizations.rules.kinds import Family
from lightning_mue.parameterizations.rules.table import Parameterization, get_rule
from lightning_mue.parameterizations.verifying.comparing import compare
from lightning_mue.parameterizations.verifying.deviation import Deviation
from lightning_mue.parameterizations.verifying.measuring import Measurements, measure
from lightning_mue.parameterizations.verifying.running import Loss, same_draws
from lightning_mue.parameterizations.verifying.sizes import small_batches, two_models

#: A step is this part of the tuned learning rate, so that what it changes is in proportion to it.
_RATE = 0.1


@dataclass(frozen=True)
class Verification:
    """The outcome of a verification.

    Attributes:
        deviations: What a sound plan would have kept and this one does not, the worst first.
        sizes: Overrides with which the target was built; empty if it was run as it is.
        compared: How many values were compared.
        seconds: How long it took.
    """

    deviations: tuple[Deviation, ...]
    sizes: dict[str, Any]
    compared: int
    seconds: float

    @property
    def passed(self) -> bool:
        """True if there are no deviations."""
        return not self.deviations

    def __str__(self) -> str:
        at = f" at {self.sizes}" if self.sizes else ""
        if self.passed:
            return f"verified{at}: {self.compared} values are as the rule has them ({self.seconds:.0f} s)"
        shown = "\n".join(f"  {deviation}" for deviation in self.deviations[:6])
        more = f"\n  and {len(self.deviations) - 6} more" if len(self.deviations) > 6 else ""
        return (
            f"verify: {len(self.deviations)} of {self.compared} values{at} are not as the rule has them:\n{shown}{more}"
        )


def verify_plan(
    model: nn.Module,
    batch: Any,
    *,
    base: Base,
    rule: str | Parameterization = "complete-mue",
    loss: Loss | None = None,
    optimizer: Callable[[nn.Module], Any] | None = None,
    alpha: float = 1.0,
    roles: Mapping[str, str] | None = None,
    multipliers: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Verification:
    """Runs base and target on the CPU, one step each, and compares what every group of parameters does.

    The target is built near the base, each size that differs up to four times the base's. Compared are, layer by layer and relative
    to the residual stream, what each group of parameters adds at initialization and what one optimizer step of it changes; outside
    the layers, the same for the input of the first layer and for the output; and the change of attention logits. Not seen are
    errors of an initial std or a rate below a factor of about 1.7, weights that change the stream by less than a millionth in one
    step (``A_log``), routers (tokens change their experts by jumps), and factors on weight decay and betas. Powers of the
    depth are evaluated at the number of layers that really ran, so a misread depth shows. Nothing of the model is changed.

    Args:
        model: The target, which may be on ``meta`` where the base is given as overrides.
        batch: A batch as the loss takes it; two samples of it are used.
        base: As for :func:`lightning_mue.plan`, except for a file, which holds no module to run.
        rule: As for :func:`lightning_mue.plan`, like alpha, roles and multipliers.
        loss: (model, batch) -> loss; None takes the module's ``training_step``.
        optimizer: Model -> optimizer or what ``configure_optimizers`` may return; None takes the module's
            ``configure_optimizers``, or AdamW where it has none.
        alpha: See rule.
        roles: See rule.
        multipliers: See rule.
        seed: Seed of initial weights, noise and masks.

    Raises:
        ValueError: If the models cannot be built or run, or the plan cannot be made.
    """
    rule = get_rule(rule)
    require_types(verify_plan, {**locals(), "rule": "", "base": {}})
    check_plan_arguments(alpha, None, None, roles, multipliers)
    require_integer("seed", seed, 0)
    began = time.perf_counter()
    run = _Run(rule, loss, optimizer or own_optimizers, alpha, seed)
    with torch.compiler.set_stance("force_eager"):  # few passes, which are not worth compiling for
        make_base, make_target, sizes = two_models(model, base)
        theirs = run.prepare(_with_factory(make_base(), model), None)
        mine = run.prepare(_with_factory(make_target(), model), _without_run(base), roles, multipliers)
        small = run.fitting(theirs, mine, batch)
        old, new = run.measure(theirs, small), run.measure(mine, small)
    groups = [group for optimizer in theirs.optimizers for group in optimizer.param_groups]
    eps = max((float(group["eps"]) for group in groups if isinstance(group.get("eps"), float)), default=0.0)
    found = compare(run.resolved(mine.plan), mine.plan, old, new, eps)
    return Verification(tuple(found), sizes, len(new.values), time.perf_counter() - began)


def _with_factory(made: nn.Module, model: nn.Module) -> nn.Module:
    """Hands on the attribute ``optimizer`` of a module (an OptimizerCallable), which need not be among its hyperparameters."""
    factory = getattr(model, "optimizer", None)
    if callable(factory) and not isinstance(factory, Optimizer):
        made.optimizer = factory
    return made


def _without_run(base: Base) -> Base:
    """The run's length and batch change nothing within one step."""
    return {key: value for key, value in base.items() if key not in RUN_KEYS} if isinstance(base, Mapping) else base


@dataclass
class _Prepared:
    """A model with its plan applied, and its optimizers with the plan's factors."""

    model: nn.Module
    plan: ScalingPlan
    optimizers: list[Optimizer]
    scaled: list[ScaledStep]


@dataclass
class _Run:
    rule: Parameterization
    loss: Loss | None
    optimizer: Callable[[nn.Module], Any]
    alpha: float
    seed: int

    def prepare(
        self,
        model: nn.Module,
        base: Base | None,
        roles: Mapping[str, str] | None = None,
        multipliers: Mapping[str, str] | None = None,
    ) -> _Prepared:
        """Applies the plan to a model; without a base the model is the base itself, and nothing is changed."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the fit itself gives them
            optimizers = flatten_optimizers(self.optimizer(model))
            families: set[Family] = {family_of(optimizer) for optimizer in optimizers}
            if len(families) != 1:
                raise value_error("verify", found=f"optimizers of {len(families)} families", expected="one family")
            arguments: dict[str, Any] = {"rule": self.rule, "family": families.pop(), "alpha": self.alpha}
            made = plan(model, base=base, roles=roles, multipliers=multipliers, **arguments)
            if not made.same_size:
                initialize(model, made, seed=self.seed)
            scaled = [] if made.same_size else [ScaledStep(optimizer, made, model) for optimizer in optimizers]
        return _Prepared(model, made, optimizers, scaled)

    def fitting(self, theirs: _Prepared, mine: _Prepared, batch: Any) -> Any:
        """The smallest part of a batch that both models take."""
        dtype = next((p.dtype for p in mine.model.parameters() if p.is_floating_point()), torch.float32)
        losses = [self._loss(one.model) for one in (theirs, mine)]
        failure: Exception | None = None
        for small in small_batches(batch, dtype):
            try:
                for one, loss in zip((theirs, mine), losses, strict=True):
                    with warnings.catch_warnings(), same_draws(self.seed):
                        warnings.simplefilter("ignore")
                        loss(one.model, small)
            except Exception as error:  # the models' own code, on a batch that was cut
                failure = error
                continue
            return small
        raise value_error(
            "verify",
            found=f"a {type(mine.model).__name__} that cannot run one step on the CPU outside its Trainer ({failure!r})",
            expected="a loss that can be computed from the module and a batch alone",
            do="Give verify_plan a loss=lambda model, batch: ..., or switch it off: verify=False.",
        ) from failure

    def measure(self, prepared: _Prepared, batch: Any) -> Measurements:
        """Measures a model over one small step."""
        for optimizer in prepared.optimizers:
            _small_step(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = lambda model: _step(prepared.optimizers)  # noqa: E731
            return measure(prepared.model, self._loss(prepared.model), batch, step, seed=self.seed)

    def _loss(self, model: nn.Module) -> Loss:
        if self.loss is not None:
            return self.loss
        if not callable(getattr(model, "training_step", None)):
            found = f"none, for a {type(model).__name__} without a training_step"
            raise type_error("loss", found=found, expected="loss=lambda model, batch: ...")
        if getattr(model, "automatic_optimization", True) is False:
            found = f"a {type(model).__name__} that optimizes manually in its training_step"
            raise value_error(
                "verify", found=found, expected="a loss", do="Give verify_plan loss=lambda model, batch: ... ."
            )
        for child in model.modules():
            if is_lightning(child, "LightningModule"):  # its passes here are not those of a run
                for name in ("log", "log_dict", "print"):
                    object.__setattr__(child, name, lambda *args, **kwargs: None)
        return lambda module, batch: module.training_step(batch, 0)

    def resolved(self, made: ScalingPlan) -> Parameterization:
        """The rule that was applied, for one that is several."""
        if self.rule.resolve is None:
            return self.rule
        return self.rule.resolve(Axes(**made.axes), Axes(**made.base_axes))[0]


def own_optimizers(model: nn.Module) -> Any:
    """What a module's ``configure_optimizers`` returns; AdamW where it has none."""
    configure = getattr(model, "configure_optimizers", None)
    made = configure() if callable(configure) else None
    # LightningCLI gives the target's instance alone a configure_optimizers.
    return made if flatten_optimizers(made) else torch.optim.AdamW(model.parameters(), lr=1e-3)


def _small_step(optimizer: Optimizer) -> None:
    """A small part of the tuned rate (a warm-up's first rate may be 0), and no weight decay."""
    for group in optimizer.param_groups:
        rate = float(group.get("initial_lr", group["lr"])) or 1e-3
        group["lr"] = rate * _RATE
        for key in {"weight_decay", "adamw_weight_decay"} & group.keys():
            group[key] = 0.0


def _step(optimizers: list[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()


def flatten_optimizers(configured: Any) -> list[Optimizer]:
    """The optimizers in the return value of ``configure_optimizers``, in any of its forms, without the schedulers."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return flatten_optimizers(configured["optimizer"])
    if isinstance(configured, (list, tuple)):
        return [optimizer for item in configured for optimizer in flatten_optimizers(item)]
    return []
