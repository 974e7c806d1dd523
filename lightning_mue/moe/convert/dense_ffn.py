"""Reads a dense feed-forward network of another library: which tensors are its maps, and which activation it has.

Names differ from library to library, and nothing in a module says which of two maps is the gate. So the linear maps are found
by structure, every combination that fits their shapes is tried, and the one that computes what the module computes is taken.
The trial runs on random weights, in float32: the module's own may be zero, in bfloat16, or on meta.

Shape legend: d width, h hidden width, N rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mue.checks import listed, require_choice, value_error
from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.moe.convert.trial import random_tensors, require_module, run

#: Relative error below which two results in float32 are taken to be equal. GELU and its tanh form differ by 2e-4 here.
_SAME = 3e-5
_ALL = slice(None)


class DenseFFN(NamedTuple):
    """A dense feed-forward network as tensors.

    Attributes:
        w_gate: [h, d], or None if not gated.
        w_up: [h, d].
        w_down: [d, h].
        b_gate: [h] or None.
        b_up: [h] or None.
        b_down: [d] or None.
        activation: A key of `ACTIVATIONS`.
        output_multiplier: Constant factor of the output: the module's own, if it is one of ours.
        trained: Names of the tensors that require a gradient in the module; the tensors here are detached.
    """

    w_gate: Tensor | None
    w_up: Tensor
    w_down: Tensor
    b_gate: Tensor | None
    b_up: Tensor | None
    b_down: Tensor | None
    activation: str
    trained: frozenset[str] = frozenset()
    output_multiplier: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Maps [..., d] to [..., d]."""
        function, up = ACTIVATIONS[self.activation].function, F.linear(x, self.w_up, self.b_up)
        hidden = function(up) if self.w_gate is None else function(F.linear(x, self.w_gate, self.b_gate)) * up
        return self.output_multiplier * F.linear(hidden, self.w_down, self.b_down)


class LinearMap(NamedTuple):
    """A linear map in a module: its path, the names of its tensors, and its shape."""

    path: str
    weight: str
    bias: str | None
    transposed: bool
    outputs: int
    inputs: int

    def read(self, tensors: Mapping[str, Tensor], rows: slice) -> tuple[Tensor, Tensor | None]:
        """Weight [rows, in] and bias [rows] of some of its outputs."""
        weight = tensors[self.weight].detach()
        bias = None if self.bias is None else tensors[self.bias].detach()[rows]
        return (weight.T if self.transposed else weight)[rows], bias

    def __str__(self) -> str:
        return f"{self.path} [{self.outputs}, {self.inputs}]{' with bias' if self.bias else ''}"


class _Layout(NamedTuple):
    """One combination of maps. `gate_rows`, `up_rows`: the outputs of gate and up, if one map holds both."""

    gate: LinearMap | None
    up: LinearMap
    down: LinearMap
    activation: str
    gate_rows: slice = _ALL
    up_rows: slice = _ALL

    def read(self, tensors: Mapping[str, Tensor], module: nn.Module) -> DenseFFN:
        gate = (None, None) if self.gate is None else self.gate.read(tensors, self.gate_rows)
        up, down = self.up.read(tensors, self.up_rows), self.down.read(tensors, _ALL)
        maps = {"gate": self.gate, "up": self.up, "down": self.down}
        sources = {f"w_{n}": m.weight for n, m in maps.items() if m} | {f"b_{n}": m.bias for n, m in maps.items() if m}
        trained = frozenset(name for name, source in sources.items() if source and tensors[source].requires_grad)
        factor = _output_multiplier(module, self.down.weight)
        return DenseFFN(gate[0], up[0], down[0], gate[1], up[1], down[1], self.activation, trained, factor)


