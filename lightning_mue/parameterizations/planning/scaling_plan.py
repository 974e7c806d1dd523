"""The plan: what happens to each parameter of one model under one rule; prints as a table, saves to YAML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_mue.console import human, to_text
from lightning_mue.names import split_layer
from lightning_mue.parameterizations.reading.initializer import Init
from lightning_mue.parameterizations.rules.axes import Axes

_HEADERS = ("role", "size", "parameters", "shape", "init", "lr x", "wd x", "eps x", "update")


@dataclass(frozen=True)
class FoldedRows:
    """A forward multiplier that some rows of a parameter carry: those of a fused matrix that make an attention's queries.

    The rows are drawn ``factor`` times as large, and trained as if the multiplier stood behind them (`ScaledStep`).

    Attributes:
        dim: The dimension of the parameter that has the rows.
        count: The first so many of them ...
        period: ... of every so many.
        factor: The multiplier.
    """

    dim: int
    count: int
    period: int
    factor: float


@dataclass(frozen=True)
class ParameterPlan:
    """What happens to one parameter.

    Attributes:
        name: Fully qualified name.
        role: Its role.
        shape: Its shape.
        base: The base's parameter that it scales from, or None (a router whose base is dense).
        init: How it is drawn.
        lr: Factor on the group's learning rate.
        weight_decay: Factor on the group's weight decay.
        eps: Factor on Adam's epsilon.
        kind: The update it gets (``adamw``, ``sgd``, ``sphere``, ``adam_sphere``, ``muon``).
        source: The paper of its row, with table or section, and the page of docs/ that derives it.
        base_shape: Shape of the base's parameter; of its hidden matrices for one that the base lacks.
        tied: Every expert of the layer starts from the same draw.
        rows: Some of its rows carry a forward multiplier. The other fields hold for the parameter without it.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    base: str | None
    init: Init
    lr: float
    weight_decay: float
    eps: float
    kind: str
    source: str
    base_shape: tuple[int, ...] | None = None
    tied: bool = False
    rows: FoldedRows | None = None


@dataclass(frozen=True)
class ScalingPlan:
    """A rule applied to one model and one base: prints as a table, saves to YAML, diffs against another.

    Attributes:
        rule: Name of the rule.
        family: Optimizer family, ``adam``, ``sgd``, ``sphere`` or ``muon``.
        alpha: Depth exponent.
        axes: Sizes of the target.
        base_axes: Sizes of the base.
        betas: Factor on ``1 - beta`` of Adam's betas.
        parameters: One entry a trainable parameter.
        multipliers: Dotted attribute path -> forward multiplier that the target gets.
        same_size: True if target and base are the same model and run: the plan then changes nothing.
        notes: Warnings for people, e.g. an axis that the rule does not claim.
        folded: Kind of forward multiplier -> its value over the base's, where no module exposes it and it went into weights.
    """

    rule: str
    family: str
    alpha: float
    axes: dict[str, float]
    base_axes: dict[str, float]
    betas: float
    parameters: tuple[ParameterPlan, ...]
    multipliers: dict[str, float] = field(default_factory=dict)
    same_size: bool = False
    notes: tuple[str, ...] = ()
    folded: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> ParameterPlan:
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise KeyError(name)

    def __str__(self) -> str:
        return to_text(self)

    def __rich__(self) -> RenderableType:
        """A table with a line for parameters that are treated alike, and below it multipliers, sources and notes."""
        table = Table(title=headline(self), title_justify="left", title_style="bold", header_style="bold")
        for header in _HEADERS:
            right = header in ("size", "lr x", "wd x", "eps x")
            table.add_column(
                header, justify="right" if right else "left", overflow="fold", no_wrap=header != "parameters"
            )
        for cells in _lines(self):
            table.add_row(*cells)
        footer = [Text(f"forward multiplier  {entry}") for entry in _multipliers(self)]
        if self.betas != 1.0:
            footer.append(Text(f"1 - beta  x {self.betas:.4g}"))
        footer += [Text(f"source  {entry}", style="dim") for entry in _sources(self)]
        footer += [Text(f"note: {note}", style="yellow") for note in self.notes]
        return Group(table, *footer)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, so that it can go into a checkpoint that loads with ``weights_only=True``, or into YAML."""
        plain = asdict(self)
        plain["notes"], plain["parameters"] = list(self.notes), list(plain["parameters"])
        for p in plain["parameters"]:
            p["shape"] = list(p["shape"])
            p["base_shape"] = list(p["base_shape"]) if p["base_shape"] is not None else None
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ScalingPlan:
        """The inverse of :meth:`to_dict`."""
        parameters = tuple(map(_parameter, plain["parameters"]))
        return cls(**{**plain, "parameters": parameters, "notes": tuple(plain["notes"])})

    def save(self, path: str | Path) -> None:
        """Writes the plan as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ScalingPlan:
        """Reads a plan that :meth:`save` wrote."""
        return cls.from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))

    def diff(self, other: ScalingPlan, *, init: bool = True) -> list[str]:
        """Lines ``what: mine -> other's`` for everything in which two plans differ; empty if they train alike.

        Args:
            other: The plan to compare with.
            init: Compare the initialization too. It is measured, so its last digits depend on the machine; once weights
                exist it no longer matters.
        """
        lines = _differences("", ("rule", "family", "alpha", "betas"), self, other)
        for key in ("axes", "base_axes", "folded"):
            mine, theirs = getattr(self, key), getattr(other, key)
            lines += [f"{key}.{line}" for line in _changed_values(mine, theirs, {**mine, **theirs})]
        lines += _changed_values(self.multipliers, other.multipliers, sorted({*self.multipliers, *other.multipliers}))
        keys = ("role", "shape", *(["init", "tied"] if init else []), "lr", "weight_decay", "eps", "kind", "rows")
        ours, others = ({p.name: p for p in plan.parameters} for plan in (self, other))
        for name in dict.fromkeys([*ours, *others]):
            old, new = ours.get(name), others.get(name)
            if old is None or new is None:
                lines.append(f"{name}: {'absent -> present' if old is None else 'present -> absent'}")
            else:
                lines += _differences(f"{name}.", keys, old, new)
        return lines


