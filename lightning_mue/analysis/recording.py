"""The callback of a coordinate check: applies the plan to a model, and measures what each training step has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mue.analysis.probe import ModuleProbe
from lightning_mue.analysis.slopes import Record
from lightning_mue.checks import value_error
from lightning_mue.parameterizations import ScaledStep, ScalingPlan, initialize
from lightning_mue.parameterizations.applying.drawing import draw_
from lightning_mue.parameterizations.reading.initial.initializer import measure_init
from lightning_mue.parameterizations.reading.parameters import named_tensors


class Recorder(Callback):
    """Applies the plan at fit start, as MuECallback does, and measures after the requested steps.

    The module is the LightningModule of the fit or a part of it; the seed is that of the initial weights and of each run of
    the probe batch. ``records`` then holds the measurements and the loss of every step, ``unseen`` the parameters that the
    probe batch did not reach.
    """

    def __init__(
        self,
        module: nn.Module,
        make_plan: Callable[[Sequence[Optimizer]], ScalingPlan],
        measured: tuple[int, ...],
        *,
        x: float,
        seed: int,
    ) -> None:
        self.module, self.make_plan, self.measured, self.x, self.seed = module, make_plan, measured, x, seed
        self.records: list[Record] = []
        self.unseen: list[str] = []
        self.steps: list[ScaledStep] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the plan, draws the weights, and scales the optimizers."""
        self.made = self.make_plan(trainer.optimizers)
        if self.made.same_size:
            _draw_anew(self.module, self.made, self.seed)
        else:
            initialize(self.module, self.made, seed=self.seed)
            self.steps = [ScaledStep(optimizer, self.made, self.module) for optimizer in trainer.optimizers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Takes the first batch as the probe batch."""
        if batch_idx == 0:  # the batch as the training step gets it: on the device, after all transfer hooks
            kept = copy.deepcopy(batch)
            roles = {entry.name: entry.role for entry in self.made.parameters}
            self.probe = ModuleProbe(self.module, lambda: _run(pl_module, kept, self.seed), roles)
            self.unseen = self.probe.unseen

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the loss, and after the requested steps the probe's measurements."""
        for step in self.steps:
            step.restore()
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._record(batch_idx + 1, "", "", "loss", float(loss))
        if batch_idx + 1 in self.measured:
            for m in self.probe.measure():
                self._record(batch_idx + 1, m.name, m.role, m.quantity, m.rms)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the scaling from the optimizers."""
        for step in self.steps:
            step.remove()

    def _record(self, step: int, name: str, role: str, quantity: str, rms: float) -> None:
        bases = {entry.name: entry.base for entry in self.made.parameters} if quantity == "update" else {}
        self.records.append(Record(self.x, self.seed, step, name, role, quantity, rms, bases.get(name)))


@torch.no_grad()
def _draw_anew(module: nn.Module, made: ScalingPlan, seed: int) -> None:
    """Draws the weights of a model of the base's size with the seed; :func:`initialize` draws the other sizes only.

    Otherwise this size could have the same weights under every seed.
    """
    tensors = named_tensors(module)
    for entry in made.parameters:
        if tensors[entry.name].requires_grad:
            draw_(tensors[entry.name], replace(entry, init=measure_init(tensors[entry.name])), seed)


def _run(module: LightningModule, batch: Any, seed: int) -> None:
    """Runs one forward pass with the training step, and the same random numbers (noise, masks) each time."""
    step: Any = module.training_step
    if not module.automatic_optimization:
        step = module.validation_step
        if not is_overridden("validation_step", module):
            raise value_error(
                "loss",
                found=f"none, and {type(module).__name__} optimizes manually in its training_step",
                expected="a forward pass that the probe can call",
                do="Give the module a validation_step, or give `loss`.",
            )
    device = module.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        step(batch, 0)
