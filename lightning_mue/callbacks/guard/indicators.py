"""Indicators of other callbacks in ``trainer.callback_metrics``: whether they leave their range, or creep upward."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer

from lightning_mue.callbacks.guard.settings import GRADIENT, LOSS, GuardSettings
from lightning_mue.diagnostics.spikes import cusum, new_cusum, push

#: As of the loss (`lightning_mue.callbacks.guard.deciding.verdict.FLOORS`).
_FLOOR = 0.02


class IndicatorAlarm(NamedTuple):
    """An indicator that is amiss.

    Attributes:
        code: Number of its pattern from 1 on: first the thresholds, then the drifts.
        tag: The indicator.
        value: Its value.
        expected: In words.
        kind: "threshold" or "drift".
    """

    code: int
    tag: str
    value: float
    expected: str
    kind: str


class _Series:
    """The values of one indicator, as it changed."""

    def __init__(self, window: int) -> None:
        self.last: float | None = None
        self.window_SW = torch.full((1, window), torch.nan)
        self.sum_S3 = new_cusum(1)

    def add(self, value: float, settings: GuardSettings) -> tuple[bool, float]:
        """Whether the sum passes its limit with this value, and the median that it was held against."""
        if value == self.last:  # most indicators are sampled, and stay in the metrics until the next sample
            return False, 0.0
        self.last = value
        values_S = torch.tensor([value])
        self.sum_S3 = cusum(values_S, self.window_SW, self.sum_S3, min_history=settings.min_history, floor=_FLOOR)
        self.window_SW = push(values_S, self.window_SW)
        total, median = float(self.sum_S3[0, 0]), float(self.sum_S3[0, 1])
        if total > settings.drift_sum:
            self.sum_S3 = new_cusum(1)
        return total > settings.drift_sum, median


class Indicators:
    """Holds indicators against their bounds and their past, once a batch, on this rank.

    Ranks may see different values: what is amiss goes to all ranks with the figures of the next step.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self.settings = settings
        #: Patterns of drifts; the guard's own series are followed elsewhere.
        self._drifting = [pattern for pattern in settings.drifts if pattern.pattern not in (LOSS, GRADIENT)]
        self._patterns = [bound.pattern for bound in settings.bounds] + self._drifting
        self.forget()

    def forget(self) -> None:
        """Knows nothing yet of the run."""
        #: Number of a pattern -> the indicator that was amiss last.
        self._latest: dict[int, str] = {}
        self._outside: set[str] = set()
        self._series: dict[str, _Series] = {}
        self._seen: set[int] = set()

    def look(self, trainer: Trainer) -> IndicatorAlarm | None:
        """The first indicator that has just left its range, or whose sum has passed its limit."""
        if not self._patterns:
            return None
        values = self._values(trainer)
        alarms = [*self._thresholds(values), *self._drifts(values)]
        self._latest.update({alarm.code: alarm.tag for alarm in alarms})
        return max(alarms, key=lambda alarm: alarm.code) if alarms else None

    def _thresholds(self, values: dict[str, float]) -> list[IndicatorAlarm]:
        alarms = []
        for code, bound in enumerate(self.settings.bounds, 1):
            for tag, value in values.items():
                if not bound.pattern.fullmatch(tag):
                    continue
                self._seen.add(code)
                key = f"{code} {tag}"
                if bound.low <= value <= bound.high:
                    self._outside.discard(key)
                elif key not in self._outside:  # NaN is outside, too
                    self._outside.add(key)
                    alarms.append(IndicatorAlarm(code, tag, value, str(bound), "threshold"))
        return alarms

    def _drifts(self, values: dict[str, float]) -> list[IndicatorAlarm]:
        alarms = []
        for code, pattern in enumerate(self._drifting, 1 + len(self.settings.bounds)):
            for tag, value in values.items():
                if pattern.fullmatch(tag):
                    self._seen.add(code)
                    passed, median = self._series.setdefault(tag, _Series(self.settings.window)).add(
                        value, self.settings
                    )
                    if passed:
                        alarms.append(IndicatorAlarm(code, tag, value, f"about {median:g}", "drift"))
        return alarms

    def _values(self, trainer: Trainer) -> dict[str, float]:
        """The numbers of the indicators that are watched, by one copy to the host."""
        found = {
            tag: value
            for tag, value in trainer.callback_metrics.items()
            if any(pattern.fullmatch(tag) for pattern in self._patterns) and value.numel() == 1
        }
        if not found:
            return {}
        device = next(iter(found.values())).device
        stacked = torch.stack([value.detach().reshape(()).to(device, torch.float32) for value in found.values()])
        return dict(zip(found, stacked.tolist(), strict=True))

    def unseen(self) -> list[str]:
        """Patterns that no indicator has matched so far."""
        own = [p for p in self._drifting if any(own_series([p], (LOSS, GRADIENT)))]
        patterns = enumerate(self._patterns, 1)
        return [pattern.pattern for code, pattern in patterns if code not in self._seen and pattern not in own]

    def described(self, code: int) -> tuple[str, str, str]:
        """Of an alarm: the indicator (its pattern, if another rank raised it), what is expected, and the kind."""
        bounds = self.settings.bounds
        tag = self._latest.get(code, self._patterns[code - 1].pattern)
        return (tag, str(bounds[code - 1]), "threshold") if code <= len(bounds) else (tag, "no steady rise", "drift")

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors."""
        series = {tag: {"last": s.last, "window": s.window_SW, "sum": s.sum_S3} for tag, s in self._series.items()}
        return {"outside": sorted(self._outside), "series": series}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._outside = set(state["outside"])
        for tag, kept in state["series"].items():
            series = self._series[tag] = _Series(self.settings.window)
            width = min(series.window_SW.shape[1], kept["window"].shape[1])
            series.last, series.sum_S3 = kept["last"], kept["sum"]
            series.window_SW[:, -width:] = kept["window"][:, -width:]


def own_series(drifts: Sequence[re.Pattern[str]], names: Sequence[str]) -> tuple[bool, ...]:
    """Which of the guard's own series the patterns name."""
    return tuple(any(pattern.fullmatch(name) for pattern in drifts) for name in names)
