"""Robust scores of a series of values: how far a value stands out of the last ones (spikes), and whether they creep (drift).

Shape legend: S series, W values of a window, oldest first; NaN where there is no value yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: The standard deviation of a normal distribution over its median absolute deviation.
MAD_TO_STD = 1.4826


class RobustScore(NamedTuple):
    """How far values stand out of their windows.

    Attributes:
        score: Distance from the median in robust standard deviations, float32 [S]; NaN where the history is too short.
        median: Of the window, float32 [S]; NaN where it is empty.
        scale: The robust standard deviation that was used, float32 [S].
    """

    score: Tensor
    median: Tensor
    scale: Tensor


def spike_score(
    values_S: Tensor,
    window_SW: Tensor,
    *,
    min_history: int | Tensor = 64,
    floor: float | Tensor = 0.02,
    least: float | Tensor = 1e-30,
) -> RobustScore:
    """Distance of each value from the median of its window, in units of the window's median absolute deviation (MAD).

    Median and MAD stay as they are while less than half of a window is outliers, where one large value ruins a mean and
    a standard deviation (Hampel, "The influence curve and its role in robust estimation", 1974). Nothing is read on the
    host.

    Args:
        values_S: The new values, [S]. A value that is not finite scores NaN: it is no spike but a fault of its own.
        window_SW: The values before, [S, W].
        min_history: Values that a window must have; with fewer the score is NaN. A number or [S].
        floor: Least scale, as a fraction of the median's size: a series that hardly varies must not turn every
            small change into a spike. A number or [S].
        least: Least scale as a number of its own, for series whose size means nothing, such as logarithms. A number or [S].

    Returns:
        Score, median and scale, float32 [S] each. Of an even number of values the median is the lower middle one.

    Example:
        >>> window = torch.tensor([[2.0, 2.2, 1.8, 2.1, 1.9]])
        >>> round(float(spike_score(torch.tensor([4.0]), window, min_history=5).score), 1)
        13.5
    """
    window_SW = window_SW.float()
    median_S = window_SW.nanmedian(dim=-1).values
    mad_S = (window_SW - median_S.unsqueeze(-1)).abs().nanmedian(dim=-1).values
    least_S = torch.as_tensor(least, dtype=torch.float32, device=window_SW.device)
    scale_S = torch.maximum(torch.maximum(MAD_TO_STD * mad_S, floor * median_S.abs()), least_S)
    score_S = (values_S.float() - median_S) / scale_S
    counts_S = window_SW.isfinite().sum(-1)
    known_S = (counts_S >= min_history) & values_S.isfinite()
    return RobustScore(torch.where(known_S, score_S, torch.nan), median_S, scale_S)


def push(values_S: Tensor, window_SW: Tensor) -> Tensor:
    """The window with the new values at its end, [S, W]; a series whose value is not finite keeps its window."""
    values_S1 = values_S.to(window_SW.dtype).unsqueeze(-1)
    return torch.where(values_S1.isfinite(), torch.cat([window_SW[:, 1:], values_S1], dim=-1), window_SW)


def new_cusum(n_series: int, device: torch.device | str = "cpu") -> Tensor:
    """The state of `cusum` before the first value, float32 [S, 3]: sum, and the median and scale that it is held against."""
    return torch.zeros(n_series, 3, dtype=torch.float32, device=device)


def cusum(
    values_S: Tensor,
    window_SW: Tensor,
    state_S3: Tensor,
    *,
    min_history: int = 64,
    floor: float | Tensor = 0.02,
    least: float | Tensor = 1e-30,
    slack: float = 1.5,
    cap: float = 4.0,
) -> Tensor:
    """One step of a one-sided cumulative sum, which a slow rise raises although no value of it stands out.

    ``sum <- max(0, sum + min(z, cap) - slack)``, with z the value's distance from a median in robust standard deviations
    (Page, "Continuous inspection schemes", 1954): the median of the older half of the window, because a steady rise is never
    far above that of the whole. When the sum leaves zero, it keeps the median and scale of then until it returns.

    Args:
        values_S: The new values, [S].
        window_SW: The values before, [S, W].
        state_S3: The state, from `new_cusum` or the last call.
        min_history: Values that the older half must have: half of this number.
        floor: As of `spike_score`.
        least: As of `spike_score`.
        slack: Part of a standard deviation that is no rise. The longer the tail of the noise, the more it takes.
        cap: Most that one value adds: a spike alone is no drift.

    Returns:
        The new state, float32 [S, 3]; the old one for a series without enough history, or a value that is not finite.
    """
    history = (min_history + 1) // 2
    found = spike_score(values_S, older_half(window_SW), min_history=history, floor=floor, least=least)
    return advance(values_S, found, state_S3, slack=slack, cap=cap)


def older_half(window_SW: Tensor) -> Tensor:
    """The window with NaN in place of the newer half, [S, W]."""
    older = (window_SW.shape[1] + 1) // 2
    return torch.nn.functional.pad(window_SW[:, :older], (0, window_SW.shape[1] - older), value=float("nan"))


def advance(values_S: Tensor, found: RobustScore, state_S3: Tensor, *, slack: float = 1.5, cap: float = 4.0) -> Tensor:
    """The step of `cusum`, from the scores against the older half."""
    sum_S, median_S, scale_S = state_S3.unbind(-1)
    starts_S = sum_S <= 0
    median_S, scale_S = torch.where(starts_S, found.median, median_S), torch.where(starts_S, found.scale, scale_S)
    z_S = ((values_S - median_S) / scale_S).clamp(max=cap)
    new_S3 = torch.stack([(sum_S + z_S - slack).clamp_min(0), median_S, scale_S], dim=-1)
    return torch.where(found.score.isnan().unsqueeze(-1), state_S3, new_S3)
