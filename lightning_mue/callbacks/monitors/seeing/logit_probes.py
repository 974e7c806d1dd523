"""Probes of logits: outputs of heads and routers, attention in all its forms, and products with a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mue.callbacks.monitors.probes import Probe, first_tensor, measuring
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
from lightning_mue.moe.passes import records_gradients
from lightning_mue.sharded import whole

#: Functions whose first argument is logits.
SOFTMAXES = frozenset({torch.softmax, F.softmax, Tensor.softmax, torch.special.softmax})
#: Kept: programs replace the name by functions that call this one.
FUSED_ATTENTION = F.scaled_dot_product_attention
SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class _Logits(Probe):
    """Statistics: those of `logits_summary`."""

    size = LOGITS_SIZE
    _padding: PaddingMask | None = None
    #: Of the head of a model that returns logits itself.
    returned: ReturnedLogits | None = None

    def with_others(self, handle: Any, device: torch.device) -> Handles:
        """The handle of the probe's own hooks together with those of what else it listens to."""
        others: list[Any] = [] if self._padding is None else [self._padding.attach()]
        others += [] if self.returned is None else [self.returned.attach(device)]
        return Handles(handle, *others)

    @property
    def padding_mask(self) -> Tensor | None:
        """The padding mask of the call that runs now."""
        return None if self._padding is None else self._padding.mask

    def real(self, logits: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """Which of the tokens are no padding, of the call that runs or by its ``mask``; None: all."""
        shape = logits.shape[:-1]
        return None if self._padding is None else self._padding.real(shape.numel(), shape, mask)

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
        return self.with_others(super().attach(device), device)

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """From the output."""
        logits, mask = first_tensor(getattr(output, "logits", output)), getattr(output, "mask", None)
        if logits is None or logits.ndim < 2:  # a scalar is a loss
            return None
        return logits_summary(logits, self.real(logits) if mask is None else mask)


class ProductLogitsProbe(WatchingProbe, _Logits):
    """Logits that are a product with a weight: of a tied table, or of a router in whatever form."""

    def __init__(
        self,
        module: nn.Module,
        label: str,
        leaf: str,
        classes: int,
        scopes: Sequence[nn.Module],
        padding: PaddingMask | None = None,
    ) -> None:
        super().__init__(module, label, scopes)
        self._calls, self._padding = WeightCalls(module, leaf, classes), padding

    def attach(self, device: torch.device) -> Any:
        """Hook the scopes and forget the previous step."""
        return self.with_others(super().attach(device), device)

    def enter(self) -> None:
        """A pass begins."""
        self._calls.forget()

    def see(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Measure the calls that are looked for."""
        logits = self._calls.product(func, args, kwargs, output)
        if logits is not None:
            self.add(logits_summary(whole(logits.detach()), self.real(logits)))


class ReturnedLogits:
    """Takes the ``logits`` that a model returns in place of what its head does: after soft caps, factors and biases behind it.

    Args:
        probe: Of the head.
        classes: Outputs of the head.
        owners: The modules round it; of those that return logits the outermost counts.
    """

    def __init__(self, probe: _Logits, classes: int, owners: Sequence[nn.Module]) -> None:
        self._probe, self._classes, self._owners = probe, classes, owners

    def attach(self, device: torch.device) -> Handles:
        """Hook the owners."""
        before: list[tuple[Tensor | None, Tensor | None]] = []
        training = {id(owner): owner.training for owner in self._owners}

        def enter(module: nn.Module, inputs: Any) -> None:
            before.append((self._probe.total, self._probe.padding_mask))  # which is no longer there when the call ends

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            total, mask = before.pop()
            given = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
            logits = first_tensor(given)
            counts = module.training == training[id(module)] and records_gradients()
            if counts and logits is not None and logits.ndim > 1 and logits.shape[-1] == self._classes:
                self._probe.total = total
                with measuring(device):
                    self._probe.add(logits_summary(logits, self._probe.real(logits, mask)))

        handles = []
        for owner in self._owners:
            handles.append(owner.register_forward_pre_hook(enter))
            handles.append(owner.register_forward_hook(leave, always_call=True))
        return Handles(*handles)


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
            self.add(_of_sdpa(sdpa_arguments(args, kwargs)))
            return
        sinks = getattr(self.module, "sinks", None)
        if isinstance(sinks, Tensor):
            x = output if func is torch.cat and _joins(args, sinks) else None
        else:
            x = args[0] if func in SOFTMAXES and args else None
        if isinstance(x, Tensor) and x.ndim >= 3 and x.is_floating_point() and is_over_last(func, args, kwargs, x.ndim):
            self.add(softmax_summary(whole(x.detach())))


def _joins(args: tuple[Any, ...], sinks: Tensor) -> bool:
    """Whether a concatenation has (a view of) the sinks among its parts; rotations of queries and keys have not."""
    parts = args[0] if args and isinstance(args[0], (tuple, list)) else ()
    return any(part is sinks or part._base is sinks for part in parts if isinstance(part, Tensor))


def is_over_last(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], ndim: int) -> bool:
    """Whether a softmax or a concatenation is over the last dimension."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return dim in (-1, ndim - 1)


def sdpa_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``scaled_dot_product_attention`` by name."""
    return {**dict(zip(SDPA_ARGUMENTS, args, strict=False)), **kwargs}


def _of_sdpa(given: Mapping[str, Any]) -> Tensor | None:
    if given["query"].is_nested or given["key"].is_nested:
        return None
    q, k = whole(given["query"].detach()), whole(given["key"].detach())
    if q.ndim == 2:  # of one head and one sample
        q, k = q.unsqueeze(0), k.unsqueeze(0)
    mask = given.get("attn_mask")
    mask = None if mask is None else whole(mask.detach())
    scale = given.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return attention_summary(q, k, scale, causal=bool(given.get("is_causal")), mask=mask)
