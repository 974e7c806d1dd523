"""The result of a coordinate check: a verdict, a table, a CSV file and a plot."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_mue.analysis.plots import plot_slopes
from lightning_mue.analysis.slopes import Record, Slope, common_prefix, fit_slopes
from lightning_mue.checks import require_choice
from lightning_mue.console import to_text
from lightning_mue.files import whole_file


@dataclass(frozen=True)
class CoordinateCheck:
    """The result of a coordinate check. Prints as a table with ``rich.print``.

    Attributes:
        rule: Name of the rule.
        family: Optimizer family.
        axis: Name of the x axis.
        sizes: Position on the x axis -> the model's overrides.
        seeds: Seeds of the runs.
        measured: Steps after which was measured, ascending; the verdict is that of the last.
        tolerance: Largest absolute slope that passes.
        depth_moves: Whether the models differ in depth; then only the residual stream and the logits decide.
        records: Every measurement.
        unseen: Parameters that the probe batch does not reach.
        notes: Notes of the plans, e.g. that a rule does not claim this axis.
    """

    rule: str
    family: str
    axis: str
    sizes: Mapping[float, Mapping[str, Any]]
    seeds: tuple[int, ...]
    measured: tuple[int, ...]
    tolerance: float
    depth_moves: bool
    records: tuple[Record, ...]
    unseen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def slopes(self, step: int | None = None) -> list[Slope]:
        """The slopes of every layer and quantity, worst first.

        Args:
            step: One of ``measured``; by default the last.

        Raises:
            ValueError: Nothing was measured at this step.
        """
        step = self.measured[-1] if step is None else step
        require_choice("step", step, self.measured, do="These are the measured steps.")
        return fit_slopes(self.records, step=step, tolerance=self.tolerance, depth_moves=self.depth_moves)

    @property
    def passed(self) -> bool:
        """Whether there are slopes that decide, all lie within the tolerance or settle, and nothing is infinite or NaN."""
        deciding = [slope for slope in self.slopes() if slope.decides]
        failed = any(slope.status in ("FAIL", "non-finite") for slope in deciding)
        return not failed and not self._broken_loss() and any(slope.status == "pass" for slope in deciding)

    def _broken_loss(self) -> bool:
        return any(r.quantity == "loss" and not math.isfinite(r.rms) for r in self.records)

    @property
    def verdict(self) -> str:
        """One line: PASSED or FAILED, and the reason."""
        deciding = [slope for slope in self.slopes() if slope.decides]
        judged = [slope for slope in deciding if slope.status in ("pass", "FAIL")]
        bad = [slope for slope in deciding if slope.status in ("FAIL", "non-finite")]
        what = f"{self.rule} along {self.axis} = {', '.join(f'{x:g}' for x in self.sizes)}"
        if self.passed:
            worst = max(judged, key=lambda slope: abs(slope.slope))
            return (
                f"PASSED: {what}: all {len(judged)} slopes within +-{self.tolerance:g} (largest {worst.slope:+.2f}, "
                f"{worst.quantity} of {worst.name}){self._advice(deciding)}"
            )
        if bad:
            worst = bad[0]
            broken = "non-finite" if worst.status == "non-finite" else f"{worst.slope:+.2f}"
            return (
                f"FAILED: {what}: {len(bad)} of {len(deciding)} slopes not within +-{self.tolerance:g} (worst {broken}, "
                f"{worst.quantity} of {worst.name}){self._advice(bad)}"
            )
        return f"FAILED: {what}: " + ("a loss is not finite" if self._broken_loss() else "no slope could be fitted")

    def _advice(self, slopes: list[Slope]) -> str:
        """What larger sizes would tell, where slopes shrink as the size grows; empty where none does."""
        settling = [slope for slope in slopes if slope.status == "settles"]
        if settling:
            falls = f"{settling[0].name} changes less ({settling[0].slope:+.2f})"
            return (
                f"; {falls} only by the answer of its random initial weights, which vanishes with the width: "
                "larger sizes show the limit"
            )
        shrink = bool(slopes) and all(slope.status == "FAIL" and _shrinks(slope, self.tolerance) for slope in slopes)
        if shrink:
            return "; every one of them shrinks towards larger sizes: this may be an effect of small ones, so repeat with larger"
        return ""

    def to_csv(self, path: str | Path) -> None:
        """Writes one line for each measurement, with the columns of :class:`Record`."""
        with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            columns = [field.name for field in fields(Record)]
            writer.writerow(columns)
            writer.writerows([getattr(record, column) for column in columns] for record in self.records)

    def plot(self, path: str | Path) -> None:
        """Writes a PNG with one panel for each slope that decides: rms against size, one line for each step.

        Raises:
            ModuleNotFoundError: Without matplotlib; ``pip install matplotlib`` installs it.
            ValueError: If nothing was measured.
        """
        slopes = {step: self.slopes(step) for step in self.measured}
        plot_slopes(path, slopes, axis=self.axis, sizes=self.sizes, title=self.verdict, passed=self.passed)

    def __str__(self) -> str:
        return to_text(self)

    def __rich__(self) -> RenderableType:
        table = Table(
            title=f"Coordinate check: {self.rule} ({self.family}) after {self.measured[-1]} steps, "
            f"{len(self.seeds)} seeds; slope of log rms against log {self.axis}",
            title_justify="left",
            title_style="bold",
            header_style="bold",
        )
        for header in ("layer", "role", "quantity", "rms", "slope", "lower half", "upper half", ""):
            right = header in ("rms", "slope", "lower half", "upper half")
            table.add_column(header, justify="right" if right else "left", overflow="fold", no_wrap=header != "layer")
        slopes = [slope for slope in self.slopes() if slope.decides]
        prefix = common_prefix(slope.name for slope in slopes)
        for slope in slopes:
            style = "red" if slope.status in ("FAIL", "non-finite") else None
            table.add_row(slope.name[len(prefix) :], *_cells(slope), style=style)
        return Group(table, *self._footer(), Text(self.verdict, style="bold green" if self.passed else "bold red"))

    def _footer(self) -> list[Text]:
        lines = []
        if self.depth_moves:
            lines.append(
                "the depth varies: layers are compared at equal relative depth, and only the residual stream and the logits "
                "decide (the updates of single parameters scale with depth by design)"
            )
        zeros = sum(slope.zeros for slope in self.slopes() if slope.decides)
        if zeros:
            lines.append(f"{zeros} measurements were exactly zero and were omitted")
        if self.unseen:
            shown = ", ".join(self.unseen[:4]) + (" ..." if len(self.unseen) > 4 else "")
            lines.append(f"not measured, because the probe batch calls no module that contains them: {shown}")
        return [Text(f"note: {line}", style="yellow") for line in (*lines, *self.notes)]


def _shrinks(slope: Slope, tolerance: float) -> bool:
    """Whether a slope is within the tolerance over the larger half of at least three sizes, though not over all."""
    return len(slope.sizes) > 2 and abs(slope.upper) <= tolerance < abs(slope.lower)


def _cells(slope: Slope) -> tuple[str, ...]:
    rms = f"{slope.rms[0]:.2g} -> {slope.rms[-1]:.2g}" if slope.rms else "0"
    error = f" +-{slope.error:.2f}" if math.isfinite(slope.error) else ""
    numbers = [f"{value:+.2f}" if math.isfinite(value) else "-" for value in (slope.slope, slope.lower, slope.upper)]
    return (slope.role, slope.quantity, rms, numbers[0] + error, numbers[1], numbers[2], slope.status)
