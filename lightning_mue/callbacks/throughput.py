"""ThroughputMonitor: tokens per second of a training run, and model FLOPs utilization where the FLOPs are known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_mue.callbacks import tensorboard_page
from lightning_mue.callbacks.monitors.sampling import will_step
from lightning_mue.callbacks.mue.run import replicas
from lightning_mue.checks import type_error
from lightning_mue.contract import flops_per_token

_RATE, _MFU = "train/tokens_per_second", "train/mfu"
#: First part of the Trainer's precision -> dtype of its matrix products; float32 for all others.
_DTYPES = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64, "transformer": torch.int8}


class ThroughputMonitor(Callback):
    """Logs how fast a run trains, at the Trainer's logging steps.

    - ``train/tokens_per_second``: tokens of all ranks since the last logged step, over the time since then. Tensor-parallel
      ranks see the same tokens, which count once. The first batch of a fit pays for warm-up and does not count; nor does the
      time from the start of a validation to the next training batch.
    - ``train/mfu``: model FLOPs utilization (PaLM, arXiv:2204.02311, appendix B): tokens per second x FLOPs per token / peak
      FLOPs of all devices. Only where the module has a method ``flops_per_token()`` (forward and backward) and Lightning knows
      the peak of the device in the Trainer's precision, which it does for no CPU.

    Lightning's own ThroughputMonitor logs other metrics: averages over a fixed number of batches, by the clock of one rank,
    with the first batch in them.

    Args:
        tokens_of: Batch -> number of tokens in it. None counts the elements of ``batch["tokens"]``, else of the first integer
            tensor with at least two dimensions in the batch; where there is none, it is the data module's ``tokens_per_batch``.

    Raises:
        TypeError: If ``tokens_of`` cannot be called.
    """

    def __init__(self, tokens_of: Callable[[Any], int] | None = None) -> None:
        if tokens_of is not None and not callable(tokens_of):
            raise type_error("tokens_of", found=repr(tokens_of), expected="a function of the batch, or None")
        self.tokens_of = tokens_of
        #: Start of the interval, None before the end of the first batch; start of a validation in it; tokens since its start.
        self._start: float | None = None
        self._paused: float | None = None
        self._seen = 0
        self._utilization: float | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks up the FLOPs, and registers the chart that not every run has."""
        self._utilization = _utilization(trainer, pl_module)
        charts = {} if self._utilization is None else {"Model FLOPs utilization": [_MFU]}
        tensorboard_page.register(trainer, "Training", charts)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resets the clock."""
        self._start, self._paused, self._seen = None, None, 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self._paused = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Lets the clock go on after a validation and what other callbacks do at its end, such as saving a checkpoint."""
        if self._start is not None and self._paused is not None:
            self._start += time.perf_counter() - self._paused
        self._paused = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch's tokens; logs on log steps."""
        now, tokens = time.perf_counter(), self._tokens(batch)
        if tokens is None:
            tokens = getattr(trainer.datamodule, "tokens_per_batch", None)  # type: ignore[attr-defined]
        if self._start is None:
            self._start = now
            if tokens is None:
                rank_zero_warn(
                    "ThroughputMonitor: tokens are not counted, because there is no integer tensor of at least two dimensions "
                    f"in a batch of type {type(batch).__name__} and no tokens_per_batch in the data module. "
                    "Give tokens_of, a function of the batch."
                )
            return
        self._seen += (tokens or 0) * replicas(trainer)
        if self._seen and will_step(trainer, batch_idx) and trainer._logger_connector.should_update_logs:
            rate = self._seen / (now - self._start)
            pl_module.log(_RATE, rate, prog_bar=True)
            if self._utilization is not None:
                pl_module.log(_MFU, rate * self._utilization)
            self._start, self._seen = now, 0
            tensorboard_page.write(trainer)

    def _tokens(self, batch: Any) -> int | None:
        """Number of tokens in this rank's batch; None if there is nothing to count."""
        return count_tokens(batch) if self.tokens_of is None else int(self.tokens_of(batch))


def count_tokens(batch: Any) -> int | None:
    """Elements of ``batch["tokens"]``, else of the first integer tensor with at least two dimensions; None without one."""
    named = batch.get("tokens") if isinstance(batch, Mapping) else None
    ids = named if isinstance(named, Tensor) else next(_token_ids(batch), None)
    return None if ids is None else ids.numel()


def _token_ids(batch: Any) -> Iterator[Tensor]:
    """The integer tensors of at least two dimensions in nested mappings, lists and tuples, in order."""
    if isinstance(batch, Tensor):
        if batch.ndim > 1 and not (batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool):
            yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _token_ids(part)


def _utilization(trainer: Trainer, pl_module: LightningModule) -> float | None:
    """Part of all devices' peak that one token per second uses; None if the FLOPs or the peak are not known."""
    flops = flops_per_token(pl_module)
    if flops is None:
        return None
    dtype = _DTYPES.get(str(trainer.precision).partition("-")[0], torch.float32)
    peak = get_available_flops(trainer.strategy.root_device, dtype)
    return flops / (peak * trainer.world_size) if peak else None
