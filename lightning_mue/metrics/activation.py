"""Metrics of a branch output: its scale and how heavy its tails are. Definitions: docs/theory.md section 6.

All four read one mergeable summary: in a `MetricCollection` they share it, and the activations are read once.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_mue.checks import mismatch, require_number
from lightning_mue.diagnostics import activation_summary, merge_summaries, summary_metrics
from lightning_mue.diagnostics.activation import SUMMARY_SIZE
from lightning_mue.metrics.base import DiagnosticMetric


def _merge(summaries_N7: Tensor) -> Tensor:
    """The summary of N parts together; central moments do not just add up."""
    total = torch.zeros_like(summaries_N7[0])
    for summary in summaries_N7:
        total = merge_summaries(total, summary)
    return total


class ActivationMetric(DiagnosticMetric):
    """Base of the metrics of one tensor that arrives in pieces; a subclass names its key in `summary_metrics`.

    Args:
        threshold: From how many standard deviations an entry counts as an outlier. Only `OutlierPercent` depends on it; the
            others take it so that they can share its summary.
        **kwargs: Those of `torchmetrics.Metric`.
    """

    key: ClassVar[str]

    def __init__(self, threshold: float = 5.0, **kwargs: Any) -> None:
        require_number("threshold", threshold, above=0)
        super().__init__(**kwargs)
        self.threshold = float(threshold)
        self._summary = f"activation_summary_{self.threshold!r}".replace(".", "_")
        self.add_sum(self._summary, (SUMMARY_SIZE,), merge=_merge)

    def update(self, x: Tensor) -> None:
        """Takes in activations [..., d]; without padding: ``x[mask]``.

        Raises:
            ValueError: If ``x`` has no dimension.
        """
        total = getattr(self, self._summary)
        part = activation_summary(x.detach(), self.threshold)
        setattr(self, self._summary, merge_summaries(total, part.to(total.dtype)))

    def compute(self) -> Tensor:
        """The metric over everything taken in, float32 scalar."""
        return summary_metrics(getattr(self, self._summary))[self.key].float()


class OutputRMS(ActivationMetric):
    """Root mean square of all entries (`lightning_mue.diagnostics.output_rms`).

    Example:
        >>> metric = OutputRMS()
        >>> metric.update(torch.tensor([[1.0, -1.0]])), metric.update(torch.tensor([[7.0, -7.0]]))
        (None, None)
        >>> metric.compute()
        tensor(5.)
    """

    key = "rms"


class MaxOverRMS(ActivationMetric):
    """Largest magnitude over the RMS (`lightning_mue.diagnostics.max_over_rms`)."""

    key = "max_over_rms"


class Kurtosis(ActivationMetric):
    """Fourth standardized moment of all entries, 3 for a normal distribution (`lightning_mue.diagnostics.kurtosis`)."""

    key = "kurtosis"


class OutlierPercent(ActivationMetric):
    """Percentage of entries more than ``threshold`` standard deviations off their token's mean.

    See `lightning_mue.diagnostics.outlier_percent`. With d features no entry can be further off than sqrt(d - 1).
    """

    key = "outlier_percent"

    def update(self, x: Tensor) -> None:
        """Takes in activations [..., d], and warns where d is so small that nothing can be an outlier.

        Raises:
            ValueError: If ``x`` has no dimension.
        """
        super().update(x)
        if 0 < x.shape[-1] <= self.threshold**2 + 1:
            expected = f"more than threshold^2 + 1 = {self.threshold**2 + 1:g}: else no entry can be an outlier"
            do = "Lower threshold, or do without OutlierPercent here."
            found = f"{x.shape[-1]} features"
            warnings.warn(mismatch("OutlierPercent", found=found, expected=expected, do=do), stacklevel=2)
