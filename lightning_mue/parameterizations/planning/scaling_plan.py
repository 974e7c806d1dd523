"""The plan: what happens to each parameter of one model under one rule; prints as a table, saves to YAML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_mue.checks import brief, require_types, value_error
from lightning_mue.console import human, to_text
from lightning_mue.files import whole_file
from lightning_mue.parameterizations.planning import table
from lightning_mue.parameterizations.planning.parameter_plan import FoldedRows, ParameterPlan
from lightning_mue.parameterizations.reading.initial.initializer import Init
from lightning_mue.parameterizations.rules.axes import Axes
from lightning_mue.parameterizations.rules.kinds import ADAM_KINDS

__all__ = ["FoldedRows", "ParameterPlan", "ScalingPlan", "as_markdown", "headline"]


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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """A table with a line for parameters that are treated alike, its legend, and below it multipliers, sources and notes.

        On a narrow terminal names wrap, so that nothing is cut off, and the column of sizes makes way for them.
        """
        narrow = options.max_width < 100
        shown = Table(title=headline(self), title_justify="left", title_style="bold", header_style="bold")
        shown.box, shown.padding, shown.pad_edge = (
            (None, (0, 1, 0, 0), False) if narrow else (SIMPLE_HEAD, (0, 1), True)
        )
        kept = [i for i, header in enumerate(table.HEADERS) if not (narrow and header == "size")]
        for header in (table.HEADERS[i] for i in kept):
            right = header in ("size", "lr x", "wd x", "eps x")
            shown.add_column(header, justify="right" if right else "left", overflow="fold")
        for cells in table.lines(self.parameters):
            shown.add_row(*(cells[i] for i in kept))
        yield shown
        footer = [Text(line, style="dim") for line in table.legend(self.parameters)]
        footer += [Text(f"forward multiplier  {entry}") for entry in self._multiplier_lines()]
        footer += [Text(f"1 - beta  x {self.betas:.4g}")] if self._scales_betas() else []
        footer += [Text(f"source  {entry}", style="dim") for entry in self._source_lines()]
        footer += [Text(f"note: {note}", style="yellow") for note in self.notes]
        yield from footer

    def _multiplier_lines(self) -> list[str]:
        return table.multipliers(self.multipliers, self.folded, self.parameters)

    def _source_lines(self) -> list[str]:
        return [] if self.same_size else table.sources(self.parameters)

    def _scales_betas(self) -> bool:
        return self.betas != 1.0 and any(p.kind in ADAM_KINDS and p.trainable for p in self.parameters)

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
        made = cls(**{**plain, "parameters": parameters, "notes": tuple(plain["notes"])})
        for part in (made, *parameters):
            require_types(type(part).__init__, vars(part))  # type: ignore[misc]
        return made

    def save(self, path: str | Path) -> None:
        """Writes the plan as YAML, whole or not at all."""
        with whole_file(path) as part:
            part.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ScalingPlan:
        """Reads a plan that :meth:`save` wrote.

        Raises:
            ValueError: If there is no such file, or it is something else.
        """
        try:
            return cls.from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, KeyError, TypeError, ValueError) as error:
            found = f"the file {str(path)!r}, which cannot be read as one ({brief(error)})"
            raise value_error("path", found=found, expected="what ScalingPlan.save wrote") from error

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


def headline(plan: ScalingPlan) -> str:
    """One line: the rule and what changed since the base."""
    axes, base_axes = Axes(**plan.axes), Axes(**plan.base_axes)
    moved = [f"{axis} {plan.base_axes[axis]:g} -> {plan.axes[axis]:g}" for axis in axes.changed(base_axes)]
    what = "target = base: nothing is changed" if plan.same_size else (", ".join(moved) or "same sizes")
    total = sum(math.prod(p.shape) for p in plan.parameters)
    return f"{plan.rule} ({plan.family}, alpha={plan.alpha:g}), {human(total)} parameters; {what}"


def as_markdown(plan: ScalingPlan) -> str:
    """The plan as Markdown, for TensorBoard's text page."""
    rows = [" | ".join(table.HEADERS), " | ".join("---" for _ in table.HEADERS)]
    # Markdown would take the stars for emphasis.
    rows += [" | ".join(cell.replace("*", r"\*") for cell in cells) for cells in table.lines(plan.parameters)]
    extra = [f"* {line}" for line in table.legend(plan.parameters)]
    extra += [f"* forward multiplier `{entry}`" for entry in plan._multiplier_lines()]
    extra += [f"* 1 - beta x {plan.betas:.4g}"] if plan._scales_betas() else []
    extra += [f"* source {entry}" for entry in plan._source_lines()]
    extra += [f"* **note**: {note}" for note in plan.notes]
    return f"**{headline(plan)}**\n\n" + "\n".join(f"| {row} |" for row in rows) + "\n\n" + "\n".join(extra)
