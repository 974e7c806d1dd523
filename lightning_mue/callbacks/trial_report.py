"""TrialReport: tells the process that started a run how far it is and how it ended; added by `lightning-mue sweep`."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_mue.callbacks.mue.run import replicas, steps
from lightning_mue.callbacks.throughput import count_tokens
from lightning_mue.checks import value_error
from lightning_mue.files import TRIAL_PROGRESS, TRIAL_RESULT, TRIAL_WATCHED, whole_file
from lightning_mue.parameterizations.reading.flops import training_flops_per_token

#: Reports in a run; a window holds at least so many batches, since single bad batches may be skipped by a guard.
_REPORTS, _WINDOW = 100, 5


class TrialReport(Callback):
    """Validates after the last step, and writes two files into a folder.

    - ``progress.json``, during training: ``{"part": of the run, "loss": mean training loss since the last report}``; the loss is
      null where no batch of at least five had a finite one.
    - ``result.json``, at the end of fit: ``{"loss": the metric, "tokens": trained on, "compute": FLOPs}``. ``compute`` is
      ``flops_per_token()`` of the module, else 6 x its active parameters, x tokens; null where it is not known.

    Args:
        folder: The folder.
        metric: Logged quantity that is the run's result.
    """

    def __init__(self, folder: str, metric: str = "val/loss") -> None:
        self.folder, self.metric = Path(folder), metric
        self._tokens: float | None = 0.0
        #: Sum of the finite losses since the last report, and their number.
        self._sum: Tensor | None = None
        self._batches = 0
        self._flops: float | None = None
        self._total: int | None = None
        self._validated: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts to watch the process that started this one, so that a trial does not outlive its sweep."""
        if trainer.is_global_zero and os.environ.pop(TRIAL_WATCHED, ""):
            threading.Thread(target=_end_with_parent, daemon=True).start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the length of the run and the FLOPs of a token."""
        self._flops = _flops(pl_module)
        try:
            self._total = steps(trainer)
        except LookupError:  # no length is known: there is no progress to report
            self._total = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts tokens, reports, and asks for a validation after the last step."""
        tokens = count_tokens(batch)
        self._tokens = None if tokens is None or self._tokens is None else self._tokens + tokens * replicas(trainer)
        self._add(outputs.get("loss") if isinstance(outputs, Mapping) else outputs)
        step = trainer.global_step // max(1, len(trainer.optimizers))
        if self._total and self._batches >= max(_WINDOW, self._total // _REPORTS) and trainer.is_global_zero:
            self._report(step / self._total)
        last = trainer.is_last_batch and trainer.max_epochs not in (None, -1)
        last = last and trainer.current_epoch + 1 >= trainer.max_epochs  # type: ignore[operator]
        if last or 0 < trainer.max_steps <= trainer.global_step:
            # A stop asks for a validation, whatever the interval; here training would stop anyway.
            if trainer.check_val_every_n_epoch is not None:
                trainer.check_val_every_n_epoch = 1
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that the metric is that of this step."""
        if not trainer.sanity_checking:
            self._validated = trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the result.

        Raises:
            ValueError: If the metric was not logged, or not after the last step.
        """
        if not trainer.is_global_zero:
            return
        logged = trainer.callback_metrics
        if self.metric not in logged:
            do = "Give --metric, or log it, e.g. self.log('val/loss', loss) in validation_step."
            raise value_error(
                "--metric", found=", ".join(sorted(logged)) or "nothing logged", expected=self.metric, do=do
            )
        if self._validated not in (None, trainer.global_step):
            found = f"{self.metric} of step {self._validated} of {trainer.global_step}"
            do = "Give the length of the run by max_steps or max_epochs, not by time."
            raise value_error("--metric", found=found, expected="a validation after the last step", do=do)
        flops = self._flops * self._tokens if self._flops and self._tokens else None
        loss = float(logged[self.metric])
        self._write(
            TRIAL_RESULT, {"loss": loss if math.isfinite(loss) else None, "tokens": self._tokens, "compute": flops}
        )

    def _add(self, loss: Any) -> None:
        """Adds a batch's loss to the window, without waiting for the device."""
        if not isinstance(loss, Tensor):
            return
        loss = loss.detach().float().mean()
        finite = torch.isfinite(loss)
        new = torch.stack([torch.where(finite, loss, 0.0), finite.float()])
        self._sum = new if self._sum is None else self._sum + new
        self._batches += 1

    def _report(self, part: float) -> None:
        assert self._sum is not None
        total, finite = self._sum.tolist()
        self._write(TRIAL_PROGRESS, {"part": part, "loss": total / finite if finite else None})
        self._sum, self._batches = None, 0

    def _write(self, name: str, content: dict[str, Any]) -> None:
        with whole_file(self.folder / name) as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")


def _flops(module: LightningModule) -> float | None:
    """FLOPs of one token in training; None where neither the module nor its parameters tell."""
    try:
        return training_flops_per_token(module)
    except ValueError:
        return None


def _end_with_parent() -> None:
    """Waits until standard input ends, which the parent holds open, and then ends this process and those that it started."""
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.killpg(os.getpgrp(), signal.SIGKILL)
