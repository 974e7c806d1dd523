"""Metrics of the load of a router's experts. Definitions: docs/theory.md section 6.

All of them read the assignments on each expert, added up over batches and ranks BEFORE the metric is computed: a violation
of the mean is not the mean of the violations. In a `MetricCollection` they share that sum.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_mue.checks import require_positive, value_error
from lightning_mue.diagnostics import dead_experts, load_entropy, load_max_fraction, max_violation
from lightning_mue.metrics.base import DiagnosticMetric


class LoadMetric(DiagnosticMetric):
    """Base of the metrics of one router's load.

    Args:
        n_experts: Experts E of the router; one metric serves one layer.
        **kwargs: Those of `torchmetrics.Metric`.

    Example:
        >>> metric = MaxViolation(n_experts=4)
        >>> metric.update(torch.tensor([4, 0, 2, 2]))
        >>> metric.update(torch.tensor([2, 0, 3, 3]))
        >>> metric.compute()  # (6 - 4) / 4
        tensor(0.5000)
    """

    def __init__(self, n_experts: int, **kwargs: Any) -> None:
        require_positive(n_experts=n_experts)
        super().__init__(**kwargs)
        self.n_experts = int(n_experts)
        self._load = f"load_of_{self.n_experts}"
        self.add_sum(self._load, (self.n_experts,))

    def update(self, counts: Tensor) -> None:
        """Takes in the assignments (or the fraction of them) on each expert, [E]: the ``counts`` of a router's output.

        Raises:
            ValueError: If there is not one number for each expert, and nothing else.
        """
        if counts.shape != (self.n_experts,):
            raise value_error(
                "counts",
                found=f"shape {list(counts.shape)}",
                expected=f"[{self.n_experts}], one number for each expert of one layer",
                do="Count expert ids with torch.bincount(ids.flatten(), minlength=n_experts); give each layer its own metric.",
            )
        total = getattr(self, self._load)
        setattr(self, self._load, total + counts.detach().to(total.dtype))

    def compute(self) -> Tensor:
        """The metric of the whole load, float32 scalar; NaN when nothing was assigned."""
        load = getattr(self, self._load)
        return torch.where(load.sum() == 0, float("nan"), self.measure(load)).float()

    @staticmethod
    @abstractmethod
    def measure(load: Tensor, /) -> Tensor:
        """The metric of a load [E]."""


class MaxViolation(LoadMetric):
    """MaxVio: ``(max load - mean load) / mean load`` (`lightning_mue.diagnostics.max_violation`); 0 is balanced."""

    higher_is_better = False
    measure = staticmethod(max_violation)


class LoadEntropy(LoadMetric):
    """Entropy of the mean load in nats (`lightning_mue.diagnostics.load_entropy`); ln(E) is balanced."""

    higher_is_better = True
    measure = staticmethod(load_entropy)


class LoadMaxFraction(LoadMetric):
    """Share of the busiest expert (`lightning_mue.diagnostics.load_max_fraction`); 1/E is balanced."""

    higher_is_better = False
    measure = staticmethod(load_max_fraction)


class DeadExperts(LoadMetric):
    """How many experts received nothing over all batches (`lightning_mue.diagnostics.dead_experts`)."""

    higher_is_better = False
    measure = staticmethod(dead_experts)