def read_ffn(
    module: nn.Module | Sequence[nn.Module],
    *,
    gate_name: str | None = None,
    up_name: str | None = None,
    down_name: str | None = None,
    activation: str | None = None,
) -> DenseFFN:
    """Finds the maps and the activation of a dense feed-forward network.

    Args:
        module: Any module that maps [..., d] to [..., d] by two linear maps with an activation between them, or by three with
            a gate; or modules that do so one after the other. Linear maps are `nn.Linear`, transformers' `Conv1D` and
            two-dimensional parameters. Dropout inside is left out, and forward hooks are not run. Tied maps are read as two.
        gate_name: Path of the gate's module or parameter; None: found by trial, as are the next three.
        up_name: Path of the map from d to h, or of the one map for gate and up.
        down_name: Path of the map from h to d.
        activation: A key of `ACTIVATIONS`. If this and all names are given, nothing is tried and they are taken to be right
            (with one map for gate and up, the gate's outputs first).

    Returns:
        Views of the module's own parameters, and the product of the `output_multiplier` of all our own layers around them.

    Raises:
        TypeError: `module` is neither a module nor a sequence of modules.
        ValueError: No such network is found, or the module computes something else; the message says what was found.
    """
    if activation is not None:
        require_choice("activation", activation, tuple(ACTIVATIONS))
    whole = _as_one(module)
    tensors = dict(whole.named_parameters(remove_duplicate=False))
    names = {"gate": gate_name, "up": up_name, "down": down_name}
    layouts = _named(_layouts(maps := _linear_maps(whole), names), names, activation)
    if not layouts:
        raise _unreadable(whole, maps, _not_found(names, activation))
    all_given = activation is not None and up_name is not None and down_name is not None
    if all_given and (layouts[0].gate in (None, layouts[0].up) or gate_name is not None):
        return layouts[0].read(tensors, whole)
    return _matching(whole, layouts, maps).read(tensors, whole)


def _as_one(module: nn.Module | Sequence[nn.Module]) -> nn.Module:
    expected = "a torch.nn.Module, or a list of modules that are applied one after the other"
    if isinstance(module, (list, tuple)) and module:
        for i, part in enumerate(module):
            require_module(f"module[{i}]", part)
        return nn.Sequential(*module)
    if isinstance(module, (list, tuple)):
        raise value_error("module", found=f"an empty {type(module).__name__}", expected=expected)
    require_module("module", module, expected)
    whole = cast(nn.Module, module)
    return getattr(whole, "_orig_mod", whole)


def _output_multiplier(module: nn.Module, weight: str) -> float:
    """The product of the multipliers of all modules around a weight; own attributes only, as wrappers pass on inner ones."""
    parts = weight.split(".")[:-1]
    holders = [module.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) + 1)]
    name = "output_multiplier"
    return math.prod(float(getattr(m, name)) for m in holders if name in vars(m) or hasattr(type(m), name))


def _linear_maps(module: nn.Module) -> list[LinearMap]:
    """Every two-dimensional parameter as a linear map; in both orientations if its module does not say which it has."""
    maps = []
    for path, child in module.named_modules(remove_duplicate=False):
        own = dict(child.named_parameters(recurse=False))
        stem = f"{path}." if path else ""
        orientations = {"Linear": [False], "Conv1D": [True]}.get(type(child).__name__, [False, True])
        for name, weight in own.items():
            if weight.ndim != 2:
                continue
            bias = "bias" if name == "weight" else "b" + name[1:]
            here = path if name == "weight" and path else stem + name
            for transposed in orientations:
                outputs, inputs = reversed(weight.shape) if transposed else weight.shape
                if bias not in own:
                    maps.append(LinearMap(here, stem + name, None, transposed, outputs, inputs))
                elif own[bias].shape == (outputs,):
                    maps.append(LinearMap(here, stem + name, stem + bias, transposed, outputs, inputs))
    return maps


