"""Update diagnostics: how far one optimizer step moved a weight (docs/theory.md section 6).

A weight may be huge, sharded or a stack of experts, so it is measured on a fixed sample of its elements, spread evenly
over the whole tensor; the sums of several shards (ranks) simply add up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: A summary's entries: elements, sum of squared changes, sum of squared weights before the step.
UPDATE_SIZE = 3


def even_sample(x: Tensor, max_elements: int) -> Tensor:
    """At most ``max_elements`` elements at equal distances over the whole tensor, the same ones at every call.

    The distance has no factor in common with the last dimension, so that no column is left out.

    Args:
        x: Any shape, plain (the local shard of a DTensor).
        max_elements: At least 1.

    Returns:
        1-D copy in the dtype of ``x``: all elements if they are few enough, else somewhat fewer than ``max_elements``.
    """
    flat = x.detach().reshape(-1)
    distance = max(1, -(-flat.numel() // max_elements))
    while x.ndim > 1 and math.gcd(distance, x.shape[-1]) > 1:
        distance += 1
    return flat[::distance].clone()


def update_summary(before: Tensor, after: Tensor) -> Tensor:
    """The statistics of one step for `update_rms` and `weight_rms`, in a form that adds up over shards and ranks.

    Args:
        before: Weights (or a sample of them) before the step, any shape and floating dtype.
        after: The same ones after it.

    Returns:
        Float32 [3]: elements, sum of squared changes, sum of squared weights before. Zeros when empty.
    """
    before = before.detach().float()
    change = after.detach().float() - before
    elements = torch.full((), float(before.numel()), device=before.device)
    return torch.stack([elements, change.square().sum(), before.square().sum()])


def update_rms(summary: Tensor) -> Tensor:
    """RMS of the change of a weight in one step. NaN when the summary is empty."""
    return (summary[1] / summary[0]).sqrt()


def weight_rms(summary: Tensor) -> Tensor:
    """RMS of the weight before the step. NaN when the summary is empty."""
    return (summary[2] / summary[0]).sqrt()


def update_ratio(before: Tensor, after: Tensor) -> Tensor:
    """Update RMS ratio ``rms(W_{t+1} - W_t) / rms(W_t)``, float32 scalar (docs/theory.md section 6).

    Infinite for a weight that was all zero; NaN when it is empty or did not move from zero.
    """
    summary = update_summary(before, after)
    return update_rms(summary) / weight_rms(summary)
