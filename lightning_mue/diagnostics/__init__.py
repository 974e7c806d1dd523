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
from lightning_mue.diagnostics.code_length import bits_per_byte, cross_entropy, perplexity, token_nats
from lightning_mue.diagnostics.routing import (
    dead_experts,
    load_entropy,
    load_max_fraction,
    max_violation,
    router_entropy,
)
from lightning_mue.diagnostics.spectral import (
    alignment_summary,
    leading_singular,
    mean_alignment,
    minority_share,
    qk_spectral_entropy,
    stable_rank,
)
from lightning_mue.diagnostics.spike_share import spike_share
from lightning_mue.diagnostics.spikes import cusum, spike_score
from lightning_mue.diagnostics.updates import (
    angular_step,
    even_sample,
    gradient_noise,
    small_second_moments,
    update_ratio,
    update_rms,
    update_summary,
    weight_rms,
)
from lightning_mue.diagnostics.zvalue import attention_z_value, z_value

__all__ = [
    "activation_summary",
    "alignment_summary",
    "angular_step",
    "attention_z_value",
    "bits_per_byte",
    "cross_entropy",
    "cusum",
    "dead_experts",
    "even_sample",
    "gradient_noise",
    "kurtosis",
    "leading_singular",
    "load_entropy",
    "load_max_fraction",
    "max_over_rms",
    "max_violation",
    "mean_alignment",
    "merge_summaries",
    "minority_share",
    "outlier_percent",
    "output_rms",
    "perplexity",
    "qk_spectral_entropy",
    "router_entropy",
    "small_second_moments",
    "spike_score",
    "spike_share",
    "stable_rank",
    "summary_metrics",
    "token_nats",
    "update_ratio",
    "update_rms",
    "update_summary",
    "weight_rms",
    "z_value",
]
