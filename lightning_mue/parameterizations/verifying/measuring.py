"""What one model does at its initial weights and after one optimizer step, group by group of its parameters.

A group holds the parameters that have one place in every layer (``h.*.mlp.c_fc.weight``; of experts in a list, all of them), or
one parameter outside the layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.contract import is_router
from lightning_mue.names import all_indices
from lightning_mue.parameterizations.reading.parameters import named_tensors
from lightning_mue.parameterizations.verifying.running import (
    Loss,
    Watch,
    call_again,
    differences,
    find_layers,
    first_tensor,
    replaced,
    rms,
    same_draws,
    steady_rms,
    without_dropout,
)


@dataclass
class Measurements:
    """The measurements of one model.

    Attributes:
        groups: Group -> its parameters.
        layers: Stack -> number of its layers.
        stack_of: Group -> the stack of layers it is in; the groups outside the layers are left out.
        width: Width of the residual stream; 1 without layers.
        head_dim: Dimension of an attention head; 0 if none was seen.
        output_width: Number of outputs of a sample.
        values: (quantity, group) -> mean over the layers. Quantities: ``share``, RMS of what the group adds to the residual stream
            relative to it (what is lost if it is zero; both summed over the layers, as a stream that starts small would weigh
            the first ones too much); ``update``, of what one step of it changes there; ``input`` and
            ``input update``, the same at the entry of the first layer; ``output update``, RMS of the change of the model's
            output; ``gradient``, RMS of the gradient. Without a group: ``stream``, RMS at the entry of the first layer;
            ``output``, RMS of the model's output; ``attention update``, RMS of the change of attention logits.
        first: The same ``share`` and ``update`` in the first layer alone.
    """

    groups: dict[str, list[str]]
    layers: dict[str, int] = field(default_factory=dict)
    stack_of: dict[str, str] = field(default_factory=dict)
    width: int = 1
    head_dim: int = 0
    output_width: int = 1
    values: dict[tuple[str, str], float] = field(default_factory=dict)
    first: dict[tuple[str, str], float] = field(default_factory=dict)


def measure(
    model: nn.Module,
    loss: Loss,
    batch: Any,
    step: Callable[[nn.Module], None],
    *,
    seed: int = 0,
) -> Measurements:
    """Measures a model at its initial weights; it is trained by one step, and left with the weights that it had.

    Args:
        model: The model on the CPU, with its initial weights.
        loss: (model, batch) -> loss, or a mapping with one.
        batch: One batch.
        step: Takes one optimizer step, from gradients that are there.
        seed: Seed of every pass: noise and masks are the same in all.
    """
    return _Measurement(model, loss, batch, seed).run(step)


class _Measurement:
    def __init__(self, model: nn.Module, loss: Loss, batch: Any, seed: int) -> None:
        self.model, self.loss, self.batch, self.seed = model, loss, batch, seed
        self.tensors = {name: p for name, p in named_tensors(model).items() if p.requires_grad}
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.tensors:
            groups[all_indices(name)].append(name)
        self.result = Measurements(dict(groups))

    def run(self, step: Callable[[nn.Module], None]) -> Measurements:
        old = {name: p.detach().clone() for name, p in self.tensors.items()}
        with without_dropout(self.model):
            self.layers = find_layers(self.model, self._forward)
            self._train(step)
            self.new = {name: p.detach().clone() for name, p in self.tensors.items()}
            with torch.no_grad():
                for name, p in self.tensors.items():
                    p.copy_(old[name])
                self._count()
                self._layers()
                self._outside()
        return self.result

    def _forward(self) -> Watch:
        with same_draws(self.seed), Watch() as watch:
            self.loss(self.model, self.batch)
        return watch

    def _train(self, step: Callable[[nn.Module], None]) -> None:
        self.model.zero_grad()
        with same_draws(self.seed):
            loss = self.loss(self.model, self.batch)
            loss = loss["loss"] if isinstance(loss, Mapping) else loss
            loss.backward()
        gradients = {name: p.grad.detach().clone() for name, p in self.tensors.items() if p.grad is not None}
        for group, names in self.result.groups.items():
            known = [(gradients[name], None) for name in names if name in gradients]
            self.result.values["gradient", group] = rms(known)  # type: ignore[arg-type]
        step(self.model)
        self.model.zero_grad()

    def _count(self) -> None:
        for name in self.layers:
            stack = all_indices(name)
            self.result.layers[stack] = self.result.layers.get(stack, 0) + 1

    def _layers(self) -> None:
        """Runs the model once; each layer runs again with each of its groups changed."""
        sums: dict[tuple[str, str], float] = defaultdict(float)
        streams: dict[tuple[str, str], float] = defaultdict(float)
        attention: list[tuple[Tensor, Tensor | None]] = []
        again = False

        def hook(name: str) -> Callable[..., None]:
            def note(child: nn.Module, args: Any, kwargs: Any) -> None:
                nonlocal again
                if again:
                    return
                again = True
                x = first_tensor((args, kwargs))
                y, watch = call_again(child, args, kwargs, self.seed)
                assert x is not None
                assert y is not None
                self.result.head_dim = watch.head_dim or self.result.head_dim
                chooses = watch.chooses or any(is_router(module) for module in child.modules())
                size = steady_rms if chooses else lambda new, old=None: rms([(new, old)])
                stream = size(x)
                everything: dict[Tensor, Tensor] = {}
                for group, names in self._inside(name).items():
                    self.result.stack_of[group] = all_indices(name)
                    new = {self.tensors[n]: self.new[n] for n in names}
                    everything |= new
                    for quantity, values in (("update", new), ("share", {p: torch.zeros_like(p) for p in new})):
                        with replaced(values):
                            changed, _ = call_again(child, args, kwargs, self.seed)
                        assert changed is not None
                        effect = size(changed, y)
                        self.result.first.setdefault((quantity, group), effect / max(stream, 1e-30))
                        sums[quantity, group] += effect
                        streams[quantity, group] += stream
                with replaced(everything):
                    _, moved = call_again(child, args, kwargs, self.seed)
                attention.extend(differences(moved.attention, watch.attention))
                again = False

            return note

        handles = [c.register_forward_pre_hook(hook(n), with_kwargs=True) for n, c in self.layers.items()]
        try:
            self._forward()
        finally:
            for handle in handles:
                handle.remove()
        self.result.values |= {key: value / max(streams[key], 1e-30) for key, value in sums.items()}
        if attention:
            self.result.values["attention update", ""] = rms(attention)

    def _inside(self, layer: str) -> dict[str, list[str]]:
        return {
            group: own
            for group, names in self.result.groups.items()
            if (own := [name for name in names if name.startswith(f"{layer}.")])
        }

    def _outside(self) -> None:
        """Runs the model again for each group outside the layers."""
        first, x, start = next(iter(self.layers.values()), None), list[Tensor](), self._forward()
        if first is not None:
            handle = first.register_forward_pre_hook(
                lambda child, args, kwargs: x.append(first_tensor((args, kwargs))),  # type: ignore[arg-type,func-returns-value]
                with_kwargs=True,
            )
            self._forward()
        entry = list(x)
        values = self.result.values
        if entry:
            values["stream", ""] = rms([(tensor, None) for tensor in entry])
            self.result.width = entry[0].shape[-1]
        values["output", ""] = rms([(tensor, None) for tensor in start.outputs])
        self.result.output_width = max((tensor.shape[-1] for tensor in start.outputs if tensor.ndim), default=1)
        for group, names in self.result.groups.items():
            if group in self.result.stack_of:
                continue
            x.clear()
            with replaced({self.tensors[n]: self.new[n] for n in names}):
                moved = self._forward()
            if entry and (change := rms(differences(x, entry))) > 0:
                values["input update", group] = change / values["stream", ""]
                x.clear()
                with replaced({self.tensors[n]: torch.zeros_like(self.tensors[n]) for n in names}):
                    self._forward()
                values["input", group] = rms(differences(x, entry))
            values["output update", group] = rms(differences(moved.outputs, start.outputs))
        if first is not None:
            handle.remove()
