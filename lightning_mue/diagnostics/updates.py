"""Update diagnostics: how far one optimizer step moved a weight (docs/theory.md section 6).

A weight may be huge, sharded or a stack of experts, so it is measured on a fixed sample of its elements, spread evenly
over the whole tensor; the sums of several shards (ranks) simply add up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: A summary's entries: elements; sums of squared changes, of squared weights before the step, of weight x change.
UPDATE_SIZE = 4


def even_sample(x: Tensor, max_elements: int) -> Tensor:
    """At most ``max_elements`` elements at equal distances over the whole tensor, the same ones at every call.

    The distance has no factor in common with the last dimension, so that no column is left out.

    Args:
        x: Any shape, plain (the local shard of a DTensor).
        max_elements: At least 1.

    Returns:
        1-D copy in the dtype of ``x``: all elements if they are few enough, else somewhat fewer than ``max_elements``.
    """
    x = _in_memory_order(x.detach())
    flat = x.reshape(-1)
    distance = max(1, -(-flat.numel() // max_elements))
    while x.ndim > 1 and math.gcd(distance, x.shape[-1]) > 1:
        distance += 1
    return flat[::distance].clone()


def update_summary(before: Tensor, after: Tensor) -> Tensor:
    """The statistics of one step for the functions below, in a form that adds up over shards and ranks.

    Args:
        before: Weights (or a sample of them) before the step, any shape and floating dtype.
        after: The same ones after it.

    Returns:
        Float32 [4]: elements; sums of squared changes, of squared weights before, and of weight x change. Zeros when empty.
    """
    before = before.detach().float().flatten()
    change = after.detach().float().flatten() - before
    elements = torch.full((), float(before.numel()), dtype=torch.float32, device=before.device)
    return torch.stack([elements, change.square().sum(), before.square().sum(), (before * change).sum()])


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


def angular_step(summary: Tensor) -> Tensor:
    """Angle between the weight before and after the step, in radians, in the summary's dtype.

    With W the weight, D its change and D' the part of D orthogonal to W: ``atan2(|D'|, |W| + W.D / |W|)``. Unlike the
    arccosine of the cosine, this keeps its digits where the angle is small. It sees turning alone: a change that only rescales
    the weight (weight decay) has the angle 0.

    NaN for a weight that is empty or was all zero.
    """
    _, change, weight, product = summary.unbind()
    orthogonal = (change - product.square() / weight).clamp(min=0)
    return torch.where(
        weight > 0, torch.atan2(orthogonal.sqrt(), weight.sqrt() + product / weight.sqrt()), float("nan")
    )


def small_second_moments(square: Tensor, threshold: Tensor | float) -> Tensor:
    """Counts second moments of Adam that its eps outweighs: ``0 < v <= threshold``.

    Adam divides by ``sqrt(v / (1 - beta2^t)) + eps``. With ``threshold = eps^2 (1 - beta2^t)`` these are the entries whose step
    is at most half as long as it would be without eps. Entries that never had a gradient (v = 0) do not move and are left out.

    Args:
        square: Adam's running average v of squared gradients (or a sample of it), any shape.
        threshold: A number, or a scalar tensor.

    Returns:
        Float32 [2]: how many are outweighed, how many are above zero.
    """
    square = square.detach().float()
    above = square > 0
    return torch.stack([(above & (square <= threshold)).sum(), above.sum()]).float()


def gradient_noise(small: float, large: float, small_batch: float, large_batch: float) -> tuple[float, float]:
    """Unbiased estimates of the squared true gradient and of the noise, from gradients of two batch sizes.

    The expected square of a batch's mean gradient is ``|G|^2 + tr(Sigma) / B``, with G the true gradient and Sigma the
    covariance of one sample's gradient; two batch sizes give both (arXiv:1812.06162, appendix A.1). Their ratio ``tr(Sigma) /
    |G|^2`` is the simple noise scale, in samples. It is biased where the two are noisy: average them over steps first.

    Args:
        small: Squared norm (or mean square) of the gradient of a batch of ``small_batch`` samples; averaged over several, if so.
        large: The same for ``large_batch`` samples.
        small_batch: Samples.
        large_batch: Samples, more than ``small_batch``.

    Returns:
        ``|G|^2`` and ``tr(Sigma)``, in the unit of the squares; either may come out negative where it is small.
    """
    true = (large_batch * large - small_batch * small) / (large_batch - small_batch)
    return true, (small - large) / (1 / small_batch - 1 / large_batch)


def _in_memory_order(x: Tensor) -> Tensor:
    """A view whose dimensions are in the order of the memory, where that makes it contiguous: no copy of the whole is needed."""
    if x.is_contiguous():
        return x
    strides = x.stride()
    view = x.permute(sorted(range(x.ndim), key=lambda dim: -strides[dim]))
    return view if view.is_contiguous() else x
