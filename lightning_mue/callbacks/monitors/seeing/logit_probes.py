"""Probes of logits: outputs of heads and routers, attention in all its forms, and products with a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mue.callbacks.monitors.probes import Probe, first_tensor
from lightning_mue.callbacks.monitors.seeing.padding import PaddingMask
from lightning_mue.callbacks.monitors.seeing.torch_attention import added_mask, given_to, torch_heads
from lightning_mue.callbacks.monitors.seeing.watching import Handles, WatchingProbe, WeightCalls
from lightning_mue.diagnostics.attention import (
    ATTENTION_SIZE,
    LOGITS_SIZE,
    attention_summary,
    logits_summary,
    merge_logits,
    softmax_summary,
)
from lightning_mue.sharded import whole

_SOFTMAXES = frozenset({torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax})
FUSED_ATTENTION = F.scaled_dot_product_attention  # kept: programs replace the name by functions that call this one
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class _Logits(Probe):
    """Statistics: those of `logits_summary`."""

    size = LOGITS_SIZE

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        return merge_logits(a, b)

    def metrics(self, total: Tensor) -> dict[str, float]:
        if not total[1] > 0:
            return {}
        z, largest = total[0] / total[1], total[2]
        return {f"stability/z/{self.label}": float(z), f"stability/max_logit/{self.label}": float(largest)}


class OutputLogitsProbe(_Logits):
    """Logits that are a module's output, or the ``logits`` in it; not of tokens that its ``mask`` or the padding leaves out."""

    def __init__(self, module: nn.Module, label: str, padding: PaddingMask | None = None) -> None:
        super().__init__(module, label)
        self._padding = padding

    def attach(self, device: torch.device) -> Any:
        """Hook the module and forget the previous step."""
        handle = super().attach(device)
        return handle if self._padding is None else Handles(handle, self._padding.attach())

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """From the output."""
        logits, mask = first_tensor(getattr(output, "logits", output)), getattr(output, "mask", None)
        if logits is None or logits.ndim < 2:  # a scalar is a loss
            return None
        if mask is None and self._padding is not None:
            mask = self._padding.real(logits.shape[:-1].numel())
        return logits_summary(logits, mask)


class ProductLogitsProbe(WatchingProbe, _Logits):
    """Logits that are a product with a weight: of a tied table, or of a router in whatever form."""

    def __init__(
        self, module: nn.Module, label: str, leaf: str, scopes: Sequence[nn.Module], padding: PaddingMask | None = None
    ) -> None:
        super().__init__(module, label, scopes)
        self._calls, self._padding = WeightCalls(module, leaf), padding

    def attach(self, device: torch.device) -> Any:
        """Hook the scopes and forget the previous step."""
        handle = super().attach(device)
        return handle if self._padding is None else Handles(handle, self._padding.attach())

    def enter(self) -> None:
        """A pass begins."""
        self._calls.forget()

    def see(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Measure the calls that are looked for."""
        logits = self._calls.product(func, args, kwargs, output)
        if logits is not None:
            mask = None if self._padding is None else self._padding.real(logits.shape[:-1].numel())
            self.add(logits_summary(whole(logits.detach()), mask))


class _AttentionLogits(Probe):
    """Statistics: those of `attention_summary`."""

    size = ATTENTION_SIZE

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        return merge_logits(a, b)

    def metrics(self, total: Tensor) -> dict[str, float]:
        if not total[1] > 0:
            return {}
        values = {"z": total[0] / total[1], "max_logit": total[2], "entropy": total[3] / total[1]}
        return {f"stability/{name}/{self.label}": float(value) for name, value in values.items()}


class CoreProbe(_AttentionLogits):
    """A declared core, ``forward(q, k, v)``, causal, with a ``scale``."""

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """From the output."""
        return self.measure_call(inputs, {}, output)

    def measure_call(self, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Tensor | None:
        """From the arguments of the call."""
        q, k = (first_tensor(inputs[i] if len(inputs) > i else keywords.get(name)) for i, name in enumerate("qk"))
        if q is None or k is None:
            return None
        scale: Any = self.module.scale
        return attention_summary(q, k, float(scale), causal=True, offset=k.shape[-2] - q.shape[-2])


class TorchAttentionProbe(_AttentionLogits):
    """``nn.MultiheadAttention``, whose queries and keys are made again from its inputs."""

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """From the output."""
        return self.measure_call(inputs, {}, output)

    def measure_call(self, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Tensor | None:
        """From the arguments of the call."""
        given = given_to(inputs, keywords)
        q, k = torch_heads(self.module, given["query"], given["key"])
        return attention_summary(q, k, q.shape[-1] ** -0.5, mask=added_mask(given, q, k))


class SeenAttentionProbe(WatchingProbe, _AttentionLogits):
    """An attention of any project: its calls of ``scaled_dot_product_attention``, or of softmax over logits [..., S, N].

    An attention with ``sinks`` (GPT-OSS) appends a logit for each head to those of the keys and subtracts the largest before its
    softmax: there the logits are what it concatenates, the sink's included.
    """

    def see(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Measure the calls that are looked for."""
        if func is FUSED_ATTENTION:
            self.add(_of_sdpa({**dict(zip(SDPA_ARGUMENTS, args, strict=False)), **kwargs}))
            return
        sinks = getattr(self.module, "sinks", None)
        if isinstance(sinks, Tensor):
            x = output if func is torch.cat and _joins(args, sinks) else None
        else:
            x = args[0] if func in _SOFTMAXES and args else None
        if isinstance(x, Tensor) and x.ndim >= 3 and x.is_floating_point() and _over_last(func, args, kwargs, x.ndim):
            self.add(softmax_summary(whole(x.detach())))


def _joins(args: tuple[Any, ...], sinks: Tensor) -> bool:
    """Whether a concatenation has (a view of) the sinks among its parts; rotations of queries and keys have not."""
    parts = args[0] if args and isinstance(args[0], (tuple, list)) else ()
    return any(part is sinks or part._base is sinks for part in parts if isinstance(part, Tensor))


def _over_last(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], ndim: int) -> bool:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return dim in (-1, ndim - 1)


def _of_sdpa(given: Mapping[str, Any]) -> Tensor | None:
    if given["query"].is_nested or given["key"].is_nested:
        return None
    q, k = whole(given["query"].detach()), whole(given["key"].detach())
    mask = given.get("attn_mask")
    mask = None if mask is None else whole(mask.detach())
    scale = given.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return attention_summary(q, k, scale, causal=bool(given.get("is_causal")), mask=mask)
