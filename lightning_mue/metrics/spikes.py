"""SpikeScore as a metric. Definition: `lightning_mue.diagnostics.spike_share`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.diagnostics.spike_share import THRESHOLD, WINDOW, check_spikes, spikes_in
from lightning_mue.metrics.base import DiagnosticMetric


def _series(values: Tensor | float) -> Tensor:
    return torch.atleast_1d(torch.as_tensor(values, dtype=torch.float64, device="cpu").detach())


def _own(windows_N2W: Tensor) -> Tensor:
    """The own window, which `merge_state` puts last: it serves the next values of one series, and no sum."""
    return windows_N2W[-1]


class SpikeScore(DiagnosticMetric):
    """Share of the steps whose loss or gradient norm is a spike (`lightning_mue.diagnostics.spike_share`).

    The steps of one series, in their order: `reset` forgets also what the next step would be held against. Over ranks, and by
    `merge_state`, spikes and steps are added up; each rank finds spikes in its own series.

    Args:
        window: Values before, of which mean and standard deviation are taken.
        threshold: Standard deviations above the mean from which on a value is a spike.
        **kwargs: Those of `torchmetrics.Metric`.

    Example:
        >>> metric = SpikeScore()
        >>> for step in range(160):
        ...     metric.update(2.0 + step % 2, gradient_norm=100.0 if step == 150 else 1.0 + step % 2)
        >>> metric.compute()  # 1 of 160
        tensor(0.0063)
    """

    higher_is_better = False

    def __init__(self, window: int = WINDOW, threshold: float = THRESHOLD, **kwargs: Any) -> None:
        check_spikes(window, threshold)
        super().__init__(**kwargs)
        self.window, self.threshold = int(window), float(threshold)
        settings = f"{self.window}_{self.threshold!r}".replace(".", "_")
        self._recent, self._spikes, self._steps = (f"{name}_{settings}" for name in ("recent", "spikes", "steps"))
        self.add_sum(self._recent, (2, self.window), merge=_own)
        self.add_count(self._spikes)
        self.add_count(self._steps)
        #: Of a window of zeros, which is what a state begins with, those that are values: [2].
        self._known = f"known_{settings}"
        self.add_sum(self._known, (2,), merge=_own)

    def update(self, loss: Tensor | float, gradient_norm: Tensor | float | None = None) -> None:
        """Takes in one step, or several in their order.

        Args:
            loss: A number, or [n].
            gradient_norm: The same, before clipping; None where there is none.

        Raises:
            ValueError: If the two have different lengths, or more than one dimension.
        """
        loss_n = _series(loss)
        norm_n = torch.full_like(loss_n, torch.nan) if gradient_norm is None else _series(gradient_norm)
        if loss_n.ndim != 1 or norm_n.shape != loss_n.shape:
            found = f"shapes {list(loss_n.shape)} and {list(norm_n.shape)}"
            do = "Leave gradient_norm out, or give NaN where one is missing."
            raise value_error("loss, gradient_norm", found=found, expected="numbers, or [n] for the same steps", do=do)
        spikes_n = torch.zeros_like(loss_n, dtype=torch.bool)
        recent_2W, known_2 = getattr(self, self._recent).clone(), getattr(self, self._known).clone()
        for i, new_n in enumerate((loss_n, norm_n)):
            known = int(known_2[i])
            series = torch.cat([recent_2W[i, self.window - known :], new_n.to(recent_2W)])
            spikes_n |= spikes_in(series, self.window, self.threshold)[known:].to(spikes_n.device)
            kept = series[series.isfinite()][-self.window :]
            recent_2W[i, self.window - len(kept) :], known_2[i] = kept, len(kept)
        setattr(self, self._recent, recent_2W)
        setattr(self, self._known, known_2)
        setattr(self, self._spikes, getattr(self, self._spikes) + spikes_n.sum())
        setattr(self, self._steps, getattr(self, self._steps) + len(loss_n))

    def compute(self) -> Tensor:
        """The share, float32 scalar; NaN for no steps."""
        return (getattr(self, self._spikes).double() / getattr(self, self._steps)).float()
