"""The decision about an optimizer step, made on the device from the figures of all ranks, and its form on the host.

Shape legend: R ranks, F figures of a rank, S = 2 series (loss, norm of the gradients), W values of a window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mue.callbacks.guard.settings import GRADIENT, LOSS, GuardSettings
from lightning_mue.diagnostics.spikes import cusum, new_cusum, push, spike_score

SERIES = (LOSS, GRADIENT)
#: Least robust standard deviation: 2 % of the median for the loss, 0.1 for the logarithm of the gradient norm. (Norms have long
#: tails upward; their logarithms hardly.) At the default score of 10 a loss 20 % above the median and a gradient of e times
#: its size are the smallest spikes.
FLOORS, LEAST = (0.02, 0.0), (1e-30, 0.1)


class Verdict(NamedTuple):
    """What was decided about one step, as numbers of the host.

    Attributes:
        skip: 1 if the step is not taken.
        bad_loss, bad_gradient: Number of ranks on which these are not finite.
        rank: The first rank on which one of them is not, else -1.
        values: Loss and gradient norm.
        scores, medians: Of both series; NaN without enough history.
        drifts: The sums of both series.
        alarm, alarm_value: What a rank found amiss among its indicators: its number from 1 on, 0 for nothing; the value.
        losses, gradients: Number of both, over all ranks.
    """

    skip: float
    bad_loss: float
    bad_gradient: float
    rank: float
    values: tuple[float, float]
    scores: tuple[float, float]
    medians: tuple[float, float]
    drifts: tuple[float, float]
    alarm: float
    alarm_value: float
    losses: float
    gradients: float

    @classmethod
    def of(cls, record: list[float]) -> Verdict:
        """From the record that `Judge.decide` made."""
        skip, bad_loss, bad_gradient, rank, alarm, value, losses, gradients, *series = record
        values, scores, medians, drifts = ((series[i], series[i + 1]) for i in range(0, len(series), 2))
        return cls(skip, bad_loss, bad_gradient, rank, values, scores, medians, drifts, alarm, value, losses, gradients)

    @property
    def finite(self) -> bool:
        """Whether losses and gradients of all ranks are finite."""
        return not (self.bad_loss or self.bad_gradient)


class Judge:
    """Decides about the steps of one optimizer; its series and sums are tensors on the device."""

    def __init__(self, settings: GuardSettings, drifting: tuple[bool, bool], device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.window_SW = torch.full((2, settings.window), torch.nan, device=device)
        self.sums_S3 = new_cusum(2, device)
        self._floor_S, self._least_S = (torch.tensor(each, device=device) for each in (FLOORS, LEAST))
        #: A sum that is not asked for stays at zero.
        self._drifting_S1 = torch.tensor(drifting, device=device).unsqueeze(-1)

    @torch.no_grad()
    def decide(self, ranks_RF: Tensor) -> Tensor:
        """The record of a step, float32, in the order of `Verdict.of`; nothing is read on the host."""
        loss_R, losses_R, square_R, gradients_R, alarm_R, alarm_value_R = ranks_RF.unbind(-1)
        losses, gradients = losses_R.sum(), gradients_R.sum()
        loss = torch.where(losses > 0, loss_R.sum() / (losses_R > 0).sum(), torch.nan)
        norm = torch.where(gradients > 0, square_R.sum().sqrt(), torch.nan)
        bad_loss_R, bad_gradient_R = ~loss_R.isfinite(), ~square_R.isfinite()
        bad_R = bad_loss_R | bad_gradient_R
        nonfinite = bad_R.any()
        values_S = torch.stack([loss, norm.log()])
        floors = {"floor": self._floor_S, "least": self._least_S}
        found = spike_score(values_S, self.window_SW, min_history=self.settings.min_history, **floors)
        sums_S3 = cusum(values_S, self.window_SW, self.sums_S3, min_history=self.settings.min_history, **floors)
        self.sums_S3 = torch.where(self._drifting_S1 & ~nonfinite, sums_S3, self.sums_S3)
        self.window_SW = torch.where(nonfinite, self.window_SW, push(values_S, self.window_SW))
        drifts_S = self.sums_S3[:, 0]
        # An alarm is given once: the sum begins anew.
        self.sums_S3 = self.sums_S3.masked_fill((drifts_S > self.settings.drift_sum).unsqueeze(-1), 0.0)
        spike = (found.score > self.settings.spike_score).any()
        skip = (nonfinite & self._skips(self.settings.nonfinite)) | (spike & self._skips(self.settings.spike))
        first = torch.where(nonfinite, bad_R.float().argmax().float(), -1.0)
        alarming = alarm_R.argmax()
        head = [skip, bad_loss_R.sum(), bad_gradient_R.sum(), first, alarm_R[alarming], alarm_value_R[alarming]]
        head = [each.float() for each in (*head, losses, gradients)]
        medians = [found.median[0], found.median[1].exp()]
        return torch.cat([torch.stack([*head, loss, norm]), found.score, torch.stack(medians), drifts_S])

    @staticmethod
    def _skips(action: str | None) -> bool:
        return action not in (None, "warn")

    def state_dict(self) -> dict[str, Any]:
        """Series and sums, on the CPU."""
        return {"window": self.window_SW.cpu().clone(), "sums": self.sums_S3.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores series and sums; of a longer window its end, of a shorter one all."""
        width = min(self.window_SW.shape[1], state["window"].shape[1])
        self.window_SW = torch.full_like(self.window_SW, torch.nan)
        self.window_SW[:, -width:] = state["window"][:, -width:].to(self.device)
        self.sums_S3 = state["sums"].to(self.device)
