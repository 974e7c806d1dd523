"""StabilityGuard: skips a step that is not finite on all ranks alike, and acts on spikes, drifts and indicators out of range."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_mue.callbacks import tensorboard_page
from lightning_mue.callbacks.guard import serving
from lightning_mue.callbacks.guard.acting import Acting
from lightning_mue.callbacks.guard.deciding.judging import Decided, Judging
from lightning_mue.callbacks.guard.findings import Finding, Reader
from lightning_mue.callbacks.guard.indicators import Indicators
from lightning_mue.callbacks.guard.settings import GuardSettings, bounds_of, patterns_of
from lightning_mue.callbacks.steps import steps_done
from lightning_mue.checks import listed, mismatch, require_type, value_error

_CHARTS = {
    "Skipped steps": ["guard/(skipped_steps|rollbacks)"],
    "Spike scores": ["guard/spike_score_.*"],
    "SpikeScore (share of steps)": ["guard/SpikeScore"],
    "Drift sums": ["guard/drift_.*"],
}


class StabilityGuard(Callback):
    """Keeps a run sound: skips what must not be stepped with, and acts before a fault has spread. docs/guard.md shows it at work.

    Before each optimizer step it looks at the loss and the gradients of all ranks. Where one is NaN or infinite on any rank, all
    ranks skip exactly this step: weights, optimizer state, and buffers such as BatchNorm's stay as they were, the gradients are
    cleared, and counters and learning rate schedules go on as if the step had been taken. It also finds spikes (a robust score
    of loss and gradient norm against the last `window` steps), drifts (a sum that a slow rise raises), and indicators of other
    callbacks that leave their range.

    Actions: ``warn`` writes a line to the log; ``skip`` does not take the step; ``lower_lr`` also multiplies the learning rate;
    ``rollback`` also returns to the last good state and goes on with the data that follows; ``stop`` also saves a checkpoint and
    ends the run. Each decision is one line in the log of rank zero, an entry of `decisions`, and in the checkpoint.

    Metrics: ``guard/skipped_steps``, ``guard/rollbacks``, ``guard/lr_factor``, ``guard/loss``, ``guard/gradient_norm`` (before
    clipping), ``guard/spike_score_loss``, ``guard/spike_score_gradient_norm``, ``guard/drift_loss`` and, from 128 steps on,
    ``guard/SpikeScore``, the share of steps that OLMo-core counts as spikes (`lightning_mue.diagnostics.spike_share`).

    Args:
        nonfinite: Action for a loss or gradient that is NaN or infinite. ``warn`` lets it into the weights.
        spike: Action for a spike; None looks for none.
        drift: Action for a slow rise of what `drifts` names; None looks for none. Not ``skip``.
        thresholds: Tag of ``trainer.callback_metrics``, or a regular expression on whole tags -> highest good value, or a pair
            [lowest, highest] with None for an open end.
        threshold: Action for an indicator out of its range, once each time it leaves it. Not ``skip``.
        drifts: Series in which drifts are looked for: ``loss``, ``gradient_norm``, tags of ``trainer.callback_metrics``, or
            regular expressions on these.
        spike_score: Robust standard deviations above the median from which on a value is a spike.
        drift_sum: Sum of robust standard deviations (less 1.5 a step) from which on a rise is a drift.
        window: Steps of the history.
        min_history: Steps before the first spike or drift can be found: until then nothing is an alarm.
        max_skips_in_row: More skipped steps in a row end the run, as ``stop`` does.
        lr_factor: Factor of ``lower_lr``, each time.
        cool_down: Optimizer steps for which ``lower_lr`` holds; None for the rest of the run.
        every_n_steps: Optimizer steps between two states that are kept for ``rollback``.
        max_rollbacks: After so many the next finding stops the run.
        keep: Where these states are kept: ``memory`` (of the host), or ``disk`` (in `dirpath`, also for a resumed run).
        dirpath: Folder for what the guard writes; None: ``guard`` in the logger's folder, else in ``default_root_dir``.
        sample_ids: Key of a batch that holds the ids of its samples, or a function of the batch; None looks for the usual keys.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range; when fitting begins, a strategy or optimizer that the guard cannot serve, or a
            second guard.
    """

    #: Whether also a CPU decides without waiting; a CPU gains nothing from it.
    decides_on_device_everywhere = False

    def __init__(
        self,
        nonfinite: str = "skip",
        spike: str | None = "warn",
        drift: str | None = "warn",
        thresholds: Mapping[str, Any] | None = None,
        threshold: str = "warn",
        *,
        drifts: Sequence[str] = ("loss",),
        spike_score: float = 10.0,
        drift_sum: float = 20.0,
        window: int = 128,
        min_history: int = 64,
        max_skips_in_row: int = 20,
        lr_factor: float = 0.5,
        cool_down: int | None = None,
        every_n_steps: int = 100,
        max_rollbacks: int = 3,
        keep: str = "memory",
        dirpath: str | Path | None = None,
        sample_ids: str | Callable[[Any], Any] | None = None,
    ) -> None:
        self.settings = GuardSettings(
            nonfinite,
            spike,
            threshold,
            drift,
            bounds_of(thresholds),
            patterns_of(drifts) if drift is not None else [],
            spike_score,
            drift_sum,
            window,
            min_history,
            max_skips_in_row,
            lr_factor,
            cool_down,
            every_n_steps,
            max_rollbacks,
        )
        self.settings.check()
        if dirpath is not None:
            require_type("dirpath", dirpath, (str, Path), "a folder's path, or None")
        if sample_ids is not None and not callable(sample_ids):
            require_type("sample_ids", sample_ids, str, "a key of the batch, a function of the batch, or None")
        self.indicators = Indicators(self.settings)
        self.acting = Acting(self, self.settings, keep, dirpath, sample_ids)
        self._judging: Judging | None = None
        self._reader = Reader(self.settings, self.indicators, 0)
        #: States: to be put in place when training begins, and of when it ended.
        self._restored: dict[str, Any] = {}
        self._ended: dict[str, Any] = {}
        self._in_batch = False
        self._step = self._kept_at = 0

    # What was found and done, oldest first (step, kind, indicator, value, expected, action, done), and the steps not taken.
    decisions = property(lambda self: self.acting.decisions)
    skipped_steps = property(lambda self: self.acting.skipped)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses strategies that the guard cannot serve, and a second guard."""
        if stage == "fit":
            serving.refuse(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses optimizers that the guard cannot serve, and registers the charts."""
        serving.refuse_optimizers(trainer.optimizers)
        tensorboard_page.register(trainer, "Guard", _CHARTS)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stands in the optimizers' steps, restores its own state, and keeps the first state to come back to."""
        self._remove()
        options = (lambda: self._in_batch, self.decides_on_device_everywhere)
        self._judging = judging = Judging(self.settings, trainer, pl_module, *options)
        self._reader = Reader(self.settings, self.indicators, len(trainer.optimizers))
        self._step = steps_done(trainer)
        if not (self._restored or self._step):  # another run: what was found in the last one, and done, is over
            self.acting.forget()
            self.indicators.forget()
        self.acting.begin(trainer, self._restored.get("acting", {}).get("kept_steps", []))
        self._restore(judging)
        self._set_rates()
        if self.settings.rolls_back and not self.acting.snapshots.steps:
            self.acting.keep_state(trainer, pl_module, judging, self._step)
        self._kept_at = max(self.acting.snapshots.steps, default=self._step)
        tensorboard_page.write(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Looks at the indicators, which all callbacks have written by now, and notes the batch."""
        assert self._judging is not None
        self._in_batch, self._step = True, steps_done(trainer)
        self._judging.begin_batch(self._step, self.indicators.look(trainer))
        if self.settings.rolls_back:
            self.acting.samples.add(trainer, self._step, batch, batch_idx)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Adds the loss of a micro-batch."""
        if self._judging is not None and self._in_batch:
            self._judging.add_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Judges the step, before the gradients are clipped."""
        if self._judging is not None and self._in_batch:
            self._judging.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Acts on what was decided, logs, and keeps a good state from time to time."""
        assert self._judging is not None
        self._in_batch = False
        findings = self._read(trainer, pl_module, self._judging.take())
        if self.acting.act(trainer, pl_module, self._judging, findings):
            self._reader.went_back()
            serving.tell(trainer, pl_module)
        self.acting.cool_down(trainer, self._step + 1)
        self._set_rates()
        done = steps_done(trainer)
        if done > self._step:
            self._log(trainer, always=bool(findings))
            due = self.settings.rolls_back and done - self._kept_at >= self.settings.every_n_steps
            if due and self._reader.is_good(self._step):
                self.acting.keep_state(trainer, pl_module, self._judging, done)
                self._kept_at = done

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reads the last steps, gives the optimizers their own steps back, and says what was never seen."""
        if self._judging is not None:
            last = [*self._judging.take(), *self._judging.take()]
            self.acting.note_late(trainer, self._read(trainer, pl_module, last))
        unseen = self.indicators.unseen()
        if unseen and self._step:
            found = f"no indicator called {listed(unseen)} in trainer.callback_metrics during the run"
            do = "Correct the names (regular expressions on whole tags), or add the monitor that logs them."
            rank_zero_warn(mismatch("thresholds, drifts", found=found, expected="one for each", do=do))
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the optimizers their own steps back."""
        self._in_batch = False
        self._remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives the optimizers their own steps back."""
        self._remove()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps what is saved as a state to come back to as well, if it is good: a resumed run begins with it."""
        if (
            self._judging is None
            or not self.settings.rolls_back
            or self._in_batch
            or not self._reader.is_good(self._step)
        ):
            return
        self._kept_at = steps_done(trainer)
        self.acting.keep_state(trainer, pl_module, self._judging, self._kept_at)
        checkpoint["callbacks"][self.state_key] = self.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Series, counts and decisions, as plain types and tensors: a resumed guard decides as this one would have."""
        if self._judging is None:
            return self._restored or self._ended
        return {
            "acting": self.acting.state_dict(),
            "indicators": self.indicators.state_dict(),
            "judges": [judge.state_dict() for judge in self._judging.judges],
            "records": [record.state_dict() for record in self._reader.records],
            "spikes": [count.state_dict() for count in self._reader.counts],
            "pending": self._judging.pending(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the state; it is put in place when training begins."""
        self._restored = state_dict

    def _restore(self, judging: Judging) -> None:
        state, self._restored = self._restored, {}
        if not state:
            return
        if len(state["judges"]) != len(judging.judges):
            found = f"a checkpoint with {len(state['judges'])} optimizers, while there are {len(judging.judges)}"
            raise value_error("ckpt_path", found=found, expected="as many", do="Resume with the same optimizers.")
        self.acting.load_state_dict(state["acting"])
        self.indicators.load_state_dict(state["indicators"])
        parts: list[Any] = [*judging.judges, *self._reader.records, *self._reader.counts]
        for part, kept in zip(parts, [*state["judges"], *state["records"], *state["spikes"]], strict=True):
            part.load_state_dict(kept)
        judging.decided = [Decided(step, index, record) for step, index, record in state["pending"]]

    def _read(self, trainer: Trainer, pl_module: LightningModule, steps: list[Decided]) -> list[Finding]:
        """Findings of judged steps; counts those that were skipped."""
        scaler = serving.scaler_of(trainer) is not None
        findings: list[Finding] = []
        for decided in steps:
            found, skipped = self._reader.read(decided, pl_module, scaler=scaler)
            findings += found
            if skipped:
                self.acting.count_skip(decided.step)
                serving.tell(trainer, pl_module)
        return findings

    def _set_rates(self) -> None:
        for guarded in self._judging.steps if self._judging is not None else ():
            guarded.lr_factor = self.acting.lr_factor

    def _log(self, trainer: Trainer, *, always: bool) -> None:
        """To the loggers, at the Trainer's logging steps and wherever something was found."""
        every, last = trainer.log_every_n_steps, self._reader.last  # type: ignore[attr-defined]  # by a connector
        if last is None or not (always or (every and (self._step + 1) % every == 0)):
            return
        metrics = self.acting.metrics(last, self._reader.spike_share)
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._step)

    def _remove(self) -> None:
        if self._judging is not None:
            self._ended = self.state_dict()
            self._judging.remove()
            self._judging = None
