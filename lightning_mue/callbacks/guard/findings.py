"""What a verdict means: findings, each with the action that is due; and the counts that decide when enough is enough."""

from __future__ import annotations

from typing import Any, NamedTuple

from lightning_mue.callbacks.guard.settings import ACTIONS, LOSS, Settings
from lightning_mue.callbacks.guard.verdict import SERIES, Verdict

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
    """

    step: int
    kind: str
    indicator: str
    value: float
    expected: str
    action: str

    def line(self, done: str) -> str:
        """For the log."""
        return f"step {self.step}: {self.kind}: {self.indicator} is {self.value:.6g}, expected {self.expected}; {done}"


def strongest(findings: list[Finding]) -> Finding | None:
    """The finding whose action is the strongest."""
    return max(findings, key=lambda finding: ACTIONS.index(finding.action), default=None)


class Record:
    """The history of one optimizer's verdicts, as far as the next finding depends on it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.skips_in_row = 0
        #: Series that are in a spike: one that lasts is one finding.
        self.spiking: set[str] = set()
        #: Last step at which something was amiss.
        self.last_fault = -SETTLE

    def read(self, step: int, verdict: Verdict, *, scaler: bool) -> list[Finding]:
        """Findings of the loss and the gradients at a step; those of the indicators are not among them.

        With a GradScaler a gradient overflows now and then, until the scale is right: that is no finding.
        """
        found = self._nonfinite(step, verdict, scaler) + self._spikes(step, verdict) + self._drifts(step, verdict)
        self.skips_in_row = self.skips_in_row + 1 if verdict.skip else 0
        if self.skips_in_row > self.settings.max_skips_in_row:
            expected = f"at most {self.settings.max_skips_in_row} in a row"
            found.append(Finding(step, "skips", "skipped_steps", self.skips_in_row, expected, "stop"))
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
        # The mean over ranks hides which it was.
        where = f"a finite number (not so on {max(verdict.bad_loss, verdict.bad_gradient):.0f} ranks, first {verdict.rank:.0f})"
        return [Finding(step, "nonfinite", indicator, value, where, self.settings.nonfinite)]

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

    def forget(self) -> None:
        """After a rollback: the faults belong to what was undone."""
        self.skips_in_row, self.spiking = 0, set()

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"skips_in_row": self.skips_in_row, "spiking": sorted(self.spiking), "last_fault": self.last_fault}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.skips_in_row, self.spiking = state["skips_in_row"], set(state["spiking"])
        self.last_fault = state["last_fault"]
