"""RouterMonitor: load balance, entropies and changes of every router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer

from lightning_mue.callbacks.monitors.finding.reading import Found, Reading, read
from lightning_mue.callbacks.monitors.finding.routers import (
    find_routers,
    n_experts,
    router_scopes,
    top_k_near,
    weight_name,
)
from lightning_mue.callbacks.monitors.probes import Layers, Probe, layer_labels, over_layers
from lightning_mue.callbacks.monitors.sampling import SampledMonitor
from lightning_mue.callbacks.monitors.seeing.padding import PaddingMask
from lightning_mue.callbacks.monitors.seeing.router_probes import DeclaredRouterProbe, FoundRouterProbe
from lightning_mue.checks import require_pattern, require_types
from lightning_mue.moe.balance_callbacks import warn_of_missing_callbacks
from lightning_mue.moe.masks import follow_attention_mask


class RouterMonitor(SampledMonitor):
    """Logs the balance of the experts' load and the entropy of the routers' decisions (docs/theory.md section 6).

    A router is a module with ``mue_router = True`` whose output has ``logits`` [T, E] and ``counts`` [E], where E is its
    ``n_experts``, or else the rows of its ``weight``; or any module whose weight has the role of a router (docs/monitors.md). The
    loads are summed over ranks before anything is computed from them: MaxVio is that of the global batch. Only training passes
    of real tokens count: padding is read from the ``attention_mask`` that the model is called with
    (`lightning_mue.moe.follow_attention_mask`). Metrics for each layer ("03"):

    - ``routing/max_violation/<layer>``: (max load - mean load) / mean load; 0 is balanced.
    - ``routing/token_entropy/<layer>``: mean entropy of a token's softmax over the experts, in nats.
    - ``routing/load_entropy/<layer>``: entropy of the load, in nats; ln(E) is balanced.
    - ``routing/dead_experts/<layer>``: experts without a token in this batch.
    - ``routing/load_max_fraction/<layer>``: share of the assignments on the busiest expert.

    - ``routing/gate_mass/<layer>``: mean share of a token's softmax that its chosen experts hold; near top_k / E the router does
      not distinguish experts, near 1 those left out hardly matter.
    - ``routing/expert_similarity/<layer>``: mean over experts of the largest cosine between the weights that score an expert and
      another one; towards 1, experts are chosen alike.
    - ``routing/choice_churn/<layer>``: share of 256 fixed random directions whose first choice is not that of the sample before:
      how far the router has turned. Tokens would change with the batch and with the layers below.

    Over layers: ``routing/max_violation_mean`` and ``_max``, ``routing/dead_experts_max``,
    ``routing/load_max_fraction_max``, ``routing/token_entropy_min``, ``routing/load_entropy_min``, ``routing/gate_mass_mean``,
    ``routing/expert_similarity_max`` and ``routing/choice_churn_mean``. A router whose choice cannot be seen has no metrics of
    load.

    Args:
        every_n_steps: Optimizer steps between two samples; None follows ``trainer.log_every_n_steps``.
        routers: A regular expression on whole names of modules that are routers, besides those that are found.
        detail: See `SampledMonitor`.

    Raises:
        ValueError: When fitting begins, if a declared router does not say how many experts it has, or the expression matches
            no module with a weight of two dimensions.
    """

    looks_for = "modules with mue_router = True, or weights with the role of a router"
    worst = r"routing/(max_violation|dead_experts)_max|routing/token_entropy_min"
    category = "Routing"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "MaxVio": [r"routing/max_violation_(mean|max)"],
        "MaxVio by layer": [r"routing/max_violation/.*"],
        "Entropy (nats)": [r"routing/(token|load)_entropy_min"],
        "Dead experts": [r"routing/dead_experts_max"],
        "Largest share of the load": [r"routing/load_max_fraction_max"],
        "Gate mass": [r"routing/gate_mass_mean"],
        "Similarity of experts": [r"routing/expert_similarity_max"],
        "Changed choices": [r"routing/choice_churn_mean"],
    }

    def __init__(
        self, every_n_steps: int | None = None, *, routers: str | None = None, detail: str | None = None
    ) -> None:
        super().__init__(every_n_steps, detail=detail)
        require_types(RouterMonitor.__init__, locals())
        if routers is not None:
            require_pattern("routers", routers)
        self.routers = routers

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the routers, and warn of callbacks that their balance needs and the Trainer lacks."""
        super().on_fit_start(trainer, pl_module)
        follow_attention_mask(pl_module)
        warn_of_missing_callbacks(trainer, pl_module)

    def find_probes(self, pl_module: LightningModule) -> list[Probe]:
        """Probe every router."""
        reading = read(pl_module)
        routers = find_routers(reading, self.routers)
        self.findings = {"routers": routers}
        labels = layer_labels(routers.names())
        padding = PaddingMask(pl_module)
        return [_probe(router, labels[router.name], reading, padding) for router in routers.found]

    def summarize(self, layers: Layers) -> dict[str, float]:
        """The mean of MaxVio over layers, and the worst layer of each metric."""
        return {
            **over_layers(layers, "routing/max_violation", "mean", "max"),
            **over_layers(layers, "routing/token_entropy", "min"),
            **over_layers(layers, "routing/load_entropy", "min"),
            **over_layers(layers, "routing/dead_experts", "max"),
            **over_layers(layers, "routing/load_max_fraction", "max"),
            **over_layers(layers, "routing/gate_mass", "mean"),
            **over_layers(layers, "routing/expert_similarity", "max"),
            **over_layers(layers, "routing/choice_churn", "mean"),
        }


def _probe(router: Found, label: str, reading: Reading, padding: PaddingMask) -> Probe:
    if router.info is None:
        return DeclaredRouterProbe(router.module, label)
    experts, top_k = n_experts(router.info), top_k_near(reading, router.name)
    leaf, scopes = weight_name(router), router_scopes(router, reading)
    return FoundRouterProbe(router.module, label, leaf, experts, top_k, scopes, padding)
