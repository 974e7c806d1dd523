"""Shows a plan to people: a rich table for terminals, Markdown for TensorBoard."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_mue.console import human, to_text
from lightning_mue.names import split_layer
from lightning_mue.parameterizations.planning.parameter_plan import ParameterPlan
from lightning_mue.parameterizations.rules.axes import Axes

_HEADERS = ("role", "size", "parameters", "shape", "init", "lr x", "wd x", "eps x", "update")


class PrintablePlan:
    """What of a plan is shown; `ScalingPlan` has these attributes and describes them."""

    rule: str
    family: str
    alpha: float
    axes: dict[str, float]
    base_axes: dict[str, float]
    betas: float
    parameters: tuple[ParameterPlan, ...]
    multipliers: dict[str, float]
    same_size: bool
    notes: tuple[str, ...]
    folded: dict[str, float]

    def __str__(self) -> str:
        return to_text(as_renderable(self))

    def __rich__(self) -> RenderableType:
        return as_renderable(self)


@dataclass
class _Line:
    """Parameters that the plan treats alike."""

    members: list[ParameterPlan]

    def cells(self) -> tuple[str, ...]:
        p, count = self.members[0], len(self.members)
        name = f"{count} x {split_layer(p.name)[0]}" if count > 1 else p.name
        shape = " x ".join(str(side) for side in p.shape) or "scalar"
        size = human(sum(math.prod(member.shape) for member in self.members))
        numbers = (f"{value:.4g}" for value in (p.lr, p.weight_decay, p.eps))
        return (p.role, size, name, shape, self._init(), *numbers, p.kind)

    def _init(self) -> str:
        kind = self.members[0].init.kind
        values = sorted(member.init.value for member in self.members)
        if kind == "keep":
            return "as it is"
        if kind == "constant":
            return f"= {values[0]:.4g}"
        tied = " tied" if self.members[0].tied else ""
        # Equal layers' stds are measured, so they differ by sampling noise.
        near = values[-1] <= 1.15 * values[0]
        return (f"std {values[len(values) // 2]:.3g}" if near else f"std {values[0]:.2g}-{values[-1]:.2g}") + tied


def _lines(plan: PrintablePlan) -> list[_Line]:
    lines: dict[tuple[object, ...], _Line] = {}
    for p in plan.parameters:
        constant = p.init.value if p.init.kind == "constant" else None
        key = (p.role, p.shape, p.init.kind, constant, p.lr, p.weight_decay, p.eps, p.kind)
        lines.setdefault(key, _Line([])).members.append(p)
    return list(lines.values())


def _sources(plan: PrintablePlan) -> list[str]:
    """Source of a row -> roles that take it, one line a source."""
    roles: dict[str, dict[str, None]] = {}
    for p in plan.parameters:
        roles.setdefault(p.source, {})[p.role] = None
    return [f"{source}: {', '.join(names)}" for source, names in roles.items()]


def headline(plan: PrintablePlan) -> str:
    """One line: the rule and what changed since the base."""
    axes, base_axes = Axes(**plan.axes), Axes(**plan.base_axes)
    moved = [f"{axis} {plan.base_axes[axis]:g} -> {plan.axes[axis]:g}" for axis in axes.changed(base_axes)]
    what = "target = base: nothing is changed" if plan.same_size else (", ".join(moved) or "same sizes")
    total = sum(math.prod(p.shape) for p in plan.parameters)
    return f"{plan.rule} ({plan.family}, alpha={plan.alpha:g}), {human(total)} parameters; {what}"


def _multipliers(plan: PrintablePlan) -> list[str]:
    """Equal multipliers of many layers, as one entry: 'blocks.*.residual_multiplier = 0.25'."""
    merged = {(split_layer(path)[0], f"{value:.4g}") for path, value in plan.multipliers.items()}
    folded = [f"{kind} x {value:.4g}, folded into weights" for kind, value in sorted(plan.folded.items())]
    return [f"{path} = {value}" for path, value in sorted(merged)] + folded


def as_renderable(plan: PrintablePlan) -> RenderableType:
    """The plan as something that ``rich`` prints."""
    table = Table(title=headline(plan), title_justify="left", title_style="bold", header_style="bold")
    for header in _HEADERS:
        right = header in ("size", "lr x", "wd x", "eps x")
        wraps = header == "parameters"
        table.add_column(header, justify="right" if right else "left", overflow="fold", no_wrap=not wraps)
    for line in _lines(plan):
        table.add_row(*line.cells())
    footer = [Text(f"forward multiplier  {entry}") for entry in _multipliers(plan)]
    if plan.betas != 1.0:
        footer.append(Text(f"1 - beta  x {plan.betas:.4g}"))
    footer += [Text(f"source  {entry}", style="dim") for entry in _sources(plan)]
    footer += [Text(f"note: {note}", style="yellow") for note in plan.notes]
    return Group(table, *footer)


def as_markdown(plan: PrintablePlan) -> str:
    """The plan as Markdown, for TensorBoard's text page."""
    rows = [" | ".join(_HEADERS), " | ".join("---" for _ in _HEADERS)]
    rows += [" | ".join(line.cells()) for line in _lines(plan)]
    extra = [f"* forward multiplier `{entry}`" for entry in _multipliers(plan)]
    extra += [f"* 1 - beta x {plan.betas:.4g}"] if plan.betas != 1.0 else []
    extra += [f"* source {entry}" for entry in _sources(plan)]
    extra += [f"* **note**: {note}" for note in plan.notes]
    return f"**{headline(plan)}**\n\n" + "\n".join(f"| {row} |" for row in rows) + "\n\n" + "\n".join(extra)
