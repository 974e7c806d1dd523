"""Fits slopes of log rms against log size, and decides which of them pass."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from lightning_mue.analysis.probe import STREAM
from lightning_mue.names import all_indices, is_numbered_layer, split_layer

Status = Literal["pass", "FAIL", "settles", "non-finite", "zero", "one size", ""]


@dataclass(frozen=True)
class Record:
    """One measurement, as a line of the CSV.

    Attributes:
        size: Position on the x axis.
        seed: Seed of the run.
        step: Optimizer steps taken before the measurement.
        name: Parameter (for ``update``) or module.
        role: Role of the parameter; ``residual stream`` for the output of a numbered layer.
        quantity: ``update``, ``change``, ``propagated``, ``output``, ``coherent`` (see probe.py) or ``loss``.
        rms: Root mean square; the loss itself for ``loss``.
        base: The base's parameter from which this one is scaled; None for a module, or without one.
    """

    size: float
    seed: int
    step: int
    name: str
    role: str
    quantity: str
    rms: float
    base: str | None = None


@dataclass(frozen=True)
class Slope:
    """How one quantity of one layer grows with size; layers whose names differ by the index alone are one line.

    Attributes:
        name: Name with indices replaced, e.g. ``blocks.*.ffn.w_up``; if the depth varies, with the relative position.
        role: Role, as in :class:`Record`.
        quantity: What was measured.
        step: The step of the measurement.
        sizes: Sizes at which there is a value, ascending.
        rms: Geometric mean over seeds and layers at each of them.
        slope: Least-squares slope of log2 rms against log2 size; NaN where there is none.
        error: Its standard error over seeds; NaN for one seed.
        lower: The slope over the lower half of the sizes.
        upper: The slope over the upper half.
        decides: Whether the verdict depends on it.
        status: ``pass``, ``FAIL``, ``settles`` (see `fit_slopes`), or why there is no slope; empty if it does not decide.
        zeros: Measurements that were exactly zero, which have no logarithm and are left out.
    """

    name: str
    role: str
    quantity: str
    step: int
    sizes: tuple[float, ...]
    rms: tuple[float, ...]
    slope: float
    error: float
    lower: float
    upper: float
    decides: bool
    status: Status
    zeros: int = 0


@dataclass
class _LogValues:
    """Measurements of one line of the table: log2 of the values (size -> seed -> layers), and how many have no logarithm."""

    role: str
    logs: dict[float, dict[int, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    zeros: int = 0
    broken: int = 0


def fit_slope(sizes: Sequence[float], logs: Sequence[float]) -> float:
    """Least-squares slope of ``logs`` (log2 of a value) against log2 of ``sizes``; NaN for fewer than two sizes.

    Example:
        >>> round(fit_slope([1, 2, 4], [0.0, 0.5, 1.0]), 6)
        0.5
    """
    if len(sizes) < 2:
        return math.nan
    x = np.log2(np.asarray(sizes, dtype=float))
    y = np.asarray(logs, dtype=float)
    return float(((x - x.mean()) * (y - y.mean())).sum() / np.square(x - x.mean()).sum())


def common_prefix(names: Iterable[str]) -> str:
    """The longest common beginning of dotted names, e.g. ``transformer.``; every name keeps at least its last part.

    Example:
        >>> common_prefix(["net.blocks.*.w", "net.head"])
        'net.'
    """
    shared = []
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(f"{parts[0]}.")
    return "".join(shared)


def fit_slopes(records: Iterable[Record], *, step: int, tolerance: float, depth_moves: bool) -> list[Slope]:
    """Fits every line of the table at one step: failing ones first, then the deciding ones by absolute slope.

    With `depth_moves`, layers are compared at equal relative positions, and only the residual stream and the logits decide.

    The change of the logits that shrinks by more than the tolerance ``settles`` if its ``coherent`` part keeps its size: what
    shrinks is the answer of the random initial unembedding, which a sound rule lets vanish as d^-1/2. It does not fail.
    """
    at_step = [record for record in records if record.step == step and record.quantity != "loss"]
    lines = _lines(at_step, depth_moves)
    has_stream = any(line.role == STREAM for line in lines.values())
    slopes = [
        _fit(name, quantity, step, line, _decides(quantity, line.role, depth_moves, has_stream), tolerance)
        for (name, quantity), line in lines.items()
    ]
    coherent = {s.name: s for s in slopes if s.quantity == "coherent"}
    slopes = [replace(s, status="settles") if _settles(s, coherent.get(s.name), tolerance) else s for s in slopes]
    return sorted(slopes, key=_worst_first)


def _settles(slope: Slope, coherent: Slope | None, tolerance: float) -> bool:
    """Whether a line that shrinks does so only because of a part that vanishes by design."""
    if slope.quantity != "change" or slope.status != "FAIL" or slope.slope > 0 or coherent is None:
        return False
    # A difference of two squares is noisier than they are: its own error over seeds counts.
    return abs(coherent.slope) <= tolerance + (coherent.error if math.isfinite(coherent.error) else 0.0)


def _decides(quantity: str, role: str, depth_moves: bool, has_stream: bool) -> bool:
    """Whether the verdict depends on a line: every parameter's update, the change of the residual stream and of the logits.

    Along the depth the updates of single parameters shrink or grow by design (L^(alpha-1)), so only their sum counts. A
    module without numbered layers has no residual stream: then every module's change counts.
    """
    if quantity == "update":
        return not depth_moves
    return quantity == "change" and (role in (STREAM, "unembedding") or not has_stream)


def _lines(records: list[Record], depth_moves: bool) -> dict[tuple[str, str], _LogValues]:
    sizes = {record.size for record in records}
    present: dict[str, set[float]] = defaultdict(set)
    for record in records:
        present[all_indices(record.name)].add(record.size)
    positions = _Positions(records) if depth_moves else None
    lines: dict[tuple[str, str], _LogValues] = {}
    for record in records:
        name = all_indices(record.name)
        if record.base is not None and present[name] != sizes:
            name = all_indices(record.base)  # a dense FFN at one size, experts at another: the same line
        if positions is not None:
            label = positions.label(record)
            if label is None:
                continue
            name += label
        line = lines.setdefault((name, record.quantity), _LogValues(record.role))
        if not math.isfinite(record.rms):
            line.broken += 1
        elif record.rms == 0.0:
            line.zeros += 1
        else:
            line.logs[record.size][record.seed].append(math.log2(record.rms))
    return lines


class _Positions:
    """Relative positions of layers: as many as the shallowest model has layers, so that equal positions are compared."""

    def __init__(self, records: list[Record]) -> None:
        self.depths: dict[float, int] = defaultdict(int)
        for record in records:
            if record.quantity == "change" and is_numbered_layer(record.name):
                self.depths[record.size] = max(self.depths[record.size], split_layer(record.name)[1] + 1)
        self.least = min(self.depths.values(), default=0)

    def label(self, record: Record) -> str | None:
        """`` @ 1/2`` for a layer at half depth, empty outside the layers, None for a layer between two positions."""
        depth = self.depths.get(record.size, 0)
        if "*" not in all_indices(record.name) or depth == 0:
            return ""
        layer = split_layer(record.name)[1]
        for position in range(1, self.least + 1):
            if layer == round(position * depth / self.least) - 1:
                return f" @ {position}/{self.least}"
        return None


def _fit(name: str, quantity: str, step: int, line: _LogValues, decides: bool, tolerance: float) -> Slope:
    by_size = {size: {s: float(np.mean(v)) for s, v in seeds.items()} for size, seeds in sorted(line.logs.items())}
    sizes, logs = list(by_size), [float(np.mean(list(seeds.values()))) for seeds in by_size.values()]
    half = (len(sizes) + 1) // 2
    slope = fit_slope(sizes, logs)
    status: Status = "pass" if abs(slope) <= tolerance else "FAIL"
    if line.broken:
        slope, status = math.nan, "non-finite"
    elif not sizes:
        status = "zero"
    elif len(sizes) < 2:
        status = "one size"
    fails = status == "non-finite"  # in any line
    return Slope(
        name=name,
        role=line.role,
        quantity=quantity,
        step=step,
        sizes=tuple(sizes),
        rms=tuple(2.0**log for log in logs),
        slope=slope,
        error=_error_over_seeds(by_size),
        lower=fit_slope(sizes[:half], logs[:half]),
        upper=fit_slope(sizes[-half:], logs[-half:]),
        decides=decides or fails,
        status=status if decides or fails else "",
        zeros=line.zeros,
    )


def _error_over_seeds(by_size: dict[float, dict[int, float]]) -> float:
    seeds = set.intersection(*(set(seeds) for seeds in by_size.values())) if by_size else set()
    slopes = [fit_slope(list(by_size), [by_size[size][seed] for size in by_size]) for seed in sorted(seeds)]
    return float(np.std(slopes, ddof=1) / len(slopes) ** 0.5) if len(slopes) > 1 else math.nan


def _worst_first(slope: Slope) -> tuple[bool, bool, float]:
    bad = slope.status in ("FAIL", "non-finite")
    return (not bad, not slope.decides, -abs(slope.slope) if math.isfinite(slope.slope) else -math.inf if bad else 0.0)
