"""Pictures of a coordinate check: small multiples that can be read at a glance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mue.analysis.slopes import Slope, common_prefix

if TYPE_CHECKING:
    from lightning_mue.analysis.check import CoordinateCheck

_COLUMNS = 4
_GOOD, _BAD = "#1b7837", "#b2182b"


def plot_coordinates(check: CoordinateCheck, path: str | Path) -> None:
    """Writes a PNG with one panel for each slope that decides the verdict, worst first.

    A panel shows the rms (geometric mean over seeds and layers) against the size, both axes logarithmic, one line for each
    measured step: flat lines are what a sound parameterization gives. The slope of the last step is in the title.

    Args:
        check: The check.
        path: Where to write the PNG.

    Raises:
        ModuleNotFoundError: Without matplotlib.
        ValueError: If there is nothing to show.
    """
    matplotlib = _matplotlib()
    panels = [slope for slope in check.slopes() if slope.decides and slope.rms]
    if not panels:
        raise ValueError("plot: no quantity could be measured, so there is nothing to show.")
    prefix = common_prefix(panel.name for panel in panels)
    by_step = {step: {(s.name, s.quantity): s for s in check.slopes(step)} for step in check.measured}
    rows = math.ceil(len(panels) / _COLUMNS)
    figure = matplotlib.figure.Figure(figsize=(3.3 * _COLUMNS, 2.6 * rows + 0.9), layout="constrained")
    axes = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    colors = matplotlib.colormaps["viridis"].resampled(len(check.measured) + 1)
    for axis, panel in zip(axes, panels, strict=False):
        for i, (step, slopes) in enumerate(by_step.items()):
            line = slopes.get((panel.name, panel.quantity))
            if line is not None and line.rms:
                axis.plot(line.sizes, line.rms, marker="o", markersize=3, color=colors(i), label=f"{step}")
        _finish_panel(axis, panel, panel.name[len(prefix) :], check)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    lines = figure.axes[0].get_lines()
    figure.legend(
        handles=lines, title="after step", loc="outside lower center", ncols=len(lines), fontsize=8, title_fontsize=8
    )
    figure.suptitle(check.verdict, fontsize=9, color=_GOOD if check.passed else _BAD, wrap=True)
    figure.savefig(path, dpi=130)


def _finish_panel(axis: Any, panel: Slope, name: str, check: CoordinateCheck) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    low, high = axis.get_ylim()
    middle = (low * high) ** 0.5
    # At least a factor of 8 in all: noise on a flat line shall not look like a trend.
    axis.set_ylim(min(low, middle / 8**0.5), max(high, middle * 8**0.5))
    axis.set_xticks(list(check.sizes), [f"{x:g}" for x in check.sizes], minor=False)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    axis.set_xlabel(check.axis, fontsize=7)
    slope = f"{panel.slope:+.2f}" if math.isfinite(panel.slope) else panel.status
    axis.set_title(
        f"{_short(name)}\n{panel.quantity}, slope {slope}",
        fontsize=8,
        color="black" if panel.status == "pass" else _BAD,
    )


def _short(name: str, longest: int = 38) -> str:
    """The end of a name, which tells more than its beginning."""
    return name if len(name) <= longest else "..." + name[-longest + 3 :]


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A plot needs matplotlib, which is not installed: pip install 'lightning-mue[analysis]'."
        ) from error
    return matplotlib
