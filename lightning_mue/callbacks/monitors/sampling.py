"""Sampled monitors: callbacks that watch modules during the optimizer steps they log, and cost nothing otherwise.

A `SampledMonitor` finds `Probe`s when fitting begins. When a batch begins whose optimizer step will be logged, each
probe hooks its module; while the batch runs, it adds up a short float32 vector on the device; when the batch ends, the
hooks are removed. The last of the Trainer's monitors to see that has the vectors of all of them gathered over ranks in ONE
collective and copied to the host once (`Registry`); they are merged, turned into metrics and logged.

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

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_mue.callbacks import metric_stream, tensorboard_page
from lightning_mue.callbacks.monitors.finding.reading import SearchResult
from lightning_mue.callbacks.monitors.probes import Layers, Probe, by_layer
from lightning_mue.callbacks.monitors.registry import registry_of, worst_layers
from lightning_mue.callbacks.monitors.writing import write
from lightning_mue.callbacks.steps import steps_done
from lightning_mue.checks import require_choice, require_integer

#: With more layers than this, `detail=None` means "brief": their lines in one chart could not be told apart.
MOST_LAYERS_IN_FULL = 16


class SampledMonitor(Callback, ABC):
    """Base of the monitors: samples, gathers and logs; a subclass says what to watch.

    Subclasses set `looks_for`, `category` and `charts`, and define `find_probes` (and `summarize`, if they log
    anything over all layers). Nothing is sampled without a logger, which covers ``barebones`` and ``fast_dev_run``.
    A monitor has no state to save.

    Args:
        every_n_steps: Optimizer steps between two samples; None follows ``trainer.log_every_n_steps``.
        detail: "full" logs each layer and the values over layers; "brief" only the latter and, where `worst` says so, the layer
            that is the worst (``<tag>_layer``, its index; its name is in `worst_names`); None: "brief" with more than 16 layers.

    Raises:
        TypeError: If ``every_n_steps`` is not an integer.
        ValueError: If ``every_n_steps`` is not positive, or ``detail`` is something else.
    """

    #: What `find_probes` looks for, for the warning when there is none.
    looks_for: str
    #: Heading of the charts in TensorBoard, and chart title -> regexes of tags (see `tensorboard_page.register`).
    category: str
    charts: ClassVar[Mapping[str, Sequence[str]]]
    #: Regex of the tags over layers of which "brief" also logs the layer.
    worst: ClassVar[str] = r".*"

    def __init__(self, every_n_steps: int | None = None, *, detail: str | None = None) -> None:
        if every_n_steps is not None:
            do = "It counts optimizer steps; None follows log_every_n_steps. To log nothing, leave the monitor out."
            require_integer("every_n_steps", every_n_steps, 1, do)
        if detail is not None:
            require_choice("detail", detail, ("brief", "full"), "None is brief where there are many layers.")
        self.every_n_steps, self.detail = every_n_steps, detail
        #: What was found of each thing that it looks for, for the table at the start of a fit.
        self.findings: dict[str, SearchResult] = {}
        #: Tag over layers -> the label of the layer that is the worst, of the last sample.
        self.worst_names: dict[str, str] = {}
        self._probes: list[Probe] = []
        self._handles: list[Any] = []
        self._step = 0  # of the sampled batch
        self._logged_step: int | None = None
        self._warned: set[str] = set()

    @abstractmethod
    def find_probes(self, pl_module: LightningModule) -> list[Probe]:
        """Return the probes of all modules to watch, in the same order on every rank."""

    def summarize(self, layers: Layers) -> dict[str, float]:
        """Return metrics over all layers, from those of each layer."""
        return {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the modules, which all exist and are wrapped by now, and register the charts."""
        self._probes, self._logged_step, self.findings = [], None, {}
        if not self._period(trainer):
            return
        self._probes = self.find_probes(pl_module)
        registry_of(trainer).join(self)
        if self._probes:
            tensorboard_page.register(trainer, self.category, self.charts)
        else:
            self._warn("empty", f"found nothing to watch, expected {self.looks_for}. It will log nothing.")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what all monitors watch, once for all of them."""
        registry_of(trainer).show(trainer)

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
        registry_of(trainer).begin(self)

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
        registry_of(trainer).end(self, trainer)

    @property
    def probes(self) -> list[Probe]:
        """The probes of this fit."""
        return self._probes

    def finish(self, trainer: Trainer, metrics: dict[str, float]) -> dict[str, float]:
        """Log a sampled step, from the metrics of the probes over all ranks; return what was logged."""
        silent = [probe.label for probe in self._probes if probe.total is None and not probe.optional]
        if silent:
            message = f"saw no forward pass of {', '.join(silent)}, or none with an output that it can measure."
            self._warn("silent", message)
        logged = self.report(metrics)
        for logger in trainer.loggers if logged else ():
            write(logger, logged, self._step)
        metric_stream.tell(trainer, self._step, {**metrics, **logged})  # every layer, whatever the detail
        return logged

    def report(self, metrics: dict[str, float]) -> dict[str, float]:
        """What is logged, from the metrics of the probes: with those over layers, in the detail that was asked for."""
        groups = by_layer(metrics)
        summary = self.summarize(groups)
        self.worst_names = worst_layers(groups, summary)
        reduced = {tag.rpartition("_")[0] for tag in summary}
        places = {tag.split("/", 2)[2] for tag in metrics if tag.rpartition("/")[0] in reduced}  # "ffn/03"
        layers = {tag for tag in metrics if tag.split("/", 2)[2:] and tag.split("/", 2)[2] in places}
        most = max(Counter(tag.rpartition("/")[0] for tag in layers).values(), default=0)
        if self.detail == "full" or (self.detail is None and most <= MOST_LAYERS_IN_FULL):
            return {**metrics, **summary}
        order = list(dict.fromkeys(tag.rpartition("/")[2] for tag in metrics if tag in layers))
        worst = {
            f"{tag}_layer": float(label) if label.isdigit() else float(order.index(label))
            for tag, label in self.worst_names.items()
            if re.fullmatch(self.worst, tag)
        }
        return {**{tag: value for tag, value in metrics.items() if tag not in layers}, **summary, **worst}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove hooks left by a batch that did not end, because on_train_batch_start of the module ended the epoch."""
        self._abandon(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove hooks left by a batch that raised."""
        self._abandon(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the modules."""
        self._detach()
        registry_of(trainer).leave(self)
        self._probes = []

    def _period(self, trainer: Trainer) -> int:
        """Optimizer steps between samples; 0 when this run logs nothing."""
        if not trainer.loggers:
            return 0
        return self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined,no-any-return]  # by a connector

    def _samples(self, trainer: Trainer, batch_idx: int) -> bool:
        period = self._period(trainer)
        is_new = trainer.global_step != self._logged_step  # manual accumulation: several batches begin at one step
        return period > 0 and (steps_done(trainer) + 1) % period == 0 and is_new and will_step(trainer, batch_idx)

    def _abandon(self, trainer: Trainer) -> None:
        self._detach()
        registry_of(trainer).forget(self)

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
    """By `torch.compile`, by ``module.compile()``, or as a LightningModule, whose steps the Trainer then runs compiled."""
    marks = ("_compiled_call_impl", "_compiler_ctx")
    return hasattr(module, "_orig_mod") or any(getattr(module, mark, None) is not None for mark in marks)
