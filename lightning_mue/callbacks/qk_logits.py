"""Measures the largest attention logit of each head in training passes, for `QKClip`.

Shape legend: N query heads, k head dimension, B batch, S query positions, T key positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.callbacks.monitors.probes import first_tensor
from lightning_mue.callbacks.monitors.seeing.logit_probes import (
    FUSED_ATTENTION,
    SOFTMAXES,
    is_over_last,
    sdpa_arguments,
)
from lightning_mue.callbacks.monitors.seeing.torch_attention import given_to, hidden_keys, torch_heads
from lightning_mue.callbacks.monitors.seeing.watching import WatchingProbe
from lightning_mue.callbacks.qk_weights import AttentionWeights
from lightning_mue.contract import is_attention_core
from lightning_mue.diagnostics.attention import HIDDEN
from lightning_mue.diagnostics.zvalue import attention_max_logits
from lightning_mue.moe.passes import records_gradients


class Logits:
    """One attention: its weights, and the largest logit of each query head since the last step.

    Attributes:
        largest_N: Float32 [N]; None before the first pass.
        seen: Whether there was a pass ever.
        stepped: Whether there was a step ever.
    """

    def __init__(self, name: str, module: nn.Module, weights: AttentionWeights) -> None:
        self.name, self.module, self.weights = name, module, weights
        self.largest_N: Tensor | None = None
        self.seen = self.stepped = False
        self._handle = self._attach()
        # Code that was compiled without the hooks is not run where a module has a `forward` of its own.
        self._own_forward = "forward" not in vars(module)
        if self._own_forward:
            module.forward = module.forward

    def remove(self) -> None:
        """Remove the hooks."""
        self._handle.remove()
        if self._own_forward:
            vars(self.module).pop("forward", None)

    def _attach(self) -> Any:
        return self.module.register_forward_hook(self._hook, with_kwargs=True)

    def _hook(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if module.training and records_gradients():
            self._measure(module, args, kwargs)

    def _measure(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Of a core."""
        q, k = (first_tensor(args[i] if len(args) > i else kwargs.get(name)) for i, name in enumerate("qk"))
        if q is not None and k is not None:
            self._add(attention_max_logits(q, k, float(module.scale)))

    def _add(self, largest_N: Tensor) -> None:
        self.seen = True
        self.largest_N = largest_N if self.largest_N is None else torch.maximum(self.largest_N, largest_N)


class _TorchLogits(Logits):
    """Of ``nn.MultiheadAttention``, whose queries and keys are made again from its inputs."""

    def _measure(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = given_to(args, kwargs)
        with torch.no_grad(), torch.autocast(given["query"].device.type, enabled=False):
            q, k = torch_heads(module, given["query"], given["key"])
            mask = hidden_keys(module, given, q, k)
            self._add(attention_max_logits(q, k, q.shape[-1] ** -0.5, causal=False, hidden=mask))


class _SeenLogits(Logits):
    """Of an attention of any project, from the calls that it makes."""

    def _attach(self) -> Any:
        return _Watch(self).attach(self.weights.rows.queries[0].tensor.device)

    def see(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Measure a call, if it is of all its heads."""
        if func is FUSED_ATTENTION:
            given = sdpa_arguments(args, kwargs)
            q, k = (given[name].detach() for name in ("query", "key"))
            if not q.is_nested and q.ndim == 4 and self.weights.has_heads(q.shape[1], q.shape[3]):
                self._add(_of_sdpa(q, k, given))
        elif func in SOFTMAXES and args and isinstance(args[0], Tensor) and args[0].ndim == 4:
            x = args[0].detach()
            if is_over_last(func, args, kwargs, 4) and self.weights.has_heads(x.shape[1]):
                self._add(x.float().amax((0, 2, 3)))


class _Watch(WatchingProbe):
    size = 0

    def __init__(self, logits: _SeenLogits) -> None:
        super().__init__(logits.module, logits.name)
        self._logits = logits

    def see(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Look at one call."""
        self._logits.see(func, args, kwargs)

    def metrics(self, total: Tensor) -> dict[str, float]:
        """None: the callback has its own."""
        return {}


def _of_sdpa(q: Tensor, k: Tensor, given: Mapping[str, Any]) -> Tensor:
    mask, scale = given.get("attn_mask"), given.get("scale")
    hidden = None if mask is None else ~mask if mask.dtype == torch.bool else mask <= HIDDEN
    # Causal here is from the first key on; `attention_max_logits` counts from the last.
    if given.get("is_causal"):
        k = k[:, :, : q.shape[2]]
    causal = bool(given.get("is_causal")) and k.shape[2] == q.shape[2]
    return attention_max_logits(q, k, q.shape[-1] ** -0.5 if scale is None else float(scale), causal, hidden)


def measured(name: str, module: nn.Module, weights: AttentionWeights) -> Logits:
    """Begin to measure an attention, until `Logits.remove`."""
    if is_attention_core(module):
        return Logits(name, module, weights)
    return (_TorchLogits if isinstance(module, nn.MultiheadAttention) else _SeenLogits)(name, module, weights)
