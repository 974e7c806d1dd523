"""Measures how training has changed each module's output on one batch, by running the module again with old weights.

The quantities (docs/theory.md section 7), for a module M with inputs x and output h, after t steps:

    change       M(theta_t, x_t) - M(theta_0, x_0)            how far the output has moved since initialization
    update       M(theta_t, x_t) - M(theta_t with p_0, x_t)   of one parameter p; (W_t - W_0) x_t for a linear layer
    propagated   M(theta_0, x_t) - M(theta_0, x_0)            W_0 (x_t - x_0) for a linear layer
    output       M(theta_t, x_t)
    coherent     the part of an unembedding's change that is no accident of its draw, by size:
                 sqrt(change^2 - random^2), at least its update. random is `propagated` of the same weights with their input
                 features in another order: a random matrix of falling size answers every move of the stream by as much,
                 and by less the wider the model is, while what training has aligned stays

Nothing is assumed about how M uses its parameters, so stacked experts, fused matrices, norms and custom ops need no
special case. The router's decision is an input of the experts, so it is the same in both terms of a difference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_mue.names import clean_name, is_numbered_layer

#: The role under which the outputs of numbered layers are recorded.
STREAM = "residual stream"
#: Orders of an unembedding's inputs that are averaged; one alone is off by 10 % in the square, as the stream moves along few axes.
_ORDERS = 4
#: Calls a module again on the same inputs, with some parameters (path inside the module -> value) replaced.
_Again = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Measured:
    """One measured value.

    Attributes:
        name: Qualified name of the parameter (``update``) or module (the other quantities).
        role: The parameter's role. For a module's output: ``residual stream`` for a numbered layer, else the role that
            all of its parameters but the bias share, or an empty string.
        quantity: ``update``, ``change``, ``propagated``, ``output`` or ``coherent``.
        rms: ``sqrt(mean(square))`` over all entries, float32 or better.
    """

    name: str
    role: str
    quantity: str
    rms: float


def tensor_of(output: Any) -> Tensor | None:
    """The tensor of an output that is measured: itself, its ``logits``, else its first floating-point tensor."""
    if isinstance(output, Tensor):
        return output.detach() if output.is_floating_point() else None
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits.detach()
    parts: Iterable[Any] = ()
    if isinstance(output, Mapping):
        parts = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif is_dataclass(output):
        parts = [getattr(output, field.name) for field in fields(output)]
    return next((found for found in map(tensor_of, parts) if found is not None), None)


class ModuleProbe:
    """Measures the quantities of every module that holds trainable parameters, and of the numbered layers.

    Args:
        module: The module, at initialization. Its parameters are copied (one copy of the model is kept).
        run: Runs the module on the probe batch, always in the same way: two runs may differ by the weights only. It is
            called in evaluation mode (no dropout) and without gradients.
        roles: Clean parameter name -> role.
    """

    def __init__(self, module: nn.Module, run: Callable[[], object], roles: Mapping[str, str]) -> None:
        self.module, self.run = module, run
        named = [(clean_name(n), p) for n, p in module.named_parameters(remove_duplicate=False) if p.requires_grad]
        by_tensor = {id(p): roles[name] for name, p in named if name in roles}  # both names of a tied weight
        self.roles = {name: by_tensor.get(id(p), "") for name, p in named}
        self._start = {name: p.detach().clone() for name, p in named}
        self._modules = {clean_name(name): m for name, m in module.named_modules(remove_duplicate=False)}
        called: dict[str, None] = {}
        self._visit(lambda name, call, again, h: called.setdefault(name), list(self._modules))
        #: Module -> its parameters, by path inside it. A parameter belongs to the innermost called module that contains it:
        #: torch's attention passes its output projection's weight to a function, and never calls that module.
        self._owned: dict[str, list[str]] = {name: [] for name in called if is_numbered_layer(name)}
        #: Parameters that no called module contains: they cannot be measured.
        self.unseen: list[str] = []
        for name in self.roles:
            owner = next((prefix for prefix in _prefixes(name) if prefix in called), None)
            if owner is None:
                self.unseen.append(name)
            else:
                self._owned.setdefault(owner, []).append(_inside(owner, name))
        #: Unembedding -> its weights in several other orders of the input features.
        self._shuffled = {
            name: self._reorder(name) for name in self._owned if self._role(name, "change") == "unembedding"
        }
        #: Module around the head -> its first numbered layer, at whose output the updates of its own parameters are seen: a head's
        #: random initial weights answer them the less, the wider the model is.
        self._stages = {owner: stage for owner in self._owned if (stage := self._stage(owner, called)) is not None}
        self._first: dict[tuple[str, int], Tensor] = {}
        self._first_shuffled: dict[tuple[str, int], list[Tensor]] = {}
        self._visit(self._remember, self._owned)

    def measure(self) -> list[Measured]:
        """Runs the probe batch with the current weights.

        Returns:
            One entry for each parameter or module and quantity; several calls of one module in a run are pooled. A module
            whose output has another shape than at first (experts in a ModuleList) has no ``change`` and ``propagated``.
        """
        squares: dict[tuple[str, str], float] = defaultdict(float)
        counts: dict[tuple[str, str], int] = defaultdict(int)

        def add(name: str, call: int, again: _Again, h: Tensor) -> None:
            for key, difference in self._differences(name, call, again, h):
                squares[key] += float(difference.square().sum(dtype=torch.float64))
                counts[key] += difference.numel()

        self._visit(add, self._owned)
        means = {key: squares[key] / count for key, count in counts.items() if count}
        for name in self._shuffled:
            random = means.pop((name, "random"), None)
            if random is not None:
                update = sum(means.get((self._full(name, path), "update"), 0.0) for path in self._owned[name])
                means[name, "coherent"] = max(means[name, "change"] - random, update)
        return [
            Measured(name, self._role(name, quantity), quantity, mean**0.5) for (name, quantity), mean in means.items()
        ]

    def _differences(self, name: str, call: int, again: _Again, h: Tensor) -> Iterator[tuple[tuple[str, str], Tensor]]:
        """Yields ((name, quantity), difference) of one call."""
        first = self._first.get((name, call))
        yield (name, "output"), h
        own = self._owned[name]
        old = {_inside(name, full): value for full, value in self._start.items() if _is_inside(name, full)}
        for path in own:
            yield (self._full(name, path), "update"), self._update(name, again, h, {path: old[path]})
        if first is not None and first.shape == h.shape:
            yield (name, "change"), h - first
            if own:
                yield (name, "propagated"), again(old) - first
            if name in self._shuffled:
                for shuffled, start in zip(self._shuffled[name], self._first_shuffled[name, call], strict=True):
                    yield (name, "random"), again(shuffled) - start

    def _stage(self, owner: str, called: Iterable[str]) -> str | None:
        """The first numbered layer inside a module that has own parameters, layers and the head."""
        inside = [name for name in called if name != owner and _is_inside(owner, name)]
        has_head = any(role == "unembedding" and _is_inside(owner, name) for name, role in self.roles.items())
        layers = [name for name in inside if is_numbered_layer(name)]
        return layers[0] if self._owned[owner] and has_head and layers else None

    def _update(self, name: str, again: _Again, h: Tensor, old: Mapping[str, Tensor]) -> Tensor:
        """What old values of parameters change in the output; around the head, in that of the first layer, if they reach it."""
        if (stage := self._stages.get(name)) is not None:
            seen: list[Tensor] = []
            handle = self._modules[stage].register_forward_hook(
                lambda module, args, output: seen.extend([found] if (found := tensor_of(output)) is not None else [])
            )
            again({})
            again(old)
            handle.remove()
            if len(seen) > 1 and (change := _exact(seen[0]) - _exact(seen[len(seen) // 2])).any():
                return change
        return h - again(old)

    def _remember(self, name: str, call: int, again: _Again, h: Tensor) -> None:
        self._first[name, call] = h.clone()
        if name in self._shuffled:
            self._first_shuffled[name, call] = [again(shuffled) for shuffled in self._shuffled[name]]

    def _reorder(self, module: str) -> list[dict[str, Tensor]]:
        """The module's first matrices with their input features in other orders; the caller's random state stays."""
        matrices = {path: self._start[self._full(module, path)] for path in self._owned[module]}
        generator = torch.Generator().manual_seed(0)
        return [
            {
                path: w[..., torch.randperm(w.shape[-1], generator=generator).to(w.device)] if w.ndim > 1 else w
                for path, w in matrices.items()
            }
            for _ in range(_ORDERS)
        ]

    @staticmethod
    def _full(module: str, path: str) -> str:
        return f"{module}.{path}" if module else path

    def _visit(self, consume: Callable[[str, int, _Again, Tensor], object], names: Iterable[str]) -> None:
        """Runs the probe batch and passes on (module name, number of its call, function that repeats the call, output)."""
        calls: dict[str, int] = defaultdict(int)
        repeating = False

        def hook(name: str, child: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            nonlocal repeating
            h = None if repeating else tensor_of(output)
            if h is None:
                return
            calls[name] += 1
            repeating = True
            with torch.random.fork_rng(
                devices=[h.device] if h.is_cuda else []
            ):  # repeating must not change later draws
                consume(name, calls[name], _repeat(child, args, kwargs), _exact(h))
            repeating = False

        def with_name(name: str) -> Callable[..., None]:
            return lambda child, args, kwargs, output: hook(name, child, args, kwargs, output)

        hooked = {name: self._modules[name] for name in names}
        handles = [c.register_forward_hook(with_name(n), with_kwargs=True) for n, c in hooked.items()]
        try:
            with torch.no_grad(), _evaluating(self.module):
                self.run()
        finally:
            for handle in handles:
                handle.remove()

    def _role(self, name: str, quantity: str) -> str:
        if quantity == "update":
            return self.roles[name]
        if is_numbered_layer(name):
            return STREAM
        own = {self.roles[self._full(name, path)] for path in self._owned[name]} - {"bias"}
        return own.pop() if len(own) == 1 else ""


def _prefixes(name: str) -> Iterator[str]:
    """The modules that contain a parameter, innermost first: ``a.b.w`` -> ``a.b``, ``a``, and the root, an empty name."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_inside(module: str, name: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _inside(module: str, name: str) -> str:
    """A qualified name relative to a module that contains it."""
    return name[len(module) + 1 :] if module else name


def _exact(h: Tensor) -> Tensor:
    """Converts to float32, or keeps float64."""
    return h.to(torch.promote_types(h.dtype, torch.float32))


def _repeat(child: nn.Module, args: Any, kwargs: Any) -> _Again:
    """A function that calls a module again on its inputs, with some parameters replaced."""

    def again(parameters: Mapping[str, Tensor]) -> Tensor:
        h = tensor_of(functional_call(child, dict(parameters), args, kwargs))
        assert h is not None
        return _exact(h)

    return again


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Sets evaluation mode (no dropout), and restores every submodule's own mode afterwards."""
    modes = {child: child.training for child in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
