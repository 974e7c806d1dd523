"""Metrics of logits: Z-values of a head or router, and of attention. Definitions: docs/theory.md section 6."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_mue.diagnostics import attention_z_value, router_entropy, z_value
from lightning_mue.metrics.base import MeanOverPositions


class ZValue(MeanOverPositions):
    """Mean over all positions of ``logsumexp(logits)^2`` (`lightning_mue.diagnostics.z_value`).

    Args:
        dim: The dimension of the classes.
        **kwargs: Those of `torchmetrics.Metric`.

    Example:
        >>> metric = ZValue()
        >>> metric.update(torch.zeros(2, 8))  # logsumexp is ln(8)
        >>> round(metric.compute().item(), 4)
        4.3241
    """

    def __init__(self, dim: int = -1, **kwargs: Any) -> None:
        super().__init__(f"squared_logsumexp_along_{dim}", **kwargs)
        self.dim = dim

    def update(self, logits: Tensor) -> None:
        """Takes in logits of any shape with the classes along ``dim``; without padding: ``logits[mask]``.

        Raises:
            ValueError: If ``logits`` has no dimension or no classes.
        """
        mean = z_value(logits.detach(), self.dim)
        self.add(mean, logits.numel() // logits.shape[self.dim])


class AttentionZValue(MeanOverPositions):
    """Z-value of attention logits (`lightning_mue.diagnostics.attention_z_value`); the S x S matrix is never built.

    Args:
        causal: Whether a query sees no later keys.
        **kwargs: Those of `torchmetrics.Metric`.
    """

    def __init__(self, causal: bool = True, **kwargs: Any) -> None:
        super().__init__(f"squared_attention_logsumexp_{'causal' if causal else 'full'}", **kwargs)
        self.causal = causal

    def update(self, q: Tensor, k: Tensor, scale: float | None = None) -> None:
        """Takes in queries [B, Hq, S, k] and keys [B, Hkv, N, k], as attention sees them.

        Args:
            q: Queries.
            k: Keys.
            scale: Factor on the logits; None: head dimension^-1/2.

        Raises:
            ValueError: If the shapes do not fit, or a query would see no key.
        """
        if scale is None:
            scale = max(1, q.shape[-1:].numel()) ** -0.5
        with torch.autocast(q.device.type, enabled=False):
            mean = attention_z_value(q.detach(), k.detach(), scale, self.causal)
        self.add(mean, q.shape[0] * q.shape[1] * q.shape[2])


class RouterEntropy(MeanOverPositions):
    """Mean over tokens of the entropy of softmax(logits) over the experts (`lightning_mue.diagnostics.router_entropy`).

    In nats: near ln(E) every expert is equally likely for every token, near 0 the choice is certain.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("router_entropy", **kwargs)

    def update(self, logits: Tensor) -> None:
        """Takes in router logits [..., E], before any balance bias; without padding: ``logits[mask]``.

        Raises:
            ValueError: If there are no experts.
        """
        mean = router_entropy(logits.detach())
        self.add(mean, logits.numel() // logits.shape[-1])
