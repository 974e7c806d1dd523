"""Metrics of a language model's predictions. Each scored token has the same weight, whatever the batch it came in."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lightning_mue.checks import require_number
from lightning_mue.diagnostics import token_nats
from lightning_mue.metrics.base import DiagnosticMetric


class CrossEntropy(DiagnosticMetric):
    """Mean code length in nats per scored token (`lightning_mue.diagnostics.cross_entropy`).

    Example:
        >>> import torch
        >>> metric = CrossEntropy()
        >>> metric.update(torch.zeros(2, 3, 8), torch.tensor([[1, 2, 3], [4, -100, -100]]))
        >>> round(metric.compute().item(), 4)  # ln(8), over the four tokens that are scored
        2.0794
    """

    higher_is_better = False
    nats: Tensor
    tokens: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_sum("nats")
        self.add_count("tokens")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Takes in logits [..., V] and the token that each position predicts, [...] int64; -100 is not scored.

        Raises:
            ValueError: If the shapes do not fit, or the targets are no token ids.
        """
        nats, tokens = token_nats(logits.detach(), targets)
        self.nats, self.tokens = self.nats + nats, self.tokens + tokens

    def compute(self) -> Tensor:
        """Nats per token, float32 scalar."""
        return (self.nats / self.tokens).float()


class Perplexity(CrossEntropy):
    """``exp`` of the mean code length, as `torchmetrics.text.Perplexity` with ``ignore_index=-100``.

    That one takes the logarithm of a float32 softmax: a single token of more than 103 nats makes it infinite, a count beyond
    16.8 million tokens stands still, and logits are not widened. This one shares the sums of `CrossEntropy`.
    """

    def compute(self) -> Tensor:
        """The perplexity, float32 scalar."""
        return (self.nats / self.tokens).exp().float()


class BitsPerByte(CrossEntropy):
    """Code length in bits per byte of text (`lightning_mue.diagnostics.bits_per_byte`).

    Args:
        bytes_per_token: Mean number of bytes of a token in the text that is scored.
        **kwargs: Those of `torchmetrics.Metric`.
    """

    def __init__(self, bytes_per_token: float = 1.0, **kwargs: Any) -> None:
        require_number("bytes_per_token", bytes_per_token, above=0)
        super().__init__(**kwargs)
        self.bytes_per_token = bytes_per_token

    def compute(self) -> Tensor:
        """Bits per byte, float32 scalar."""
        return (self.nats / self.tokens / (math.log(2) * self.bytes_per_token)).float()
