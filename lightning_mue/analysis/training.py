"""Trains a few steps under a rule, with a probe that measures at initialization and after some of the steps."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mue.analysis.recording import Recorder
from lightning_mue.analysis.slopes import Record
from lightning_mue.checks import listed, type_error, value_error
from lightning_mue.namespaces import is_lightning, namespace_of
from lightning_mue.parameterizations import ScalingPlan, plan
from lightning_mue.parameterizations.applying.families import family_of
from lightning_mue.parameterizations.verifying.verify import flatten_optimizers

Loss = Callable[[Any, Any], Tensor]
OptimizerFactory = Callable[[list[tuple[str, nn.Parameter]]], Optimizer]


class ShortTraining:
    """Trains models of several sizes with the same settings, and collects what the probes measure.

    A Lightning Trainer runs each training, so a module's own ``training_step``, hooks and callbacks work as in ``fit``. The
    arguments are those of `coordinate_check`, which gathers those of the plan in ``plan_arguments``.

    Attributes:
        records: All measurements so far.
        unseen: Parameters that the probe batch did not reach.
        notes: The plans' notes.
        family: The optimizer's family, once a training has run.
    """

    def __init__(
        self,
        plan_arguments: Mapping[str, Any],
        loss: Loss | None,
        optimizer: OptimizerFactory | None,
        lr: float | None,
        lr_factor: float,
        measured: tuple[int, ...],
        trainer_options: Mapping[str, Any],
    ) -> None:
        self.plan_arguments = plan_arguments
        self.loss, self.optimizer, self.lr, self.lr_factor = loss, optimizer, lr, lr_factor
        self.measured, self.trainer_options = measured, trainer_options
        self.records: list[Record] = []
        self.unseen: dict[str, None] = {}
        self.notes: dict[str, None] = {}
        self.family = ""

    def run(self, make: Callable[[], nn.Module], batches: Sequence[Any], *, x: float, seed: int) -> None:
        """Trains one model on ``batches``, one step each."""
        with torch.random.fork_rng(), _quiet():
            torch.manual_seed(seed)
            module = make()
            lightning_module = self._prepare(module)
            recorder = Recorder(module, partial(self.plan, module), self.measured, x=x, seed=seed)
            trainer = namespace_of(lightning_module).Trainer(
                **{
                    "accelerator": "cpu",
                    "devices": 1,
                    "logger": False,
                    "enable_checkpointing": False,
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                    "max_epochs": 1,
                    "limit_train_batches": len(batches),
                    "limit_val_batches": 0,
                    **self.trainer_options,
                    "callbacks": [recorder],
                }
            )
            trainer.fit(lightning_module, train_dataloaders=_Batches(batches))
        self.records += recorder.records
        self.unseen.update(dict.fromkeys(recorder.unseen))

    def plan(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> ScalingPlan:
        """Makes the plan for a module, and stores its notes and family."""
        families = {family_of(optimizer) for optimizer in optimizers}
        if len(families) != 1:
            found = f"the families {listed(sorted(families))}"
            raise value_error("optimizer", found=found, expected="one optimizer family")
        family = families.pop()
        self.family = family
        made = plan(module, family=family, **self.plan_arguments)
        self.notes.update(dict.fromkeys(made.notes))
        return made

    def _prepare(self, module: nn.Module) -> LightningModule:
        """Returns a LightningModule that trains ``module`` with the given loss and a constant rate, and logs nothing."""
        if not is_lightning(module, "LightningModule"):
            if self.loss is None:
                raise type_error(
                    "loss",
                    found=f"none, for a {type(module).__name__}, which is not a LightningModule",
                    expected="a loss, because the module has no training_step",
                    do="Give loss=lambda model, batch: ... .",
                )
            trained: LightningModule = _Wrapped(module)
        else:
            trained = module  # type: ignore[assignment]
        own, callbacks = trained.configure_optimizers, trained.configure_callbacks
        changed: dict[str, Any] = {
            "log": _nothing,
            "log_dict": _nothing,
            "configure_optimizers": lambda: self._optimizers(module, own),
            "configure_callbacks": lambda: _without_mue(callbacks()),
        }
        if self.loss is not None:
            loss = self.loss
            changed["training_step"] = lambda batch, batch_idx: loss(module, batch)
            trained.automatic_optimization = True
        for name, value in changed.items():
            object.__setattr__(trained, name, value)
        return trained

    def _optimizers(self, module: nn.Module, own: Callable[[], Any]) -> Any:
        named = list(module.named_parameters())
        made = flatten_optimizers(own()) if self.optimizer is None else [self.optimizer(named)]
        if not made:
            raise value_error(
                "optimizer",
                found=f"none returned by {type(module).__name__}.configure_optimizers",
                expected="at least one",
                do="Give `optimizer`.",
            )
        groups = [group for optimizer in made for group in optimizer.param_groups]
        # A scheduler changes the rate in its constructor (a warm-up starts at 0); this is undone.
        rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
        factor = self.lr_factor if self.lr is None else self.lr_factor * self.lr / rates[0]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * factor
        return made if len(made) > 1 else made[0]


class _Batches:
    """A loader of given batches; the Trainer would take a plain list for several loaders."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class _Wrapped(LightningModule):
    """Wraps a plain module for the Trainer; its optimizer is the default of a coordinate check."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise NotImplementedError  # replaced

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.module.parameters(), lr=1e-2, weight_decay=0.0)


def _without_mue(callbacks: Any) -> list[Callback]:
    """A module's own callbacks except for a MuECallback, found by its name, which would scale a second time."""
    own = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
    return [callback for callback in own if type(callback).__name__ != "MuECallback"]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Replaces ``self.log``: calls of the probe must not be logged."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the Trainer's messages on hardware, workers and epochs, which each of many short runs would repeat."""
    levels = {
        logging.getLogger(name): logging.getLogger(name).level for name in ("lightning.pytorch", "pytorch_lightning")
    }
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning|pytorch_lightning")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
