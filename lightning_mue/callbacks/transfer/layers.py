"""The place of a parameter or module in a model: a quartile of the depth, or outside of all layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from lightning_mue.names import split_layer

#: The place of what is in no layer.
OUTSIDE = "outside"


class Layers:
    """Maps qualified names to places, by their layer index and the number of layers in their stack.

    Args:
        names: Qualified names of all parameters.

    Attributes:
        depths: Place ("q1" to "q4") -> mean relative depth of the layers in it, in (0, 1).
        numbers: Place -> the layers in it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._counts: dict[str, int] = defaultdict(int)
        found = [split for name in names if (split := _split(name)) is not None]
        for stack, index in found:
            self._counts[stack] = max(self._counts[stack], index + 1)
        by_place: dict[str, set[tuple[str, int]]] = defaultdict(set)
        for stack, index in found:
            by_place[self._quartile(stack, index)].add((stack, index))
        self.numbers = {place: sorted({i for _, i in layers}) for place, layers in by_place.items()}
        self.depths = {
            place: sum((i + 0.5) / self._counts[stack] for stack, i in layers) / len(layers)
            for place, layers in by_place.items()
        }

    def place(self, name: str) -> str:
        """The place of a name: one of the quartiles, or "outside"."""
        split = _split(name)
        return OUTSIDE if split is None or split[0] not in self._counts else self._quartile(*split)

    def count(self, name: str) -> int:
        """Layers of the stack that a name is in; 1 outside of any."""
        split = _split(name)
        return 1 if split is None else max(1, self._counts.get(split[0], 1))

    def _quartile(self, stack: str, index: int) -> str:
        return f"q{1 + int(4 * (index + 0.5) / self._counts[stack])}"


def _split(name: str) -> tuple[str, int] | None:
    template, layer = split_layer(name)
    return None if layer < 0 else (template.partition("*")[0], layer)
