"""Stability diagnostics: pure functions on tensors that know nothing of Lightning (docs/theory.md section 6).

Every function computes in float32 for inputs of any dtype, changes nothing in place and returns a tensor. NaN in
the input gives NaN in the output: a diagnostic never hides a broken activation. Unless a docstring says otherwise, a
mean over nothing (an empty batch) is NaN.
"""

from lightning_mue.diagnostics.activation import (
    activation_summary,
    kurtosis,
    max_over_rms,
    merge_summaries,
    outlier_percent,
    output_rms,
    summary_metrics,
)
from lightning_mue.diagnostics.routing import (
    dead_experts,
    load_entropy,
    load_max_fraction,
    max_violation,
    router_entropy,
)
from lightning_mue.diagnostics.spikes import cusum, spike_score
from lightning_mue.diagnostics.updates import even_sample, update_ratio, update_rms, update_summary, weight_rms
from lightning_mue.diagnostics.zvalue import attention_z_value, z_value

__all__ = [
    "activation_summary",
    "attention_z_value",
    "cusum",
    "dead_experts",
    "even_sample",
    "kurtosis",
    "load_entropy",
    "load_max_fraction",
    "max_over_rms",
    "max_violation",
    "merge_summaries",
    "outlier_percent",
    "output_rms",
    "router_entropy",
    "spike_score",
    "summary_metrics",
    "update_ratio",
    "update_rms",
    "update_summary",
    "weight_rms",
    "z_value",
]
