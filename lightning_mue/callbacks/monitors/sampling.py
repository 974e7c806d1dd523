"""Sampled monitors: callbacks that watch modules during the optimizer steps they log, and cost nothing otherwise.

A `SampledMonitor` finds `Probe`s when fitting begins. When a batch begins whose optimizer step will be logged, each
probe hooks its module; while the batch runs, it adds up a short float32 vector on the device; when the batch ends, the
hooks are removed, and the vectors of all probes are gathered over ranks in ONE collective, merged, turned into metrics and
logged.

- With gradient accumulation only the micro-batch that steps is sampled: the metrics describe one micro-batch on every
  rank.
- Metrics go directly to the loggers, as those of `LearningRateMonitor` do, and not through ``LightningModule.log``, which
  writes only every ``trainer.log_every_n_steps``, would repeat a stale value between two samples, and has no period of each
  monitor's own. They also go to ``trainer.callback_metrics``, for early stopping and checkpointing.
- They are logged at the zero-based index of the optimizer step (``trainer.global_step`` when the batch begins), as the
  Trainer logs the values of ``self.log``: a monitor and ``train/loss`` share their x axis.
- Compiled modules run their forward and backward eagerly in a sampled step, because a hook added after compilation
  does not fire inside compiled code, and one present at compilation would stay in it.
- Only training passes are measured: a module that runs again in the backward pass (activation checkpointing), or without
  gradients or in evaluation mode inside a training step, is not measured again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_mue.callbacks import metric_stream, tensorboard_page
from lightning_mue.callbacks.monitors.probes import Probe
from lightning_mue.checks import require_integer


class SampledMonitor(Callback, ABC):
    """Base of the monitors: samples, gathers and logs; a subclass says what to watch.

    Subclasses set `looks_for`, `category` and `charts`, and define `find_probes` (and `summarize`, if they log
    anything over all layers). Nothing is sampled without a logger, which covers ``barebones`` and ``fast_dev_run``.
    A monitor has no state to save.

    Args:
        every_n_steps: Optimizer steps between two samples; None follows ``trainer.log_every_n_steps``.

    Raises:
        TypeError: If ``every_n_steps`` is not an integer.
        ValueError: If ``every_n_steps`` is not positive.
    """

    #: What `find_probes` looks for, for the warning when there is none.
    looks_for: str
    #: Heading of the charts in TensorBoard, and chart title -> regexes of tags (see `tensorboard_page.register`).
    category: str
    charts: ClassVar[Mapping[str, Sequence[str]]]

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None:
            do = "It counts optimizer steps; None follows log_every_n_steps. To log nothing, leave the monitor out."
            require_integer("every_n_steps", every_n_steps, 1, do)
        self.every_n_steps = every_n_steps
        self._probes: list[Probe] = []
        self._handles: list[RemovableHandle] = []
        self._step = 0  # of the sampled batch
        self._logged_step: int | None = None
        self._warned: set[str] = set()

    @abstractmethod
    def find_probes(self, pl_module: LightningModule) -> list[Probe]:
        """Return the probes of all modules to watch, in the same order on every rank."""

    def summarize(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return metrics over all layers, from those of each layer."""
        return {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the modules, which all exist and are wrapped by now, and register the charts."""
        self._probes, self._logged_step = [], None
        if not self._period(trainer):
            return
        self._probes = self.find_probes(pl_module)
        if self._probes:
            tensorboard_page.register(trainer, self.category, self.charts)
        else:
            self._warn("empty", f"found nothing to watch, expected {self.looks_for}. It will log nothing.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the TensorBoard page, once for all callbacks."""
        tensorboard_page.write(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Attach the hooks if this batch completes an optimizer step that will be logged."""
        if not self._probes or not self._samples(trainer, batch_idx):
            return
        if any(_is_compiled(module) for module in pl_module.modules()):
            message = "runs compiled modules eagerly during a sampled step, because hooks do not fire in compiled code."
            self._warn("compiled", message)
            _EAGER.hold(self)
        self._step = trainer.global_step
        self._handles = [probe.attach(pl_module.device) for probe in self._probes]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let compiled code run again: forward and backward are over, and the optimizer's own must stay compiled."""
        if pl_module.automatic_optimization:
            _EAGER.release(self)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remove the hooks of a sampled step, gather its statistics and log."""
        if not self._handles:
            return
        self._logged_step = self._step
        self._detach()
        metrics = self._gather(trainer)
        metrics.update(self.summarize(metrics))
        if not metrics:
            return
        values = torch.tensor(list(metrics.values()), device=trainer.strategy.root_device)
        trainer.callback_metrics.update(zip(metrics, values.unbind(), strict=True))
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._step)
        tensorboard_page.write(trainer, metrics)
        metric_stream.tell(trainer, self._step, metrics)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove hooks left by a batch that did not end, because on_train_batch_start of the module ended the epoch."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove hooks left by a batch that raised."""
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the modules."""
        self._detach()
        self._probes = []

    def _period(self, trainer: Trainer) -> int:
        """Optimizer steps between samples; 0 when this run logs nothing."""
        if not trainer.loggers:
            return 0
        return self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined,no-any-return]  # by a connector

    def _samples(self, trainer: Trainer, batch_idx: int) -> bool:
        # Manual optimization may step several optimizers a batch, and global_step counts each of them.
        steps = trainer.global_step // max(1, len(trainer.optimizers))
        period = self._period(trainer)
        is_new = trainer.global_step != self._logged_step  # manual accumulation: several batches begin at one step
        return period > 0 and (steps + 1) % period == 0 and is_new and will_step(trainer, batch_idx)

    def _gather(self, trainer: Trainer) -> dict[str, float]:
        """Metrics of the global batch, by one collective and one copy to the CPU."""
        device = trainer.strategy.root_device
        totals = [torch.zeros(p.size, device=device) if p.total is None else p.total.to(device) for p in self._probes]
        silent = [probe.label for probe in self._probes if probe.total is None]
        if silent:
            self._warn(
                "silent", f"saw no forward pass of {', '.join(silent)}, or none with an output that it can measure."
            )
        local_N = torch.cat(totals)
        ranks_RN = trainer.strategy.all_gather(local_N).reshape(-1, local_N.numel()).cpu().double()
        metrics: dict[str, float] = {}
        for probe, part_Rn in zip(self._probes, ranks_RN.split([p.size for p in self._probes], dim=1), strict=True):
            metrics.update(probe.metrics(reduce(probe.merge, part_Rn)))
        return metrics

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        _EAGER.release(self)

    def _warn(self, topic: str, message: str) -> None:
        """Warn once a topic."""
        if topic not in self._warned:
            self._warned.add(topic)
            rank_zero_warn(f"{type(self).__name__} {message}")


def will_step(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the optimizer steps at the end of a training batch of the epoch that is about to run.

    The Trainer's own answer is private; this one is built from public attributes. It steps on every
    ``accumulate_grad_batches``-th batch of an epoch and on the epoch's last batch (unless the strategy accumulates by
    itself, as DeepSpeed does). Under manual optimization every batch counts as one that steps.
    """
    if not trainer.lightning_module.automatic_optimization or (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
        return True
    is_last = trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches
    return is_last and not trainer.strategy.handles_gradient_accumulation


class _EagerSteps:
    """Runs compiled code eagerly while at least one monitor asks for it; monitors may release it in any order."""

    def __init__(self) -> None:
        self._holders: set[int] = set()
        self._stance: Any = None

    def hold(self, holder: object) -> None:
        if not self._holders:
            self._stance = torch.compiler.set_stance("force_eager")
        self._holders.add(id(holder))

    def release(self, holder: object) -> None:
        if id(holder) in self._holders:
            self._holders.remove(id(holder))
            if not self._holders:
                self._stance.__exit__(None, None, None)


_EAGER = _EagerSteps()


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
