"""Which sizes make an axis: all that differ from the base in the same names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from lightning_mue.analysis.cells import SizeTable
from lightning_mue.analysis.trials import Value
from lightning_mue.checks import listed, value_error

FROM_DENSE = "dense -> MoE"
#: Names that mean nothing in a dense model: they move with n_experts and are no axis of their own there.
_OF_EXPERTS = {
    *("n_experts", "top_k", "expert_width", "n_expert_groups", "gate", "moe_every", "ffn_width", "active_width"),
    *("n_shared_experts", "shared_expert_width", "shared_width", "num_experts", "num_local_experts"),
    *("num_experts_per_tok", "moe_intermediate_size"),
}
_COUNTS = ("n_experts", "num_experts", "num_local_experts")


class AxisCells(NamedTuple):
    """Sizes of one rule that differ from the base in the same names.

    Attributes:
        name: The names, joined by "+".
        cells: The base, then the others, by size.
        labels: Of each cell: its values of the names.
        ratios: N of each: the geometric mean of the ratios to the base, 1 for the base; NaN for names without an order.
    """

    name: str
    cells: list[SizeTable]
    labels: list[str]
    ratios: list[float]


def find_base(sizes: Sequence[Mapping[str, Value]], base: Mapping[str, Value] | None) -> Mapping[str, Value]:
    """The size of the tuned cell: the smallest of those that agree with `base`.

    Raises:
        ValueError: If no size agrees.
    """
    chosen = [dict(size) for size in sizes if all(size.get(name) == value for name, value in (base or {}).items())]
    if not chosen:
        known = listed(list(dict.fromkeys(str(dict(size)) for size in sizes)))
        raise value_error("base", found=dict(base or {}), expected=f"a size of the trials ({known})")
    return min(chosen, key=lambda size: sum(math.log2(max(_number(v), 1.0)) for v in size.values()))


def axes_of(rule: str, cells: Sequence[SizeTable], base_size: Mapping[str, Value]) -> Iterator[AxisCells]:
    """The axes of one rule's cells.

    Raises:
        ValueError: If the base is not among them, or alone.
    """
    base = next((cell for cell in cells if dict(cell.size) == base_size), None)
    if base is None or len(cells) < 2:
        found = f"only {listed([cell.label for cell in cells])} for rule {rule}"
        expected = f"the base ({dict(base_size)}) and at least one other size"
        raise value_error("trials", found=found, expected=expected, do="Sweep both, or give another base.")
    groups: dict[tuple[str, ...], list[SizeTable]] = {}
    for cell in cells:
        if cell is not base:
            groups.setdefault(_moved(dict(base.size), dict(cell.size)), []).append(cell)
    by_name: dict[str, list[SizeTable]] = {}
    for moved, members in groups.items():
        by_name.setdefault(_name(moved, dict(base.size)), []).extend(members)
    for name, members in by_name.items():
        names = sorted({n for cell in members for n in _moved(dict(base.size), dict(cell.size))})
        # From dense, several names that move in their own ways are no single size.
        ordered_names = FROM_DENSE not in name or len(names) == 1
        ratios = {
            id(cell): _ratio(names, dict(base.size), dict(cell.size)) if ordered_names else math.nan for cell in members
        }
        ordered = [base, *sorted(members, key=lambda cell: (ratios[id(cell)], cell.label))]
        labels = [", ".join(f"{n}={dict(cell.size).get(n)}" for n in names) for cell in ordered]
        yield AxisCells(name, ordered, labels, [1.0, *(ratios[id(cell)] for cell in ordered[1:])])


def _moved(base: Mapping[str, Value], size: Mapping[str, Value]) -> tuple[str, ...]:
    return tuple(name for name in sorted({*base, *size}) if base.get(name) != size.get(name))


def _name(moved: Sequence[str], base: Mapping[str, Value]) -> str:
    if not any(name in moved and base.get(name) in (0, None) for name in _COUNTS):
        return "+".join(moved)
    return "+".join([*(name for name in moved if name not in _OF_EXPERTS), FROM_DENSE])


def _ratio(names: Sequence[str], base: Mapping[str, Value], size: Mapping[str, Value]) -> float:
    """N, the geometric mean over the names; a dense FFN counts as one expert."""
    logs = []
    for name in names:
        pair = [
            1.0 if name in _COUNTS and of.get(name) in (0, None) else _number(of.get(name), math.nan)
            for of in (base, size)
        ]
        if not min(pair) > 0:
            return math.nan
        logs.append(math.log2(pair[1] / pair[0]))
    return 2.0 ** (sum(logs) / len(logs))


def _number(value: Value, otherwise: float = 1.0) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else otherwise
