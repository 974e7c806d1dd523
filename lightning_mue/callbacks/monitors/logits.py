"""LogitsZMonitor: Z-values of LM, attention and router logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_mue.callbacks.monitors.probes import (
    Probe,
    counted_logits,
    find_modules,
    first_tensor,
    layer_labels,
    over_layers,
)
from lightning_mue.callbacks.monitors.sampling import SampledMonitor
from lightning_mue.checks import value_error
from lightning_mue.contract import declared_roles, is_attention_core, is_router, returns_lm_logits
from lightning_mue.diagnostics import attention_z_value, z_value
from lightning_mue.names import is_head
from lightning_mue.parameterizations.reading.parameters import module_form
from lightning_mue.parameterizations.rules.roles import Role


class _ZProbe(Probe):
    """Statistics: [sum of squared logsumexp, positions]."""

    size = 2

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        logits = first_tensor(counted_logits(output, output))
        if logits is None or logits.ndim < 2:  # a scalar is a loss
            return None
        return _weighted(z_value(logits), logits.numel() // max(1, logits.shape[-1]))

    def metrics(self, total: Tensor) -> dict[str, float]:
        return {f"stability/z/{self.label}": float(total[0] / total[1])} if total[1] > 0 else {}


class _AttentionZProbe(_ZProbe):
    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        q, k = (first_tensor(x) for x in inputs[:2]) if len(inputs) > 1 else (None, None)  # else: passed by keyword
        if q is None or k is None:
            return None
        scale: Any = self.module.scale
        return _weighted(attention_z_value(q, k, float(scale)), q.shape[0] * q.shape[1] * q.shape[2])


class LogitsZMonitor(SampledMonitor):
    """Logs the Z-value, the mean of ``logsumexp(logits)^2`` (docs/theory.md section 6), of every kind of logits in the model.

    Metrics (the layer is the block's index, "03"): ``stability/z/lm_logits``; ``stability/z/attention/<layer>`` and
    ``stability/z/router/<layer>``, each with ``_mean`` and ``_max`` over layers. Means are over the global batch. A model
    with several heads (multi-token prediction) logs ``stability/z/lm_logits/<head>`` for each.

    The logits are found by attributes:

    - LM logits: the output of a module with ``mue_role_of_output = "lm_logits"``; else of the module whose ``mue_roles``
      give one of its own parameters the role "unembedding"; else of the outermost linear layer that is called a
      head (`lightning_mue.names.is_head`).
    - attention: the inputs ``forward(q, k, v)`` of modules with ``mue_attention_core = True`` and a ``scale``; q is [B,
      Hq, S, k] and k is [B, Hkv, S, k]; causal.
    - routers: the ``logits`` [T, E] in the output (or the output itself) of modules with ``mue_router = True``.

    Args:
        every_n_steps: Optimizer steps between two samples; None follows ``trainer.log_every_n_steps``.
        lm_logits: Qualified name of the module whose output is the LM logits, where the rule above does not find it.
        attention: Whether to measure attention logits, at the price of one more attention forward in float32.

    Raises:
        ValueError: When fitting begins, if no module is called ``lm_logits``.
    """

    looks_for = (
        'a module with mue_role_of_output = "lm_logits", or whose mue_roles hold "unembedding", or a linear layer '
        "called a head (lm_head, output, score, ...); modules with mue_attention_core = True; modules with mue_router = True"
    )
    category = "Stability"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "Z-value": [r"stability/z/(lm_logits.*|(attention|router)_(mean|max))"],
        "Z-value by layer": [r"stability/z/(attention|router)/.*"],
    }

    def __init__(
        self, every_n_steps: int | None = None, *, lm_logits: str | None = None, attention: bool = True
    ) -> None:
        super().__init__(every_n_steps)
        self.lm_logits = lm_logits
        self.attention = attention

    def find_probes(self, pl_module: LightningModule) -> list[Probe]:
        """Probe the LM head, the attention cores and the routers."""
        heads = self._lm_heads(pl_module)
        labels = {name: f"lm_logits/{label}" for name, label in layer_labels(heads).items()}
        labels = labels if len(heads) > 1 else dict.fromkeys(heads, "lm_logits")
        probes: list[Probe] = [_ZProbe(head, labels[name]) for name, head in heads.items()]
        if self.attention:
            cores = find_modules(pl_module, is_attention_core)
            labels = layer_labels(cores)
            probes += [_AttentionZProbe(core, f"attention/{labels[name]}") for name, core in cores.items()]
        routers = find_modules(pl_module, is_router)
        labels = layer_labels(routers)
        return probes + [_ZProbe(router, f"router/{labels[name]}") for name, router in routers.items()]

    def summarize(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Mean and max over layers of the attention and router Z-values."""
        kinds = (over_layers(metrics, f"stability/z/{kind}", "mean", "max") for kind in ("attention", "router"))
        return {tag: value for kind in kinds for tag, value in kind.items()}

    def _lm_heads(self, pl_module: LightningModule) -> dict[str, nn.Module]:
        modules = find_modules(pl_module, lambda _: True)
        if self.lm_logits is None:
            return _infer_lm_heads(modules)
        if self.lm_logits not in modules:
            expected = f"the name of a module of {type(pl_module).__name__}"
            do = f"Give a name from named_modules(), such as one of {[name for name in modules if name][-8:]}."
            raise value_error("lm_logits", found=repr(self.lm_logits), expected=expected, do=do)
        return {self.lm_logits: modules[self.lm_logits]}


def _infer_lm_heads(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    marked = {n: m for n, m in modules.items() if returns_lm_logits(m)}
    by_role = {n: m for n, m in modules.items() if _owns_unembedding(m)}
    by_name = {n: m for n, m in modules.items() if module_form(m) == "linear" and is_head(n)}
    outermost = min((name.count(".") for name in by_name), default=0)  # blocks may have an "output" of their own
    return marked or by_role or {name: m for name, m in by_name.items() if name.count(".") == outermost}


def _owns_unembedding(module: nn.Module) -> bool:
    roles = declared_roles(module)
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return any(role == Role.UNEMBEDDING and name in own for name, role in roles.items())


def _weighted(mean: Tensor, count: int) -> Tensor:
    """[2] (sum, count) of a mean over ``count`` positions; zeros for none, whose mean is NaN."""
    return torch.stack([mean * count, torch.full_like(mean, count)]) if count else mean.new_zeros(2)
