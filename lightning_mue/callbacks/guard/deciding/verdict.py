"""The decision about an optimizer step, made on the device from the figures of all ranks, and its form on the host.

Shape legend: R ranks, F figures of a rank, S = 2 series (loss, norm of the gradients), W values of a window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_mue.callbacks.guard.settings import GRADIENT, LOSS, GuardSettings
from lightning_mue.diagnostics.spikes import RobustScore, advance, new_cusum, older_half, push, spike_score

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
        history = [settings.min_history] * 2 + [(settings.min_history + 1) // 2] * 2
        self._history_2S = torch.tensor(history, device=device)
        self._floor_2S, self._least_2S = (torch.tensor(each * 2, device=device) for each in (FLOORS, LEAST))
        #: A sum that is not asked for stays at zero.
        self._drifting_S1 = torch.tensor(drifting, device=device).unsqueeze(-1)

    @torch.no_grad()
    def decide(self, ranks_RF: Tensor) -> Tensor:
        """The record of a step, float32, in the order of `Verdict.of`; nothing is read on the host."""
        finite_R2 = ranks_RF[:, 0:3:2].isfinite()  # loss and square
        totals_F, bad_R = ranks_RF.sum(0), ~finite_R2.all(1)
        nonfinite = bad_R.any()
        # NaN where there are no losses, and a logarithm that is not finite where there are no gradients.
        loss, norm = totals_F[0] / (ranks_RF[:, 1] > 0).sum(), totals_F[2].sqrt()
        values_S = torch.stack([loss, norm.log()])
        # Against the window, and against its older half: one call for both.
        both = torch.cat([self.window_SW, older_half(self.window_SW)])
        scored = spike_score(
            values_S.repeat(2), both, min_history=self._history_2S, floor=self._floor_2S, least=self._least_2S
        )
        found, older = (RobustScore(*(each[part] for each in scored)) for part in (slice(0, 2), slice(2, 4)))
        moves = self._drifting_S1 & ~nonfinite
        self.sums_S3 = torch.where(moves, advance(values_S, older, self.sums_S3), self.sums_S3)
        self.window_SW = torch.where(nonfinite, self.window_SW, push(values_S, self.window_SW))
        drifts_S = self.sums_S3[:, 0]
        # An alarm is given once: the sum begins anew.
        self.sums_S3 = self.sums_S3.masked_fill((drifts_S > self.settings.drift_sum).unsqueeze(-1), 0.0)
        spike = (found.score > self.settings.spike_score).any()
        skip = (nonfinite & self._skips(self.settings.nonfinite)) | (spike & self._skips(self.settings.spike))
        first = torch.where(nonfinite, bad_R.float().argmax().float(), -1.0)
        alarm_2 = ranks_RF[ranks_RF[:, 4].argmax(), 4:6]
        head = torch.stack([skip.float(), *(~finite_R2).sum(0).float(), first, *alarm_2, totals_F[1], totals_F[3]])
        medians = [found.median[0], found.median[1].exp()]
        return torch.cat([head, torch.stack([loss, norm]), found.score, torch.stack(medians), drifts_S])

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
