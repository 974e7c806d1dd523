"""The stability diagnostics as `torchmetrics.Metric`, for anyone's ``validation_step`` (docs/metrics.md).

Each class measures everything that its `update` calls take in, over batches and ranks, exactly as the function of the same
name in `lightning_mue.diagnostics` measures one tensor.
"""

from lightning_mue.metrics.activation import Kurtosis, MaxOverRMS, OutlierPercent, OutputRMS
from lightning_mue.metrics.logits import AttentionZValue, RouterEntropy, ZValue
from lightning_mue.metrics.routing import DeadExperts, LoadEntropy, LoadMaxFraction, MaxViolation
from lightning_mue.metrics.spikes import SpikeScore
from lightning_mue.metrics.tokens import BitsPerByte, CrossEntropy, Perplexity

__all__ = [
    "AttentionZValue",
    "BitsPerByte",
    "CrossEntropy",
    "DeadExperts",
    "Kurtosis",
    "LoadEntropy",
    "LoadMaxFraction",
    "MaxOverRMS",
    "MaxViolation",
    "OutlierPercent",
    "OutputRMS",
    "Perplexity",
    "RouterEntropy",
    "SpikeScore",
    "ZValue",
]