def _layouts(maps: list[LinearMap], names: Mapping[str, str | None]) -> Iterator[_Layout]:
    """All combinations of maps that their shapes allow and that use every map, or every map that names pick."""
    picked = {name for name in names.values() if name is not None}
    if names["up"] and names["down"]:
        maps = [m for m in maps if m.path in picked]
    weights = {m.weight for m in maps}
    gated = [name for name, a in ACTIVATIONS.items() if a.gated]
    plain = [name for name, a in ACTIVATIONS.items() if not a.gated]
    for chosen in permutations(maps, len(weights)) if 2 <= len(weights) <= 3 else ():
        if {m.weight for m in chosen} != weights:
            continue
        *others, down = chosen
        d, h = down.outputs, down.inputs
        sizes = [(m.outputs, m.inputs) for m in others]
        if sizes == [(h, d), (h, d)]:
            yield from (_Layout(others[0], others[1], down, f) for f in gated)
        elif sizes == [(h, d)]:
            yield from (_Layout(None, others[0], down, f) for f in plain)
        elif sizes == [(2 * h, d)]:
            halves, turns = (slice(0, h), slice(h, None)), (slice(0, None, 2), slice(1, None, 2))
            for rows in (halves, halves[::-1], turns, turns[::-1]):
                yield from (_Layout(others[0], others[0], down, f, rows[0], rows[1]) for f in gated)


def _named(layouts: Iterator[_Layout], names: Mapping[str, str | None], activation: str | None) -> list[_Layout]:
    fitting = []
    for layout in layouts:
        paths = {"gate": layout.gate and layout.gate.path, "up": layout.up.path, "down": layout.down.path}
        is_named = all(name in (None, paths[part]) for part, name in names.items())
        if is_named and activation in (None, layout.activation):
            fitting.append(layout)
    return fitting


def _matching(module: nn.Module, layouts: list[_Layout], maps: list[LinearMap]) -> _Layout:
    """The layout that computes what the module computes."""
    tensors = random_tensors(module)
    errors: list[tuple[float, _Layout]] = []
    results = {d: run(module, tensors, d) for d in {layout.down.outputs for layout in layouts}}
    for layout in layouts:
        x, y = results[layout.down.outputs]
        if isinstance(y, Tensor) and y.shape == x.shape:
            errors.append((float((layout.read(tensors, module)(x) - y).norm() / y.norm()), layout))
    error, best = min(errors, key=lambda pair: pair[0], default=(None, None))
    if best is not None and error is not None and error < _SAME:
        return best
    raise _unreadable(module, maps, _not_the_same(error, [y for _, y in results.values()]))


_EXPECTED = (
    "down(f(up(x))) or down(f(gate(x)) * up(x)), gate and up also as one map, with an activation of "
    f"{', '.join(ACTIVATIONS)}"
)
_REMEDY = (
    "Pass the feed-forward part alone, without norm and residual (of a pair of modules: both, as a list); or name the maps "
    "with up_name=, down_name=, gate_name= and give activation=."
)


def _unreadable(module: nn.Module, maps: Sequence[LinearMap], why: str) -> ValueError:
    weights = {m.weight: m for m in maps}
    others = [
        f"{n} ({type(m).__name__})" for n, m in module.named_children() if not any(w.startswith(n) for w in weights)
    ]
    parts = f"linear maps [out, in]: {listed(weights.values())}; other parts: {listed(others)}"
    return value_error("module", found=f"{type(module).__name__}, {why}; {parts}", expected=_EXPECTED, do=_REMEDY)


def _not_found(names: Mapping[str, str | None], activation: str | None) -> str:
    given = {f"{part}_name": name for part, name in names.items()} | {"activation": activation}
    told = ", ".join(f"{key}={value!r}" for key, value in given.items() if value)
    return f"in which no feed-forward network can be read{f' (with {told})' if told else ''}"


def _not_the_same(error: float | None, results: list[object]) -> str:
    returned = [r for r in results if not isinstance(r, Exception)]
    if error is not None:
        return (
            f"which computes something else than its maps allow (the best combination is off by {error:.2g} relative)"
        )
    if returned:
        shape = list(returned[0].shape) if isinstance(returned[0], Tensor) else type(returned[0]).__name__
        return f"which does not return a tensor of its input's shape [2, 4, d], but {shape}"
    return f"which cannot be run on an input [2, 4, d] ({type(results[0]).__name__}: {str(results[0])[:200]})"
