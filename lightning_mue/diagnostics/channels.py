"""Massive activations: which channels of an activation are far larger than its typical entry (docs/theory.md section 6).

Shape legend: T tokens, d channels (the last dimension), K channels kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.diagnostics.blocks import block_elements, scratch

#: Channels kept: those with the largest magnitudes. More are rarely massive; these merge exactly.
KEPT = 8
#: Entries of a summary: elements, sum of magnitudes, then the K largest channels' maxima, and their indices.
CHANNELS_SIZE = 2 + 2 * KEPT


def channel_summary(x: Tensor, counts: Tensor | None = None) -> Tensor:
    """The statistics of ``x`` for `channel_metrics`, in a form that merges exactly.

    Args:
        x: [..., d] activations.
        counts: [...], True for tokens that count (no padding); None: all do.

    Returns:
        Float32 [18]: elements, sum of |x|, the largest magnitudes of the 8 largest channels, descending, and these channels'
        indices. Zeros when empty.

    Raises:
        ValueError: If ``x`` has no dimension.
    """
    if x.ndim == 0:
        raise value_error("x", found="a scalar", expected="shape [..., channels]", do="Pass the activation itself.")
    x_Td = x.detach().reshape(-1, x.shape[-1])
    if x_Td.numel() == 0:
        return torch.zeros(CHANNELS_SIZE, dtype=torch.float32, device=x.device)
    largest_d, total = None, torch.zeros((), dtype=torch.float32, device=x.device)
    step = max(1, block_elements(x.device) // x_Td.shape[1])
    tokens = float(len(x_Td)) if counts is None else counts.sum()
    seen_T1 = None if counts is None else counts.reshape(-1, 1).bool()
    for start in range(0, len(x_Td), step):
        block_Td = x_Td[start : start + step]
        size_Td = torch.abs(block_Td.float(), out=scratch(block_Td.numel(), x.device).view_as(block_Td))
        if seen_T1 is not None:
            size_Td.masked_fill_(~seen_T1[start : start + step], 0.0)
        total = total + size_Td.sum()
        block_d = size_Td.amax(0)
        largest_d = block_d if largest_d is None else torch.maximum(largest_d, block_d)
    assert largest_d is not None
    values, channels = largest_d.topk(min(KEPT, len(largest_d)))
    summary = torch.zeros(CHANNELS_SIZE, dtype=torch.float32, device=x.device)
    summary[0], summary[1] = tokens * x_Td.shape[1], total
    summary[2 : 2 + len(values)], summary[2 + KEPT : 2 + KEPT + len(values)] = values, channels.float()
    return summary


def merge_channels(a: Tensor, b: Tensor) -> Tensor:
    """The summary [18] of two tensors together; zeros are neutral.

    Exact: a channel that is among the 8 largest of both together is so where it has its largest magnitude.
    """
    values = torch.cat([a[2 : 2 + KEPT], b[2 : 2 + KEPT]])
    channels = torch.cat([a[2 + KEPT :], b[2 + KEPT :]])
    order = torch.arange(2 * KEPT, device=a.device)
    larger = (values[:, None] < values[None]) | ((values[:, None] == values[None]) & (order[:, None] > order[None]))
    twice = ((channels[:, None] == channels[None]) & larger).any(1)  # the same channel, with a smaller maximum
    kept, at = torch.where(twice, -1.0, values).topk(KEPT)
    return torch.cat([a[:2] + b[:2], kept.clamp(min=0), torch.where(kept >= 0, channels[at], 0.0)])


def channel_metrics(summary: Tensor, factor: float = 100.0) -> dict[str, Tensor]:
    """From a summary [18], scalars of its dtype: which channels are massive.

    Returns:
        ``massive_channels``: how many of the 8 largest channels have an entry above ``factor`` times the mean magnitude (the
        mean, because a median does not merge exactly; of normal entries it is 1.18 medians). ``largest_channel``: the index of
        the channel with the largest entry. NaN when the summary is empty.
    """
    typical = summary[1] / summary[0]
    count = (summary[2 : 2 + KEPT] > factor * typical).sum().to(summary.dtype)
    nan = torch.full_like(count, float("nan"))
    finite = typical.isfinite()
    return {
        "massive_channels": torch.where(finite, count, nan),
        "largest_channel": torch.where(finite, summary[2 + KEPT], nan),
    }


def massive_channels(summary: Tensor, factor: float = 100.0) -> list[int]:
    """The indices of the massive channels of a summary [18], the largest first (waits for the device)."""
    massive = summary[2 : 2 + KEPT] > factor * summary[1] / summary[0]
    return [int(channel) for channel in summary[2 + KEPT :][massive].tolist()]
