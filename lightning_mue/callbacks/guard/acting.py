"""What a guard does about its findings, and the account that it gives of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mue.callbacks.guard import snapshot
from lightning_mue.callbacks.guard.deciding.verdict import SERIES, Verdict
from lightning_mue.callbacks.guard.findings import Finding, strongest
from lightning_mue.callbacks.guard.samples import Samples
from lightning_mue.callbacks.guard.settings import GuardSettings
from lightning_mue.checks import require_choice

if TYPE_CHECKING:
    from lightning_mue.callbacks.guard.deciding.judging import Judging

_log = logging.getLogger(__name__)
#: Entries of `decisions` that are kept.
_MOST_DECISIONS = 1000
#: File of the samples that were skipped.
_SAMPLES = "skipped_samples.jsonl"


class Acting:
    """Carries out actions, counts them, and keeps the states for rollbacks.

    Args:
        guard: The callback, which snapshots leave out.
        settings: The guard's.
        keep, dirpath, sample_ids: Its arguments.
    """

    def __init__(
        self,
        guard: Callback,
        settings: GuardSettings,
        keep: str,
        dirpath: str | Path | None,
        sample_ids: str | Callable[[Any], Any] | None,
    ) -> None:
        require_choice("keep", keep, ("memory", "disk"))
        self.guard, self.settings, self.keep = guard, settings, keep
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.samples = Samples(sample_ids)
        self.stopped = False
        self.folder = Path()
        self.snapshots = snapshot.Snapshots(None, 0)
        self.forget()

    def forget(self) -> None:
        """Knows nothing yet of the run."""
        self.decisions: list[dict[str, Any]] = []
        self.skipped = self.rollbacks = 0
        self.lr_factor, self.lowered_until = 1.0, -1
        self._to_list: list[int] = []

    def begin(self, trainer: Trainer, kept_steps: list[int]) -> None:
        """When training begins: finds the folder, and in it the states that an interrupted run left."""
        log_dir = trainer.log_dir  # a collective
        self.folder = self.dirpath or Path(log_dir or trainer.default_root_dir) / "guard"
        self.stopped = False
        self.snapshots = snapshot.Snapshots(self.folder if self.keep == "disk" else None, trainer.global_rank)
        self.snapshots.adopt(kept_steps)
        if trainer.world_size > 1 and kept_steps:
            ranks: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, self.snapshots.steps)
            self.snapshots.steps = [step for step in self.snapshots.steps if all(step in own for own in ranks)]

    def keep_state(self, trainer: Trainer, pl_module: LightningModule, judging: Judging, step: int) -> None:
        """Keeps the state after so many steps as one to come back to."""
        state = snapshot.take(trainer, pl_module, self.guard)
        state["series"] = [judge.state_dict() for judge in judging.judges]
        self.snapshots.add(step, state)
        self.samples.forget_before(self.snapshots.steps[0])

    def act(self, trainer: Trainer, pl_module: LightningModule, judging: Judging, findings: list[Finding]) -> bool:
        """Carries out the strongest action, and the learning rate's as well. Returns whether the run went back."""
        first = strongest(findings)
        if first is None:
            self._list_skipped(trainer, False)
            return False
        done = {finding: _PLAIN.get(finding.action, "") for finding in findings}
        lowering = [finding for finding in findings if finding.action == "lower_lr"]
        if lowering:
            done[lowering[0]] = self._lower(lowering[0].step)
        went_back = False
        if first.action == "rollback":
            went_back, done[first] = self._roll_back(trainer, pl_module, judging, first)
        if first.action == "stop" or (first.action == "rollback" and not went_back):
            done[first] += self._stop(trainer, first.step)
        for finding in findings:
            self._note(trainer, finding, done[finding] or f"see {first.kind} of {first.indicator}")
        self._list_skipped(trainer, went_back)
        return went_back

    def count_skip(self, step: int) -> None:
        """Counts a step that was not taken."""
        self.skipped += 1
        self._to_list.append(step)

    def _list_skipped(self, trainer: Trainer, went_back: bool) -> None:
        """Lists the samples of skipped steps, unless a rollback has; batches are noted only where there may be one."""
        for step in self._to_list if self.settings.rolls_back and not went_back else ():
            what = {"rollback": None, "kind": "skip", "indicator": None, "found_at": step}
            self.samples.write(self.folder / _SAMPLES, trainer, since=step, until=step, what=what)
        self._to_list = []

    def cool_down(self, trainer: Trainer, step: int) -> None:
        """Gives the learning rate back when the cool-down is over."""
        if self.lr_factor != 1 and 0 <= self.lowered_until <= step:
            self.lr_factor, self.lowered_until = 1.0, -1
            if trainer.is_global_zero:
                _log.info(
                    "StabilityGuard: step %d: the cool-down is over, the learning rate is the schedule's again", step
                )

    def _lower(self, step: int) -> str:
        self.lr_factor *= self.settings.lr_factor
        until = ""
        if self.settings.cool_down is not None:
            self.lowered_until = step + 1 + self.settings.cool_down
            until = f" until step {self.lowered_until}"
        return f"step skipped where it was found before it, learning rate now x {self.lr_factor:g}{until}"

    def _roll_back(
        self, trainer: Trainer, pl_module: LightningModule, judging: Judging, finding: Finding
    ) -> tuple[bool, str]:
        if self.rollbacks >= self.settings.max_rollbacks:
            return False, f"{self.rollbacks} rollbacks were made, as many as max_rollbacks allows, so "
        kept = self.snapshots.newest()
        if kept is None or not snapshot.fits(kept[1], trainer, pl_module):
            return False, "there is no state of these parameters to go back to, so "
        since, state = kept
        self.rollbacks += 1
        path = self.folder / _SAMPLES
        what = {
            "rollback": self.rollbacks,
            "kind": finding.kind,
            "indicator": finding.indicator,
            "found_at": finding.step,
        }
        batches = self.samples.write(path, trainer, since=since, what=what)
        snapshot.restore(state, trainer, pl_module, self.guard)
        for judge, series in zip(judging.judges, state["series"], strict=True):
            judge.load_state_dict(series)
        judging.drop()
        return True, (
            f"went back to the weights after {since} steps, rollback {self.rollbacks} of at most {self.settings.max_rollbacks}; "
            f"the samples of the {batches} batches since are listed in {path}"
        )

    def _stop(self, trainer: Trainer, step: int) -> str:
        if self.stopped:
            return "the run is ending"
        self.stopped = True
        path = self.folder / f"stop-step={step}.ckpt"
        trainer.save_checkpoint(path)
        # The run must end, whatever min_steps and min_epochs say.
        trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
        trainer.should_stop = True
        return f"saved {path} and ended the run"

    def _note(self, trainer: Trainer, finding: Finding, done: str) -> None:
        self.decisions = [*self.decisions, {**finding._asdict(), "done": done}][-_MOST_DECISIONS:]
        if trainer.is_global_zero:
            _log.warning("StabilityGuard: %s", finding.line(done))

    def note_late(self, trainer: Trainer, findings: list[Finding]) -> None:
        """Notes what was found when the run was over."""
        for finding in findings:
            self._note(trainer, finding, "the run was over")

    def metrics(self, last: Verdict, spike_share: float) -> dict[str, float]:
        """Tag -> value, of what there is a value of."""
        counts = {"skipped_steps": self.skipped, "rollbacks": self.rollbacks, "lr_factor": self.lr_factor}
        metrics = {f"guard/{name}": float(value) for name, value in counts.items()}
        for name, value, score, total in zip(SERIES, last.values, last.scores, last.drifts, strict=True):
            series = {f"guard/{name}": value, f"guard/spike_score_{name}": score, f"guard/drift_{name}": total}
            metrics.update({tag: number for tag, number in series.items() if math.isfinite(number)})
        return metrics if math.isnan(spike_share) else {**metrics, "guard/SpikeScore": spike_share}

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        names = ("decisions", "skipped", "rollbacks", "lr_factor", "lowered_until")
        return {**{name: getattr(self, name) for name in names}, "kept_steps": list(self.snapshots.steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, but for the kept steps, which `begin` takes up."""
        for name in ("decisions", "skipped", "rollbacks", "lr_factor", "lowered_until"):
            setattr(self, name, state[name])


_PLAIN = {"warn": "nothing done", "skip": "step skipped", "stop": "", "rollback": "", "lower_lr": ""}
