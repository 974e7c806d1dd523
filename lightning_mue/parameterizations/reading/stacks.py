"""Stacks of layers: which numbers in the names of parameters count layers, and which count modules that stand side by side.

A list inside a layer may hold layers (the blocks of a stage), parallel modules (experts in groups), the branches of one block,
or the parts of an ``nn.Sequential``; its elements' contents tell which, and where they cannot, `unclear_lists` says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from lightning_mue.names import all_indices, in_attention
from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.rules.roles import MATRIX_ROLES, Role

#: Usual names of lists whose elements follow one another.
_SEQUENTIAL = frozenset({"blocks", "block", "layers", "layer", "levels", "stages", "resnets", "units", "h"})
_NORMS = (Role.NORM, Role.FINAL_NORM)


class Stacks:
    """The lists of a model's modules, from the names of its parameters.

    A list is named by the path of its elements without numbers: ``layers.*.groups.*`` (an expert's number is ``each``).
    """

    def __init__(self, infos: Iterable[ParameterInfo]) -> None:
        self.infos = list(infos)
        self._inside: dict[str, list[ParameterInfo]] = defaultdict(list)
        for info in self.infos:
            parts = all_indices(info.name).split(".")
            for i, part in enumerate(parts):
                if part in ("*", "each"):
                    self._inside[".".join(parts[: i + 1])].append(info)
        self.unclear: set[str] = set()
        self._holds_layers = {element: self._judge(element) for element in self._inside}

    def _judge(self, element: str) -> bool:
        """Whether the elements of a list are layers."""
        *around, name, last = ["", *element.split(".")]
        if last == "each" or "each" in around or name == "heads":
            return False
        outer = _outer(element)
        if not outer:
            return True
        inside = self._inside[element]
        if _direct(element, inside) or self._are_branches(element):
            return False
        if name in _SEQUENTIAL or any(in_attention(_rest(info, element)) for info in inside):
            return True
        beside = [info for info in self._inside[outer] if not f"{all_indices(info.name)}.".startswith(f"{element}.")]
        block = any(info.role in _NORMS or in_attention(_rest(info, outer)) for info in beside)
        normed = any(info.role in _NORMS for info in inside)
        experts = any("each" in _rest(info, element, names=all_indices(info.name)).split(".") for info in inside)
        if block and (normed or not experts):
            self.unclear.add(element)
        return normed or not (block or experts)

    def _are_branches(self, element: str) -> bool:
        """True if no two elements of a list hold the same parts: the branches of one block (T5's ``block.*.layer.*``)."""
        holders: dict[tuple[str, str], set[str]] = defaultdict(set)
        for info in self._inside[element]:
            path, rest = _split(info.name, element)
            holders[path.rpartition(".")[0], rest].add(path)
        lists: dict[str, set[str]] = defaultdict(set)
        for (where, _), paths in holders.items():
            lists[where] |= paths
        alike = any(len(paths) > 1 for (_, rest), paths in holders.items() if "norm" not in rest)
        return not alike and any(len(paths) > 1 for paths in lists.values())

    def layer(self, name: str) -> str:
        """The innermost layer that a parameter or module lies in, as a path ending in its number; empty outside layers."""
        parts, names = all_indices(name).split("."), name.split(".")
        for i in range(len(parts), 0, -1):
            if parts[i - 1] == "*" and self._holds_layers.get(".".join(parts[:i]), False):
                return ".".join(names[:i])
        return ""

    def is_stage(self, layer: str) -> bool:
        """Whether a layer holds layers itself."""
        outer = all_indices(layer)
        return any(holds and _outer(element).startswith(outer) for element, holds in self._holds_layers.items())

    def depths(self) -> dict[str, int]:
        """List of layers -> how many layers with matrices it has; in nested lists, all of them together."""
        found: dict[str, set[str]] = defaultdict(set)
        for info in self.infos:
            # A matrix between the blocks of two stages makes no layer.
            between = info.role is Role.HIDDEN and not in_attention(info.path)
            if (
                info.role in MATRIX_ROLES
                and (layer := self.layer(info.name))
                and not (between and self.is_stage(layer))
            ):
                found[all_indices(layer)].add(layer)
        depths = {}
        for element, layers in found.items():
            numbers = {int(layer.rpartition(".")[2]) for layer in layers}
            # Numbers with gaps are linear layers between activations.
            gaps = _direct(element, self._inside[element]) and numbers != set(range(len(numbers)))
            if not gaps:
                depths[element.removesuffix("*")] = len(layers)
        return depths

    def counts(self) -> dict[str, int]:
        """Unclear list -> the largest number of elements that one layer has of it."""
        counts = {}
        for element in self.unclear:
            members: dict[str, set[str]] = defaultdict(set)
            for info in self._inside[element]:
                path, _ = _split(info.name, element)
                members[path.rpartition(".")[0]].add(path)
            counts[element] = max(len(paths) for paths in members.values())
        return counts


def stack_depths(infos: Iterable[ParameterInfo]) -> dict[str, int]:
    """Name of each stack of equal layers (an encoder, a decoder, ...) -> number of its layers; those of nested stacks multiply."""
    return Stacks(infos).depths()


def count_experts(infos: Iterable[ParameterInfo]) -> int:
    """The largest number of routed experts in one layer, in lists, stacks, groups, and experts of experts together."""
    infos = list(infos)
    stacks, counts = Stacks(infos), dict[tuple[str, str], int]()
    for info in infos:
        if info.role is Role.EXPERT_DOWN and len(info.shape) >= 2:
            layer = stacks.layer(info.name)
            key = layer, all_indices(info.name)
            counts[key] = counts.get(key, 0) + (info.shape[0] if len(info.shape) == 3 and info.form == "raw" else 1)
    return max(counts.values(), default=0)


def unclear_lists(target: Iterable[ParameterInfo], base: Iterable[ParameterInfo]) -> dict[str, tuple[int, int]]:
    """Lists whose elements may be layers or stand side by side -> their length in (target, base), where it differs."""
    mine, theirs = Stacks(target).counts(), Stacks(base).counts()
    lengths = {element: (mine.get(element, 1), theirs.get(element, 1)) for element in {**mine, **theirs}}
    return {element: pair for element, pair in sorted(lengths.items()) if pair[0] != pair[1]}


def _outer(element: str) -> str:
    """The element of a list around this one; empty for the outermost."""
    around = element.split(".")[:-1]
    last = max((i for i, part in enumerate(around) if part in ("*", "each")), default=-1)
    return ".".join(around[: last + 1])


def _split(name: str, element: str) -> tuple[str, str]:
    """(path of the element that a name lies in, the name inside it)."""
    parts, n = name.split("."), element.count(".") + 1
    return ".".join(parts[:n]), ".".join(parts[n:])


def _rest(info: ParameterInfo, element: str, names: str | None = None) -> str:
    return _split(info.name if names is None else names, element)[1]


def _direct(element: str, inside: Iterable[ParameterInfo]) -> bool:
    """True for a list of single matrices, e.g. the linear layers in an ``nn.Sequential``."""
    return any(info.role in MATRIX_ROLES and "." not in _rest(info, element) for info in inside)
