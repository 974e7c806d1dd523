"""SpikeScore: the share of a run's steps whose loss or gradient norm stands out of the last ones.

As OLMo-core's `StabilityMonitorCallback` counts it: a value is a spike if it is more than 6 standard deviations (of the
population) above the mean of the 128 values before it; before there are as many, or where they do not differ (a standard
deviation below 1e-10), there are none. One departure: a value that is not finite does not enter the window, where it would hide
all spikes of the next 128 steps. As there, plus infinity is a spike and NaN is none (`StabilityGuard` has its own word for it).

To compare runs by one number afterwards; `lightning_mue.diagnostics.spike_score` is what the guard acts on.

Shape legend: n steps, oldest first; W values of a window, m finite values.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import torch
from torch import Tensor

from lightning_mue.checks import require_integer, require_number, value_error

WINDOW, THRESHOLD = 128, 6.0
#: Windows whose standard deviation is smaller have no spikes behind them.
_LEAST_STD = 1e-10


def check_spikes(window: int, threshold: float) -> None:
    """Refuses settings under which nothing, or everything, would be a spike.

    Raises:
        TypeError, ValueError: Naming the setting.
    """
    require_integer("window", window, 2, f"{WINDOW} is usual.")
    require_number("threshold", threshold, above=0)


def spikes_in(values_n: Tensor, window: int = WINDOW, threshold: float = THRESHOLD) -> Tensor:
    """Which values of a series are spikes, bool [n]; computed in float64.

    Args:
        values_n: Loss or gradient norm of each step, [n].
        window: W.
        threshold: Standard deviations above the mean.

    Raises:
        ValueError: If it is no series, or a setting is out of range.
    """
    check_spikes(window, threshold)
    if values_n.ndim != 1:
        expected, do = "one value a step, [n]", "Give a single value as tensor([value])."
        raise value_error("values", found=f"shape {list(values_n.shape)}", expected=expected, do=do)
    values_n = values_n.detach().to("cpu" if values_n.device.type == "mps" else values_n.device, torch.float64)
    finite_n = values_n.isfinite()
    before_n = finite_n.cumsum(0) - finite_n.long()
    finite_m = values_n[finite_n]
    if len(finite_m) < window:
        return torch.zeros_like(finite_n)
    windows = finite_m.unfold(0, window, 1)  # [m - W + 1, W]; the one that ends before the i-th finite value is i - W
    std, mean = torch.std_mean(windows, dim=1, correction=0)
    limit = torch.where(std < _LEAST_STD, torch.inf, mean + threshold * std)
    known_n = before_n >= window
    limit_n = limit[(before_n - window).clamp_min(0)]
    return known_n & limit_n.isfinite() & (values_n > limit_n)


def spike_share(
    loss_n: Tensor, gradient_norm_n: Tensor | None = None, window: int = WINDOW, threshold: float = THRESHOLD
) -> Tensor:
    """SpikeScore of a run: the share of its steps at which the loss or the gradient norm is a spike.

    Args:
        loss_n: [n].
        gradient_norm_n: [n], before clipping; None: of the loss alone.
        window: W.
        threshold: Standard deviations above the mean.

    Returns:
        Float32 scalar; NaN for no steps.

    Raises:
        ValueError: If the lengths differ, or as `spikes_in`.

    Example:
        >>> loss = torch.arange(200) % 2 + 1.0
        >>> loss[150] = 9.0
        >>> spike_share(loss)
        tensor(0.0050)
    """
    spikes_n = spikes_in(loss_n, window, threshold)
    if gradient_norm_n is not None:
        if gradient_norm_n.shape != loss_n.shape:
            found = f"shapes {list(loss_n.shape)} and {list(gradient_norm_n.shape)}"
            do = "Give both for the same steps; NaN where one is missing."
            raise value_error("loss, gradient_norm", found=found, expected="the same length", do=do)
        spikes_n = spikes_n | spikes_in(gradient_norm_n, window, threshold)
    return spikes_n.double().mean().float()


class SpikeCount:
    """`spike_share` of a run that goes on, in plain numbers: one step at a time, some 20 microseconds each.

    Attributes:
        spikes, steps: So far.
    """

    def __init__(self, window: int = WINDOW, threshold: float = THRESHOLD) -> None:
        check_spikes(window, threshold)
        self.window, self.threshold = window, threshold
        self.spikes = self.steps = 0
        self._recent: dict[int, deque[float]] = {}

    def add(self, *values: float) -> bool:
        """Takes the values of one step, always in the same order (NaN: missing); whether one is a spike."""
        found = False
        for i, value in enumerate(values):
            recent = self._recent.setdefault(i, deque(maxlen=self.window))
            found = self._is_spike(value, recent) or found
            if math.isfinite(value):
                recent.append(value)
        self.steps += 1
        self.spikes += found
        return found

    def _is_spike(self, value: float, recent: deque[float]) -> bool:
        if len(recent) < self.window:
            return False
        mean = sum(recent) / self.window
        std = math.sqrt(sum([(x - mean) * (x - mean) for x in recent]) / self.window)
        return std >= _LEAST_STD and value > mean + self.threshold * std

    @property
    def share(self) -> float:
        """SpikeScore so far; NaN before there are as many steps as a window, when none could be found."""
        return self.spikes / self.steps if self.steps >= self.window else math.nan

    def state_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"spikes": self.spikes, "steps": self.steps, "recent": {i: [*r] for i, r in self._recent.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        self.spikes, self.steps = state["spikes"], state["steps"]
        self._recent = {i: deque(values, maxlen=self.window) for i, values in state["recent"].items()}
