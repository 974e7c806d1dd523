"""Activation diagnostics: the scale of a branch output and how heavy its tails are (docs/theory.md section 6).

Each metric can be computed in two ways: by a function of one tensor, and from a mergeable summary (`activation_summary`,
`merge_summaries`, `summary_metrics`) of a tensor that arrives in pieces, over several forward calls or ranks.

Shape legend: T tokens, d features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.diagnostics.blocks import block_elements, scratch

#: A summary's entries: elements, mean, 2nd to 4th central moments, largest magnitude, outliers.
SUMMARY_SIZE = 7
#: Of a variance in float32: an entry right at the threshold is no outlier.
_ROUNDING = 1e-6


def output_rms(x: Tensor) -> Tensor:
    """Root mean square over the whole tensor, as a float32 scalar. NaN when ``x`` is empty."""
    return x.float().square().mean().sqrt()


def max_over_rms(x: Tensor) -> Tensor:
    """Largest magnitude over the RMS, both of the whole tensor: 1 when all entries are equally large.

    Float32 scalar. NaN when ``x`` is empty or all zero.
    """
    if x.numel() == 0:
        return torch.full((), float("nan"), dtype=torch.float32, device=x.device)
    return x.float().abs().amax() / output_rms(x)


def kurtosis(x: Tensor) -> Tensor:
    """Fourth standardized moment of the whole tensor: 3 for a normal distribution, large with heavy tails.

    The mean and the variance are those of the whole tensor, not of each token, and nothing is subtracted (this is not
    the excess kurtosis). Float32 scalar. NaN when ``x`` is empty or constant.
    """
    centered = x.float() - x.float().mean()
    variance = centered.square().mean()
    return centered.square().square().mean() / variance.square()


def outlier_percent(x: Tensor, threshold: float = 5.0) -> Tensor:
    """Percentage of entries further than ``threshold`` standard deviations from their token's mean.

    Mean and (population) standard deviation are taken PER TOKEN over the features; the percentage is over the whole
    tensor. With d features no entry can be further than sqrt(d - 1) deviations away, so the default needs d > 26.

    Args:
        x: [..., d] activations.
        threshold: In standard deviations.

    Returns:
        Float32 scalar in [0, 100]. NaN when ``x`` is empty or an entry is not finite.

    Raises:
        ValueError: If ``x`` has no dimension.
    """
    x_Td = _as_tokens(x)
    if x_Td.numel() == 0:
        return torch.full((), float("nan"), dtype=torch.float32, device=x.device)
    return 100 * _outliers(x_Td.float(), threshold) / x_Td.numel()


def activation_summary(x: Tensor, threshold: float = 5.0, counts: Tensor | None = None) -> Tensor:
    """The statistics of ``x`` for `summary_metrics`, in a form that merges exactly.

    Central moments rather than power sums, because a mean much larger than the spread would cancel a float32 sum of
    fourth powers: first about each token's mean, from which those about the mean of all follow. A block of tokens at a time.

    Args:
        x: [..., d] activations.
        threshold: See `outlier_percent`.
        counts: [...], True for tokens that count (no padding); None: all do.

    Returns:
        Float32 [7]: elements, mean, 2nd, 3rd and 4th central moments, max|x|, outlier entries. Zeros when empty.

    Raises:
        ValueError: If ``x`` has no dimension.
    """
    x_Td = _as_tokens(x.detach())
    if x_Td.numel() == 0:
        return torch.zeros(SUMMARY_SIZE, dtype=torch.float32, device=x.device)
    step = max(1, block_elements(x.device) // x_Td.shape[1])
    blocks = [_of_tokens(block_Td.float(), threshold) for block_Td in x_Td.split(step)]
    tokens_6T = torch.cat(blocks, dim=1)
    tokens = torch.full((), float(len(x_Td)), dtype=torch.float32, device=x.device)
    if counts is not None:
        seen_T = counts.reshape(-1).bool()
        tokens_6T, tokens = torch.where(seen_T, tokens_6T, 0.0), seen_T.sum().float()
    mean_T, m2_T, m3_T, m4_T, largest_T, outliers_T = tokens_6T
    mean = mean_T.sum() / tokens.clamp(min=1)
    about = torch.stack([torch.ones_like(m2_T), mean_T, m2_T, m3_T, m4_T, largest_T, outliers_T])
    moments_3T = _moments_about(about, mean_T - mean)
    if counts is not None:
        moments_3T = torch.where(seen_T, moments_3T, 0.0)
    first = torch.stack([tokens * x_Td.shape[1], mean])
    last = torch.stack([largest_T.amax(), outliers_T.sum()])
    return torch.cat([first, moments_3T.sum(1) / tokens.clamp(min=1), last])


def merge_summaries(a: Tensor, b: Tensor) -> Tensor:
    """The summary [7] of two tensors together, from the summary [7] of each, of the same dtype; zeros are neutral."""
    n = a[0] + b[0]
    weight_a, weight_b = a[0] / n.clamp(min=1), b[0] / n.clamp(min=1)
    gap = b[1] - a[1]
    moments_a, moments_b = _moments_about(a, -weight_b * gap), _moments_about(b, weight_a * gap)
    merged = weight_a * moments_a + weight_b * moments_b
    mean = a[1] + weight_b * gap
    return torch.cat([torch.stack([n, mean]), merged, torch.maximum(a[5:6], b[5:6]), a[6:7] + b[6:7]])


def summary_metrics(summary: Tensor) -> dict[str, Tensor]:
    """The metrics of this file, from a summary [7].

    Returns:
        Scalars in the summary's dtype under the keys ``rms``, ``outlier_percent``, ``max_over_rms`` and ``kurtosis``,
        each equal to the function of that name. NaN when the summary is empty.
    """
    n, mean, m2, _, m4, largest, outliers = summary.unbind()
    rms = torch.where(n > 0, m2 + mean.square(), float("nan")).sqrt()
    return {
        "rms": rms,
        "outlier_percent": 100 * outliers / n,
        "max_over_rms": largest / rms,
        "kurtosis": m4 / m2.square(),
    }


def _moments_about(summary: Tensor, shift: Tensor) -> Tensor:
    """[3] 2nd to 4th moments of ``x - mean + shift``, by the binomial expansion; [3, T] of [7, T] and [T]."""
    _, _, m2, m3, m4, _, _ = summary.unbind()
    square = shift.square()
    return torch.stack(
        [m2 + square, m3 + 3 * shift * m2 + shift * square, m4 + 4 * shift * m3 + 6 * square * m2 + square.square()]
    )


def _outliers(x_Td: Tensor, threshold: float) -> Tensor:
    """Number of outlier entries; NaN where a token is not finite, since comparisons with NaN are false."""
    return _of_tokens(x_Td, threshold)[5].sum()


@torch.no_grad()
def _of_tokens(x_Td: Tensor, threshold: float) -> Tensor:
    """[6, T]: of each token mean, 2nd to 4th central moments, max|x| and outlier entries."""
    mean_T1 = x_Td.mean(-1, keepdim=True)
    centered_Td, square_Td = scratch(2 * x_Td.numel(), x_Td.device).view(2, *x_Td.shape)
    torch.sub(x_Td, mean_T1, out=centered_Td)
    torch.mul(centered_Td, centered_Td, out=square_Td)
    m2_T1 = square_Td.mean(-1, keepdim=True)
    m3_T = centered_Td.mul_(square_Td).mean(-1)
    beyond = threshold**2 * (1 + _ROUNDING)
    count_T = torch.gt(square_Td, beyond * m2_T1, out=centered_Td).sum(-1)
    m2_T = m2_T1.squeeze(-1)
    outliers_T = torch.where(m2_T.isfinite(), count_T, float("nan"))
    m4_T = square_Td.mul_(square_Td).mean(-1)
    largest_T = torch.maximum(x_Td.amax(-1), -x_Td.amin(-1))
    return torch.stack([mean_T1.squeeze(-1), m2_T, m3_T, m4_T, largest_T, outliers_T])


def _as_tokens(x: Tensor) -> Tensor:
    if x.ndim == 0:
        raise value_error("x", found="a scalar", expected="shape [..., features]", do="Pass the branch output itself.")
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
