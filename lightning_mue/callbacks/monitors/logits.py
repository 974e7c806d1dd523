"""LogitsZMonitor: Z-values, largest logits and entropies of LM, attention and router logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_mue.callbacks.monitors.finding.attentions import find_attentions_of
from lightning_mue.callbacks.monitors.finding.heads import find_heads
from lightning_mue.callbacks.monitors.finding.reading import Found, Reading, read
from lightning_mue.callbacks.monitors.finding.routers import find_routers, n_experts, router_scopes, weight_name
from lightning_mue.callbacks.monitors.probes import Layers, Probe, layer_labels, over_layers
from lightning_mue.callbacks.monitors.sampling import SampledMonitor
from lightning_mue.callbacks.monitors.seeing.logit_probes import (
    CoreProbe,
    OutputLogitsProbe,
    ProductLogitsProbe,
    ReturnedLogits,
    SeenAttentionProbe,
    TorchAttentionProbe,
)
from lightning_mue.callbacks.monitors.seeing.padding import PaddingMask
from lightning_mue.checks import require_pattern, require_types
from lightning_mue.contract import is_attention_core


class LogitsZMonitor(SampledMonitor):
    """Logs the Z-value, the mean of ``logsumexp(logits)^2`` (docs/theory.md section 6), of every kind of logits in the model.

    Metrics (the layer is the block's index, "03"): ``stability/z/lm_logits``; ``stability/z/attention/<layer>`` and
    ``stability/z/router/<layer>``, each with ``_mean`` and ``_max`` over layers; ``stability/max_logit/...`` likewise, the largest
    logit, with ``_max``; ``stability/entropy/attention/<layer>``, the mean entropy of a query's attention weights in nats, with
    ``_mean`` and ``_min``. Means are over the global batch. A model with several heads (multi-token prediction) logs
    ``.../lm_logits/<head>`` for each.

    The logits are found on any model, as docs/monitors.md says: heads, attentions and routers that declare themselves come first
    (``mue_role_of_output``, ``mue_roles``, ``mue_attention_core``, ``mue_router``), then those that the roles of the parameters
    show. Attention logits are seen where queries meet keys: in the inputs of a declared core or of ``nn.MultiheadAttention``, in
    calls of ``scaled_dot_product_attention``, or of softmax, inside an attention.

    Args:
        every_n_steps: Optimizer steps between two samples; None follows ``trainer.log_every_n_steps``.
        lm_logits: Name of the module whose output is the LM logits, or a regular expression that matches the whole names of
            several, in place of what is found.
        attention: Whether to measure attention logits, at the price of one more product of queries and keys in float32; or a
            regular expression on whole names of modules that are attentions, besides those that are found.
        routers: A regular expression on whole names of modules that are routers, besides those that are found.
        detail: See `SampledMonitor`.

    Raises:
        ValueError: When fitting begins, if an expression matches no module.
    """

    looks_for = (
        'a module with mue_role_of_output = "lm_logits", or whose mue_roles hold "unembedding", or a linear layer '
        "called a head (lm_head, output, score, ...); modules with mue_attention_core = True; modules with mue_router = True; "
        "or heads, attentions and routers by the roles of their parameters"
    )
    category = "Stability"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "Z-value": [r"stability/z/(lm_logits.*|(attention|router)_(mean|max))"],
        "Z-value by layer": [r"stability/z/(attention|router)/.*"],
        "Largest logit": [r"stability/max_logit/(lm_logits.*|(attention|router)_max)"],
        "Attention entropy (nats)": [r"stability/entropy/attention_(mean|min)"],
    }

    def __init__(
        self,
        every_n_steps: int | None = None,
        *,
        lm_logits: str | None = None,
        attention: bool | str = True,
        routers: str | None = None,
        detail: str | None = None,
    ) -> None:
        super().__init__(every_n_steps, detail=detail)
        require_types(LogitsZMonitor.__init__, locals())
        for key, pattern in (("lm_logits", lm_logits), ("attention", attention), ("routers", routers)):
            if isinstance(pattern, str):
                require_pattern(key, pattern)
        self.lm_logits = lm_logits
        self.attention = attention
        self.routers = routers

    def find_probes(self, pl_module: LightningModule) -> list[Probe]:
        """Probe the LM head, the attentions and the routers."""
        reading = read(pl_module)
        heads = find_heads(reading, self.lm_logits)
        self.findings = {"LM logits": heads}
        labels = {name: f"lm_logits/{label}" for name, label in layer_labels(heads.names()).items()}
        labels = labels if len(heads.found) > 1 else dict.fromkeys(labels, "lm_logits")
        padding = PaddingMask(pl_module)
        probes: list[Probe] = [
            _head_probe(head, labels[head.name], reading, heads.found, padding) for head in heads.found
        ]
        if self.attention:
            pattern = self.attention if isinstance(self.attention, str) else None
            attentions = self.findings["attention logits"] = find_attentions_of(reading, pattern)
            labels = layer_labels(attentions.names())
            probes += [_attention_probe(each.module, f"attention/{labels[each.name]}") for each in attentions.found]
        routers = self.findings["router logits"] = find_routers(reading, self.routers)
        labels = layer_labels(routers.names())
        return probes + [
            router_logits_probe(each, f"router/{labels[each.name]}", reading, padding) for each in routers.found
        ]

    def summarize(self, layers: Layers) -> dict[str, float]:
        """Mean and worst over layers."""
        found: dict[str, float] = {}
        for kind in ("attention", "router"):
            found |= over_layers(layers, f"stability/z/{kind}", "mean", "max")
            found |= over_layers(layers, f"stability/max_logit/{kind}", "max")
        return found | over_layers(layers, "stability/entropy/attention", "mean", "min")


def scopes_around(name: str, reading: Reading) -> list[nn.Module]:
    """The modules round a named one, the outermost (the LightningModule) last."""
    scopes = []
    while name:
        name = name.rpartition(".")[0]
        scopes.append(reading.modules[name])
    return scopes


def _head_probe(head: Found, label: str, reading: Reading, heads: Sequence[Found], padding: PaddingMask) -> Probe:
    scopes, classes = scopes_around(head.name, reading), n_classes(head.module)
    probe: OutputLogitsProbe | ProductLogitsProbe = OutputLogitsProbe(head.module, label, padding)
    if "the table" in head.how:
        probe = ProductLogitsProbe(head.module, label, "weight", classes, scopes, padding)
        probe.optional = head.how != "tied to the table"
    if [n_classes(each.module) for each in heads].count(classes) == 1 <= classes:
        probe.returned = ReturnedLogits(probe, classes, scopes[:-1])  # the LightningModule returns what it likes
    return probe


def n_classes(head: nn.Module) -> int:
    """Outputs of a head or rows of a table; 0 if its weight does not tell."""
    weight = getattr(getattr(head, "base_layer", head), "weight", None)
    return int(weight.shape[0]) if isinstance(weight, Tensor) and weight.ndim == 2 else 0


def _attention_probe(module: nn.Module, label: str) -> Probe:
    if is_attention_core(module):
        return CoreProbe(module, label)
    if isinstance(module, nn.MultiheadAttention):
        return TorchAttentionProbe(module, label)
    return SeenAttentionProbe(module, label)


def router_logits_probe(router: Found, label: str, reading: Reading, padding: PaddingMask) -> Probe:
    """A probe of a router's logits: of its output where it declares itself, else of the product with its weight."""
    if router.info is None:
        return OutputLogitsProbe(router.module, label)
    leaf, experts = weight_name(router), n_experts(router.info)
    if not leaf:
        return OutputLogitsProbe(router.module, label, padding)
    return ProductLogitsProbe(router.module, label, leaf, experts, router_scopes(router, reading), padding)
