"""Probes, each of which measures one module for a sampled monitor; how modules are found and named in the metrics."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mue.moe.passes import records_gradients
from lightning_mue.names import clean_name, metric_name, split_layer
from lightning_mue.sharded import whole

#: Group of metrics -> layer -> value.
Layers = Mapping[str, Mapping[str, float]]

_REDUCTIONS: Mapping[str, Callable[[list[float]], float]] = {"mean": fmean, "max": max, "min": min}
_measuring = False


@contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """No graph is recorded, nothing is cast, and what is computed is not itself watched (`is_measuring`).

    New tensors are float32 also under ``precision="bf16-true"``, which makes bfloat16 the default of a training step.
    """
    global _measuring
    outer, _measuring = _measuring, True
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)
        _measuring = outer


def is_measuring() -> bool:
    """Whether what runs now is a probe's own computation."""
    return _measuring


class Probe(ABC):
    """One watched module and the statistics that it adds up during a sampled step.

    Attributes:
        module: The watched module; its ``forward`` may run any number of times in a step.
        label: What names the module in the metrics, e.g. ``"03"``.
        size: Length of the statistics, the same on every rank. A vector of zeros means "saw nothing".
        total: The statistics of the current step on this rank, float32 [size]; None before the first forward.
    """

    size: int
    #: True: that its module does nothing to measure is no surprise.
    optional = False

    def __init__(self, module: nn.Module, label: str) -> None:
        self.module = module
        self.label = label
        self.total: Tensor | None = None

    @abstractmethod
    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """Return float32 [size] for one forward call, or None if there is nothing to measure in it."""

    def measure_call(self, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Tensor | None:
        """`measure`, for a probe that also needs the arguments that are given by keyword."""
        return self.measure(inputs, output)

    def merge(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the statistics [size] of two calls (or ranks) together; a sum unless overridden."""
        return a + b

    @abstractmethod
    def metrics(self, total: Tensor) -> dict[str, float]:
        """Return tag -> value from the merged statistics, float64 [size] on the CPU; empty if nothing was seen."""

    def add(self, found: Tensor | None) -> None:
        """Merge the statistics of one call into the total."""
        if found is not None:
            self.total = found if self.total is None else self.merge(self.total, found)

    def attach(self, device: torch.device) -> RemovableHandle:
        """Hook the module and forget the previous step. The hook keeps no graph and computes outside autocast.

        Evaluation passes inside a training step (without gradients, or in another mode than now) are left out, and so is what
        runs again in the backward pass.
        """
        self.total = None
        mode = self.module.training

        def hook(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if module.training != mode or not records_gradients():
                return
            with measuring(device):
                self.add(self.measure_call(inputs, keywords, output))

        return self.module.register_forward_hook(hook, with_kwargs=True)


class UnhookedProbe(Probe):
    """A probe that watches no forward pass: its monitor gives it what to measure.

    Attributes:
        active: True in a sampled batch, from `attach` until the handle is removed.
    """

    def __init__(self, label: str) -> None:
        super().__init__(nn.Module(), label)
        self.active = False

    def attach(self, device: torch.device) -> RemovableHandle:
        """Forget the previous step."""
        self.total, self.active = torch.zeros(self.size, device=device), True
        return _Switch(self)

    def finish(self) -> None:
        """Called when the sampled batch ends, or is given up, before the statistics are gathered."""

    def measure(self, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        """Nothing: there is no forward pass."""
        return None


class _Switch(RemovableHandle):
    """What `UnhookedProbe.attach` returns in place of a hook's handle."""

    def __init__(self, probe: UnhookedProbe) -> None:
        super().__init__(OrderedDict())
        self._probe = probe

    def remove(self) -> None:
        super().remove()
        if self._probe.active:
            self._probe.active = False
            self._probe.finish()


def find_modules(root: nn.Module, matches: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """Map the qualified name of each module below (and including) ``root`` that matches to the module.

    Names are those of the bare model: without the parts that `torch.compile`, activation checkpointing and FSDP insert.
    """
    return {clean_name(name): module for name, module in root.named_modules() if matches(module)}


def layer_labels(names: Iterable[str]) -> dict[str, str]:
    """Short, sortable labels for modules that do the same thing in different layers.

    A name that holds a block index becomes that index with two digits; others, and those whose index is shared with
    another module, keep their whole name (cleaned of characters that loggers treat specially).

    Returns:
        Qualified name -> label, all labels distinct.

    Example:
        >>> layer_labels(["blocks.3.attention.core", "head"])
        {'blocks.3.attention.core': '03', 'head': 'head'}
        >>> layer_labels(["encoder.0.ffn", "decoder.0.ffn"])
        {'encoder.0.ffn': 'encoder.0.ffn', 'decoder.0.ffn': 'decoder.0.ffn'}
    """
    names = list(names)
    layers = {name: split_layer(name)[1] for name in names}
    index = {name: f"{layer:02d}" if layer >= 0 else None for name, layer in layers.items()}
    shared = Counter(index.values())
    return {
        name: label if (label := index[name]) is not None and shared[label] == 1 else metric_name(name)
        for name in names
    }


def by_layer(metrics: Mapping[str, float]) -> Layers:
    """Metrics ``<group>/<layer>`` as group -> layer -> value."""
    layers: dict[str, dict[str, float]] = {}
    for tag, value in metrics.items():
        group, _, layer = tag.rpartition("/")
        layers.setdefault(group, {})[layer] = value
    return layers


def over_layers(layers: Layers, group: str, *reductions: str) -> dict[str, float]:
    """Reduce the metrics of a group over layers to ``<group>_mean``, ``<group>_max`` or ``<group>_min``.

    NaN in any layer gives NaN; a group without layers gives nothing.
    """
    values = list(layers.get(group, {}).values())
    broken = any(math.isnan(value) for value in values)
    return {f"{group}_{name}": math.nan if broken else _REDUCTIONS[name](values) for name in reductions if values}


def first_tensor(output: Any) -> Tensor | None:
    """The floating-point tensor in a module's output (its first element if it is a tuple), whole and detached.

    A sharded DTensor is gathered, which is the one case of a further collective.
    """
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return None
    return whole(output.detach())