def _parameter(plain: Mapping[str, Any]) -> ParameterPlan:
    base_shape = tuple(plain["base_shape"]) if plain.get("base_shape") is not None else None
    rows = FoldedRows(**plain["rows"]) if plain.get("rows") is not None else None  # older plans have none
    changed = {"shape": tuple(plain["shape"]), "base_shape": base_shape, "init": Init(**plain["init"]), "rows": rows}
    return ParameterPlan(**{**plain, **changed})


def _differences(prefix: str, attributes: Iterable[str], mine: object, theirs: object) -> list[str]:
    pairs = ((name, getattr(mine, name), getattr(theirs, name)) for name in attributes)
    return [f"{prefix}{name}: {old} -> {new}" for name, old, new in pairs if old != new]


def _changed_values(mine: Mapping[str, float], theirs: Mapping[str, float], names: Iterable[str]) -> list[str]:
    return [f"{name}: {mine.get(name)} -> {theirs.get(name)}" for name in names if mine.get(name) != theirs.get(name)]


def _lines(plan: ScalingPlan) -> list[tuple[str, ...]]:
    """Cells of the table: one line for parameters that the plan treats alike."""
    alike: dict[tuple[object, ...], list[ParameterPlan]] = {}
    for p in plan.parameters:
        constant = p.init.value if p.init.kind == "constant" else None
        key = (p.role, p.shape, p.init.kind, constant, p.lr, p.weight_decay, p.eps, p.kind, p.rows)
        alike.setdefault(key, []).append(p)
    return [_cells(members) for members in alike.values()]


def _cells(members: Sequence[ParameterPlan]) -> tuple[str, ...]:
    p, count = members[0], len(members)
    name = f"{count} x {split_layer(p.name)[0]}" if count > 1 else p.name
    shape = " x ".join(str(side) for side in p.shape) or "scalar"
    size = human(sum(math.prod(member.shape) for member in members))
    numbers = (f"{value:.4g}" for value in (p.lr, p.weight_decay, p.eps))
    return (p.role, size, name, shape, _init(members), *numbers, p.kind)


def _init(members: Sequence[ParameterPlan]) -> str:
    kind = members[0].init.kind
    values = sorted(member.init.value for member in members)
    if kind == "keep":
        return "as it is"
    if kind == "constant":
        return f"= {values[0]:.4g}"
    tied = " tied" if members[0].tied else ""
    # Equal layers' stds are measured, so they differ by sampling noise.
    near = values[-1] <= 1.15 * values[0]
    return (f"std {values[len(values) // 2]:.3g}" if near else f"std {values[0]:.2g}-{values[-1]:.2g}") + tied


def _sources(plan: ScalingPlan) -> list[str]:
    """Source of a row -> roles that take it, one line a source."""
    roles: dict[str, dict[str, None]] = {}
    for p in plan.parameters:
        roles.setdefault(p.source, {})[p.role] = None
    return [f"{source}: {', '.join(names)}" for source, names in roles.items()]


def headline(plan: ScalingPlan) -> str:
    """One line: the rule and what changed since the base."""
    axes, base_axes = Axes(**plan.axes), Axes(**plan.base_axes)
    moved = [f"{axis} {plan.base_axes[axis]:g} -> {plan.axes[axis]:g}" for axis in axes.changed(base_axes)]
    what = "target = base: nothing is changed" if plan.same_size else (", ".join(moved) or "same sizes")
    total = sum(math.prod(p.shape) for p in plan.parameters)
    return f"{plan.rule} ({plan.family}, alpha={plan.alpha:g}), {human(total)} parameters; {what}"


def _multipliers(plan: ScalingPlan) -> list[str]:
    """Equal multipliers of many layers, as one entry: 'blocks.*.residual_multiplier = 0.25'."""
    merged = {(split_layer(path)[0], f"{value:.4g}") for path, value in plan.multipliers.items()}
    folded = [f"{kind} x {value:.4g}, folded into weights" for kind, value in sorted(plan.folded.items())]
    return [f"{path} = {value}" for path, value in sorted(merged)] + folded


def as_markdown(plan: ScalingPlan) -> str:
    """The plan as Markdown, for TensorBoard's text page."""
    rows = [" | ".join(_HEADERS), " | ".join("---" for _ in _HEADERS)]
    rows += [" | ".join(cells) for cells in _lines(plan)]
    extra = [f"* forward multiplier `{entry}`" for entry in _multipliers(plan)]
    extra += [f"* 1 - beta x {plan.betas:.4g}"] if plan.betas != 1.0 else []
    extra += [f"* source {entry}" for entry in _sources(plan)]
    extra += [f"* **note**: {note}" for note in plan.notes]
    return f"**{headline(plan)}**\n\n" + "\n".join(f"| {row} |" for row in rows) + "\n\n" + "\n".join(extra)
