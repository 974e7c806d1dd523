"""RouterMonitor: load balance and token entropy of every router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_mue.callbacks.monitors.probes import Probe, counted_logits, find_modules, layer_labels, over_layers
from lightning_mue.callbacks.monitors.sampling import SampledMonitor
from lightning_mue.checks import value_error
from lightning_mue.contract import is_router
from lightning_mue.diagnostics import dead_experts, load_entropy, load_max_fraction, max_violation, router_entropy
from lightning_mue.moe.balance_callbacks import warn_of_missing_callbacks
from lightning_mue.moe.masks import follow_attention_mask


class _RouterProbe(Probe):
    """Statistics: [sum of token entropies, tokens, counts of the E experts]."""

    def __init__(self, module: nn.Module, label: str) -> None:
        super().__init__(module, label)
        self.size = 2 + _n_experts(module, label)

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        logits_TE, counts_E = counted_logits(output), getattr(output, "counts", None)
        if logits_TE is None or counts_E is None:
            return None
        if counts_E.numel() != self.size - 2:
            found = f"counts of {counts_E.numel()} experts"
            expected = f"{self.size - 2}, which is its n_experts (or the rows of its weight)"
            do = "Return one count for each expert, zeros included."
            raise value_error(f"router {self.label}", found=found, expected=expected, do=do)
        tokens = logits_TE.shape[0]
        entropy = router_entropy(logits_TE) * tokens if tokens else logits_TE.new_zeros((), dtype=torch.float32)
        return torch.cat([torch.stack([entropy, torch.full_like(entropy, tokens)]), counts_E.float()])

    def metrics(self, total: Tensor) -> dict[str, float]:
        tokens, counts_E = total[1], total[2:]
        if tokens == 0:
            return {}
        values = {
            "max_violation": max_violation(counts_E),
            "token_entropy": total[0] / tokens,
            "load_entropy": load_entropy(counts_E),
            "dead_experts": dead_experts(counts_E),
            "load_max_fraction": load_max_fraction(counts_E),
        }
        return {f"routing/{name}/{self.label}": float(value) for name, value in values.items()}


class RouterMonitor(SampledMonitor):
    """Logs the balance of the experts' load and the entropy of the routers' decisions (docs/theory.md section 6).

    A router is a module with ``mue_router = True`` whose output has ``logits`` [T, E] and ``counts`` [E]; E is its
    ``n_experts``, or else the rows of its ``weight``. The loads are summed over ranks before anything is computed from
    them: MaxVio is that of the global batch. Only training passes of real tokens count: of `MoELayer`s, padding is read from
    the ``attention_mask`` that the model is called with (`lightning_mue.moe.follow_attention_mask`). Metrics for each layer ("03"):

    - ``routing/max_violation/<layer>``: (max load - mean load) / mean load; 0 is balanced.
    - ``routing/token_entropy/<layer>``: mean entropy of a token's softmax over the experts, in nats.
    - ``routing/load_entropy/<layer>``: entropy of the load, in nats; ln(E) is balanced.
    - ``routing/dead_experts/<layer>``: experts without a token in this batch.
    - ``routing/load_max_fraction/<layer>``: share of the assignments on the busiest expert.

    Over layers: ``routing/max_violation_mean`` and ``_max``, ``routing/dead_experts_max``,
    ``routing/load_max_fraction_max``, ``routing/token_entropy_min`` and ``routing/load_entropy_min``.

    Args:
        every_n_steps: Optimizer steps between two samples; None follows ``trainer.log_every_n_steps``.

    Raises:
        ValueError: When fitting begins, if a router does not say how many experts it has.
    """

    looks_for = "modules with mue_router = True"
    category = "Routing"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "MaxVio": [r"routing/max_violation(_mean|_max|/.*)"],
        "Entropy (nats)": [r"routing/(token|load)_entropy(_min|/.*)"],
        "Dead experts": [r"routing/dead_experts(_max|/.*)"],
        "Largest share of the load": [r"routing/load_max_fraction(_max|/.*)"],
    }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers, and warn of callbacks that their balance needs and the Trainer lacks."""
        super().on_fit_start(trainer, pl_module)
        follow_attention_mask(pl_module)
        warn_of_missing_callbacks(trainer, pl_module)

    def find_probes(self, pl_module: LightningModule) -> list[Probe]:
        """Probe every router."""
        routers = find_modules(pl_module, is_router)
        labels = layer_labels(routers)
        return [_RouterProbe(router, labels[name]) for name, router in routers.items()]

    def summarize(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The mean of MaxVio over layers, and the worst layer of each metric."""
        return {
            **over_layers(metrics, "routing/max_violation", "mean", "max"),
            **over_layers(metrics, "routing/token_entropy", "min"),
            **over_layers(metrics, "routing/load_entropy", "min"),
            **over_layers(metrics, "routing/dead_experts", "max"),
            **over_layers(metrics, "routing/load_max_fraction", "max"),
        }


def _n_experts(module: nn.Module, label: str) -> int:
    n_experts, weight = getattr(module, "n_experts", None), getattr(module, "weight", None)
    if isinstance(n_experts, int):
        return n_experts
    if isinstance(weight, Tensor) and weight.ndim == 2:
        return weight.shape[0]
    found = f"{type(module).__name__} without a number of experts"
    expected = "an integer attribute n_experts, or a weight [n_experts, width]"
    raise value_error(f"router {label}", found=found, expected=expected, do="Give it one of them.")
