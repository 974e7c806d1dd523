"""What a verdict means: findings, each with the action that is due; and the counts that decide when enough is enough."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import nn

from lightning_mue.callbacks.guard.deciding.judging import Decided
from lightning_mue.callbacks.guard.deciding.verdict import SERIES, Verdict
from lightning_mue.callbacks.guard.indicators import Indicators
from lightning_mue.callbacks.guard.settings import ACTIONS, LOSS, GuardSettings
from lightning_mue.checks import listed
from lightning_mue.diagnostics.spike_share import SpikeCount
from lightning_mue.names import clean_name

#: Steps without a finding after which a state counts as good.
SETTLE = 10


class Finding(NamedTuple):
    """One thing that is amiss at a step.

    Attributes:
        step: Optimizer step, from 0 on.
        kind: "nonfinite", "spike", "drift", "threshold" or "skips" (too many in a row).
        indicator: "loss", "gradient_norm", or a tag of ``trainer.callback_metrics``.
        value, expected: The figure, and in words what it should be.
        action: What is due.
        where: Where it was found, in words.
    """

    step: int
    kind: str
    indicator: str
    value: float
    expected: str
    action: str
    where: str = ""

    def line(self, done: str) -> str:
        """For the log."""
        return f"step {self.step}: {self.kind}: {self.indicator} is {self.value:.6g}, expected {self.expected}{self.where}; {done}"


def strongest(findings: list[Finding]) -> Finding | None:
    """The finding whose action is the strongest."""
    return max(findings, key=lambda finding: ACTIONS.index(finding.action), default=None)


class StepHistory:
    """The history of one optimizer's verdicts, as far as the next finding depends on it."""

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        self.skips_in_row = 0
        #: Series that are in a spike: one that lasts is one finding.
        self.spiking: set[str] = set()
        #: Whether the last step was not finite.
        self.broken = False
        #: Last step at which something was amiss.
        self.last_fault = -SETTLE

    def read(self, step: int, verdict: Verdict, *, scaler: bool) -> list[Finding]:
        """Findings of the loss and the gradients at a step; those of the indicators are not among them.

        With a GradScaler a gradient overflows now and then, until the scale is right: that is no finding.
        """
        found = self._nonfinite(step, verdict, scaler) + self._spikes(step, verdict) + self._drifts(step, verdict)
        self.broken = not verdict.finite
        self.skips_in_row = self.skips_in_row + 1 if verdict.skip else 0
        if self.skips_in_row > self.settings.max_skips_in_row:
            expected = f"at most {self.settings.max_skips_in_row} in a row"
            action = "rollback" if self.settings.rolls_back else "stop"
            found.append(Finding(step, "skips", "skipped_steps", self.skips_in_row, expected, action))
        if found or verdict.skip or self.spiking:
            self.last_fault = step
        return found

    def is_good(self, step: int, verdict: Verdict | None) -> bool:
        """Whether the state after a step is one to come back to."""
        rises = verdict is not None and max(verdict.drifts) > self.settings.drift_sum / 2
        return not self.spiking and not rises and step - self.last_fault >= SETTLE

    def _nonfinite(self, step: int, verdict: Verdict, scaler: bool) -> list[Finding]:
        if verdict.finite or (scaler and not verdict.bad_loss):
            return []
        indicator, value = (LOSS, verdict.values[0]) if verdict.bad_loss else (SERIES[1], verdict.values[1])
        others = max(verdict.bad_loss, verdict.bad_gradient) - 1
        where = f", on rank {verdict.rank:.0f}" + (f" and {others:.0f} more" if others else "")
        action = self.settings.nonfinite
        if self.broken and action in ("lower_lr", "rollback"):  # once for a stretch, of which each step is skipped
            action = "skip"
        return [Finding(step, "nonfinite", indicator, value, "a finite number", action, where)]

    def _spikes(self, step: int, verdict: Verdict) -> list[Finding]:
        found = []
        for name, value, score, median in zip(SERIES, verdict.values, verdict.scores, verdict.medians, strict=True):
            if score > self.settings.spike_score:
                if name not in self.spiking and self.settings.spike is not None:
                    expected = f"about {median:.6g} (score {score:.3g}, at most {self.settings.spike_score:g})"
                    found.append(Finding(step, "spike", name, value, expected, self.settings.spike))
                self.spiking.add(name)
            elif score < self.settings.spike_score / 2:
                self.spiking.discard(name)
        return found

    def _drifts(self, step: int, verdict: Verdict) -> list[Finding]:
        if self.settings.drift is None:
            return []
        return [
            Finding(step, "drift", name, value, f"no steady rise from about {median:.6g}", self.settings.drift)
            for name, value, median, total in zip(SERIES, verdict.values, verdict.medians, verdict.drifts, strict=True)
            if total > self.settings.drift_sum
        ]

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        names = ("skips_in_row", "last_fault", "broken")
        return {**{name: getattr(self, name) for name in names}, "spiking": sorted(self.spiking)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        for name in ("skips_in_row", "last_fault", "broken"):
            setattr(self, name, state[name])
        self.spiking = set(state["spiking"])


class Reader:
    """Reads what was decided about the steps of all optimizers.

    Attributes:
        records: Of each optimizer.
        last: The last verdict; None before the first.
        counts: Of each optimizer, for SpikeScore.
    """

    def __init__(self, settings: GuardSettings, indicators: Indicators, optimizers: int) -> None:
        self.settings, self.indicators = settings, indicators
        self.records = [StepHistory(settings) for _ in range(optimizers)]
        self.last: Verdict | None = None
        self.counts = [SpikeCount() for _ in range(optimizers)]

    def read(self, decided: Decided, module: nn.Module, *, scaler: bool) -> tuple[list[Finding], bool]:
        """Findings of a step, and whether it was skipped."""
        self.last = verdict = decided.verdict()
        record = self.records[decided.optimizer]
        self.counts[decided.optimizer].add(*verdict.values)
        found = record.read(decided.step, verdict, scaler=scaler)
        if found and found[0].kind == "nonfinite" and verdict.bad_gradient:
            names = {id(p): name for name, p in module.named_parameters()}
            spoilt = [clean_name(names.get(id(p), "a parameter outside of the module")) for p in decided.spoilt()]
            where = f"{found[0].where}, in gradients of {listed(spoilt, limit=3)}" if spoilt else found[0].where
            found[0] = found[0]._replace(where=where)
        if verdict.alarm:
            found.append(self._of_indicator(decided.step, verdict))
            record.last_fault = decided.step
        return found, bool(verdict.skip)

    @property
    def spike_share(self) -> float:
        """SpikeScore over the steps of all optimizers; NaN before one of them has a window's steps."""
        known = [count for count in self.counts if count.steps >= count.window]
        return sum(count.spikes for count in known) / sum(count.steps for count in known) if known else math.nan

    def is_good(self, step: int) -> bool:
        """Whether the state after a step is one to come back to."""
        return all(record.is_good(step, self.last) for record in self.records)

    def went_back(self) -> None:
        """After a rollback: a stretch of bad batches that goes on is skipped, and is no new finding."""
        for record in self.records:
            record.skips_in_row = 0

    def _of_indicator(self, step: int, verdict: Verdict) -> Finding:
        pattern, expected, kind = self.indicators.described(int(verdict.alarm))
        action = self.settings.threshold if kind == "threshold" else self.settings.drift
        return Finding(step, kind, pattern, verdict.alarm_value, expected, action or "warn")
