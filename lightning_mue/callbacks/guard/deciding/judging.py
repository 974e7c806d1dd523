"""Judges the steps of all optimizers of a run: measures, gathers over ranks, decides, and skips."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_mue.callbacks.guard import serving
from lightning_mue.callbacks.guard.deciding.buffers import ChangingBuffers
from lightning_mue.callbacks.guard.deciding.measure import LossSum, Share, gather, gradients_of, norms_of
from lightning_mue.callbacks.guard.deciding.stepping import GuardedStep
from lightning_mue.callbacks.guard.deciding.verdict import SERIES, Judge, Verdict
from lightning_mue.callbacks.guard.indicators import IndicatorAlarm, own_series
from lightning_mue.callbacks.guard.settings import GuardSettings


class Decided(NamedTuple):
    """One judged step.

    Attributes:
        step, optimizer: Optimizer step from 0 on, and which optimizer.
        record: The record, on the host or on its way there.
        arrival: What to wait for; None where it is there.
        norms, params: Norms of this rank's gradients, on the device, and their parameters, to name those that are not finite.
    """

    step: int
    optimizer: int
    record: Tensor
    arrival: Any = None
    norms: Tensor | None = None
    params: tuple[Tensor, ...] = ()

    def verdict(self) -> Verdict:
        """On the host; waits for the record, not for what the device was given to do since."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return Verdict.of(self.record.tolist())

    def spoilt(self) -> list[Tensor]:
        """Parameters whose gradient on this rank is not finite."""
        norms = [] if self.norms is None else self.norms.tolist()
        return [p for p, norm in zip(self.params, norms, strict=True) if not math.isfinite(norm)]


def _sent(record: Tensor) -> tuple[Tensor, Any]:
    """A record on its way to the host, and what to wait for."""
    if record.device.type != "cuda":
        return record, None
    host = torch.empty(record.shape, dtype=record.dtype, pin_memory=True)
    host.copy_(record, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record()
    return host, arrival


class Judging:
    """Everything between a backward pass and the step that follows it.

    Args:
        settings: The guard's.
        trainer: Of the run, which has begun to train.
        pl_module: Its module.
        active: Whether a training batch runs.
        everywhere: Whether a step is decided on the device also where nothing is gained by it.
    """

    def __init__(
        self,
        settings: GuardSettings,
        trainer: Trainer,
        pl_module: LightningModule,
        active: Callable[[], bool],
        everywhere: bool,
    ) -> None:
        self.trainer = trainer
        self.device = torch.device("cpu") if trainer.strategy.root_device is None else trainer.strategy.root_device
        self.everywhere = everywhere
        drifting = own_series(settings.drifts, SERIES)
        self.judges = [Judge(settings, (drifting[0], drifting[1]), self.device) for _ in trainer.optimizers]
        self.steps = [GuardedStep(o, i, self._judge, active) for i, o in enumerate(trainer.optimizers)]
        self.buffers = ChangingBuffers(pl_module)
        self.alarm: IndicatorAlarm | None = None
        self.step = 0
        #: Steps to be read: now; of this batch; of this batch, once the next one has been through.
        self.decided: list[Decided] = []
        self._fresh: list[Decided] = []
        self._late: list[Decided] = []
        self._losses, self._share = LossSum(), Share(trainer.world_size)
        self._begins = True

    def begin_batch(self, step: int, alarm: IndicatorAlarm | None) -> None:
        """Before a batch: copies what its passes may spoil, if it is the first of a step."""
        self.step = step
        self.alarm = self.alarm or alarm
        if self._begins:
            self.buffers.keep()
            self._begins = False

    def add_loss(self, loss: Tensor) -> None:
        """Before a backward pass."""
        self._losses.add(serving.unscaled(loss, serving.scaler_of(self.trainer)))

    def before_step(self, optimizer: Any) -> None:
        """Once the gradients exist, before they are clipped."""
        for guarded in self.steps:
            if guarded.optimizer is optimizer:
                guarded.reset()  # a GradScaler that skips does not call `step`, which would have done it
                guarded.judge()

    def take(self) -> list[Decided]:
        """At the end of a batch: the steps that were decided on the host, and those of the batches before.

        So the host runs at most a batch ahead of a device that decides, and each rank reads the same steps.
        """
        ready, self.decided, self._fresh = [*self.decided, *self._fresh], self._late, []
        self._late = []
        return ready

    def pending(self) -> list[tuple[int, int, Tensor]]:
        """What has not been taken: step, optimizer and record, for a checkpoint."""
        waiting = [*self.decided, *self._fresh, *self._late]
        for each in waiting:
            each.verdict()
        return [(each.step, each.optimizer, each.record.cpu().clone()) for each in waiting]

    def drop(self) -> None:
        """After a rollback: forgets what has not been taken."""
        self.decided, self._fresh, self._late = [], [], []

    def remove(self) -> None:
        """Gives the optimizers their own steps back."""
        for guarded in self.steps:
            guarded.remove()

    @torch.no_grad()
    def _judge(self, guarded: GuardedStep) -> None:
        scaler = serving.scaler_of(self.trainer)
        held = gradients_of(guarded.optimizer)
        params = [p for p, _ in held]
        norms_P = norms_of((grad for _, grad in held), self.device)
        unscales = scaler is not None and getattr(guarded.optimizer, "_step_supports_amp_scaling", False)
        if unscales:  # the optimizer does it itself
            norms_P = serving.unscaled(norms_P, scaler)
        record = self.judges[guarded.index].decide(gather(self._figures(params, norms_P), self.trainer.world_size))
        self._losses.stepped, self._begins, self.alarm = True, True, None
        self.buffers.settle()
        if (self.everywhere or self.device.type != "cpu") and guarded.takes_device_flag:
            guarded.found = record[0]
            self.buffers.undo(where=record[0])
            self._late.append(Decided(self.step, guarded.index, *_sent(record), norms_P, tuple(params)))
            return
        record = record.cpu()
        verdict = Verdict.of(record.tolist())
        if verdict.skip:
            self._skip(guarded, verdict, scaler, unscales)
        self._fresh.append(Decided(self.step, guarded.index, record, None, norms_P, tuple(params)))

    def _skip(self, guarded: GuardedStep, verdict: Verdict, scaler: Any, unscales: bool) -> None:
        guarded.skip = True
        self.buffers.undo()
        if scaler is not None and not verdict.finite:
            if unscales:  # known to the scaler only when it calls `step`
                guarded.on_skip = lambda: serving.mark(scaler, guarded.optimizer)
            else:
                serving.mark(scaler, guarded.optimizer)
        if not unscales:
            guarded.clear_gradients()  # or clipping may raise an error

    def _figures(self, params: list[Tensor], norms_P: Tensor) -> Tensor:
        loss = self._losses.total
        code, value = (0.0, 0.0) if self.alarm is None else (float(self.alarm.code), self.alarm.value)
        known = torch.tensor([float(self._losses.count), float(len(params)), code, value], device=self.device)
        losses, gradients, code_0, value_0 = known.unbind()
        total = torch.zeros((), device=self.device) if loss is None else loss.to(self.device)
        return torch.stack([total, losses, self._share.square(params, norms_P), gradients, code_0, value_0])
