"""PrecisionMonitor: how far each attention is from the same attention in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_mue.callbacks.monitors.finding.attentions import find_attentions_of
from lightning_mue.callbacks.monitors.finding.reading import read
from lightning_mue.callbacks.monitors.probes import Layers, Probe, first_tensor, layer_labels, over_layers
from lightning_mue.callbacks.monitors.sampling import SampledMonitor
from lightning_mue.callbacks.monitors.seeing.logit_probes import FUSED_ATTENTION, SDPA_ARGUMENTS
from lightning_mue.callbacks.monitors.seeing.watching import WatchingProbe
from lightning_mue.contract import is_attention_core
from lightning_mue.diagnostics.attention_error import ERROR_SIZE, attention_error_summary, attention_errors
from lightning_mue.sharded import whole


class _Errors(Probe):
    """Statistics: those of `attention_error_summary`."""

    size = ERROR_SIZE

    def metrics(self, total: Tensor) -> dict[str, float]:
        return {f"stability/{name}/{self.label}": value for name, value in attention_errors(total).items()}


class _CoreErrors(_Errors):
    """A declared core, ``forward(q, k, v)``, causal, with a ``scale``."""

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        return self.measure_call(inputs, {}, output)

    def measure_call(self, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Tensor | None:
        q, k, v = (first_tensor(inputs[i] if len(inputs) > i else keywords.get(name)) for i, name in enumerate("qkv"))
        y, scale = first_tensor(output), self.module.scale
        if q is None or k is None or v is None or y is None or any(x.ndim != 4 for x in (q, k, v, y)):
            return None
        return attention_error_summary(q, k, v, y, float(scale), causal=True)  # type: ignore[arg-type]


class _SeenErrors(WatchingProbe, _Errors):
    """An attention of any project, by its calls of ``scaled_dot_product_attention``."""

    def see(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        if func is not FUSED_ATTENTION:
            return
        given = {**dict(zip(SDPA_ARGUMENTS, args, strict=False)), **kwargs}
        tensors = [given["query"], given["key"], given["value"], output]
        if given.get("dropout_p") or any(x.is_nested or x.ndim != 4 for x in tensors):
            return
        q, k, v, y = (whole(x.detach()) for x in tensors)
        mask = given.get("attn_mask")
        scale = q.shape[-1] ** -0.5 if given.get("scale") is None else float(given["scale"])
        causal, mask = bool(given.get("is_causal")), None if mask is None else whole(mask.detach())
        if causal and k.shape[2] != q.shape[2]:  # torch aligns the first positions there, not the last
            return
        self.add(attention_error_summary(q, k, v, y, scale, causal=causal, mask=mask))


class PrecisionMonitor(SampledMonitor):
    """Logs how far each attention's output is from attention in float64, on a few queries of a few sequences.

    It sees what no other figure shows at once: a kernel, a precision or a rounding that is wrong in attention, long before it adds
    up to something that the loss shows (docs/indicators/attention-error.md).

    Metrics, for each attention layer, each with ``_max`` over layers:

    - ``stability/attention_error/attention/<layer>``: root mean square of the error over that of the exact output; bfloat16 has
      0.002 to 0.01, float32 1e-7 to 1e-6.
    - ``stability/attention_bias/attention/<layer>``: size of the error's part along the exact output, of which rounding to nearest
      has almost none.

    Watched are declared cores (``mue_attention_core``) and calls of ``scaled_dot_product_attention`` inside attentions, without
    dropout. Eager attention, which has no single call to compare, is not seen.

    Args:
        every_n_steps: Optimizer steps between two samples; None follows ``trainer.log_every_n_steps``.
        attention: A regular expression on whole names of modules that are attentions, besides those that are found.
        detail: See `SampledMonitor`.

    Raises:
        ValueError: When fitting begins, if the expression matches no module.
    """

    looks_for = "modules with mue_attention_core = True, or attentions by the roles of their parameters"
    category = "Stability"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {"Attention error": [r"stability/attention_(error|bias)/.*_max"]}

    def __init__(
        self, every_n_steps: int | None = None, *, attention: str | None = None, detail: str | None = None
    ) -> None:
        super().__init__(every_n_steps, detail=detail)
        self.attention = attention

    def find_probes(self, pl_module: LightningModule) -> list[Probe]:
        """Probe every attention."""
        found = self.findings["attention"] = find_attentions_of(read(pl_module), self.attention)
        labels = layer_labels(found.names())
        return [_probe(each.module, f"attention/{labels[each.name]}") for each in found.found]

    def summarize(self, layers: Layers) -> dict[str, float]:
        """Worst over layers."""
        groups = ("stability/attention_error/attention", "stability/attention_bias/attention")
        return {tag: value for group in groups for tag, value in over_layers(layers, group, "max").items()}


def _probe(module: nn.Module, label: str) -> Probe:
    return _CoreErrors(module, label) if is_attention_core(module) else _SeenErrors(module, label)
