"""Activation diagnostics: the scale of a branch output and how heavy its tails are (docs/theory.md section 6).

Each metric can be computed in two ways: by a function of one tensor, and from a mergeable summary (`activation_summary`,
`merge_summaries`, `summary_metrics`) of a tensor that arrives in pieces, over several forward calls or ranks.

Shape legend: T tokens, d features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mue.checks import value_error

#: Elements of the largest float32 temporary (64 MiB).
CHUNK_ELEMENTS = 1 << 24
#: A summary's entries: elements, mean, 2nd to 4th central moments, largest magnitude, outliers.
SUMMARY_SIZE = 7


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


def activation_summary(x: Tensor, threshold: float = 5.0) -> Tensor:
    """The statistics of ``x`` for `summary_metrics`, in a form that merges exactly.

    Central moments rather than power sums, because a mean much larger than the spread would cancel a float32 sum of
    fourth powers. Works on chunks of tokens, so that the float32 temporaries stay small.

    Args:
        x: [..., d] activations.
        threshold: See `outlier_percent`.

    Returns:
        Float32 [7]: elements, mean, 2nd, 3rd and 4th central moments, max|x|, outlier entries. Zeros when empty.

    Raises:
        ValueError: If ``x`` has no dimension.
    """
    x_Td = _as_tokens(x)
    summary = torch.zeros(SUMMARY_SIZE, dtype=torch.float32, device=x.device)
    if x_Td.numel() == 0:
        return summary
    for chunk_Td in x_Td.split(max(1, CHUNK_ELEMENTS // x_Td.shape[1])):
        chunk_Td = chunk_Td.float()
        mean = chunk_Td.mean()
        centered_Td = chunk_Td - mean
        square_Td = centered_Td.square()
        moments = [square_Td.mean(), (square_Td * centered_Td).mean(), square_Td.square().mean()]
        elements = torch.full_like(mean, chunk_Td.numel())
        tails = [chunk_Td.abs().amax(), _outliers(chunk_Td, threshold)]
        summary = merge_summaries(summary, torch.stack([elements, mean, *moments, *tails]))
    return summary


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
    """[3] 2nd to 4th moments of ``x - mean + shift``, by the binomial expansion."""
    _, _, m2, m3, m4, _, _ = summary.unbind()
    square = shift.square()
    return torch.stack(
        [m2 + square, m3 + 3 * shift * m2 + shift * square, m4 + 4 * shift * m3 + 6 * square * m2 + square.square()]
    )


def _outliers(x_Td: Tensor, threshold: float) -> Tensor:
    """Number of outlier entries; NaN where a token is not finite, since comparisons with NaN are false."""
    variance_T1, mean_T1 = torch.var_mean(x_Td, dim=-1, correction=0, keepdim=True)
    count_T1 = ((x_Td - mean_T1).abs() > threshold * variance_T1.sqrt()).sum(dim=-1, keepdim=True)
    return torch.where(variance_T1.isfinite(), count_T1.float(), float("nan")).sum()


def _as_tokens(x: Tensor) -> Tensor:
    if x.ndim == 0:
        raise value_error("x", found="a scalar", expected="shape [..., features]", do="Pass the branch output itself.")
    return x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
