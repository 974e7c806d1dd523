"""Plots of a coordinate check: one small panel for each slope."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_mue.analysis.slopes import Slope, common_prefix
from lightning_mue.checks import mismatch, value_error
from lightning_mue.files import whole_file

_COLUMNS = 4
_GOOD, _BAD = "#1b7837", "#b2182b"


def plot_slopes(
    path: str | Path,
    slopes: Mapping[int, Sequence[Slope]],
    *,
    axis: str,
    sizes: Collection[float],
    title: str,
    passed: bool,
) -> None:
    """Writes a PNG with one panel for each slope that decides the verdict, in the order of the last step.

    A panel shows the rms (geometric mean over seeds and layers) against the size, both axes logarithmic, with one line for
    each measured step; a sound parameterization gives flat lines. The slope of the last step is in the panel's title.
    `slopes` maps the measured steps, ascending, to their slopes; `sizes` are the ticks of the x axis.

    Raises:
        ModuleNotFoundError: Without matplotlib.
        ValueError: If there is nothing to show.
    """
    matplotlib = _matplotlib()
    panels = [slope for slope in slopes[max(slopes)] if slope.decides and slope.rms]
    if not panels:
        raise value_error("plot", found="no measured quantity", expected="at least one slope that decides")
    prefix = common_prefix(panel.name for panel in panels)
    rows = math.ceil(len(panels) / _COLUMNS)
    figure = matplotlib.figure.Figure(figsize=(3.3 * _COLUMNS, 2.6 * rows + 0.9), layout="constrained")
    axes = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    colors = matplotlib.colormaps["viridis"].resampled(len(slopes) + 1)
    for panel_axes, panel in zip(axes, panels, strict=False):
        for i, (step, of_step) in enumerate(slopes.items()):
            line = next((s for s in of_step if (s.name, s.quantity) == (panel.name, panel.quantity)), None)
            if line is not None and line.rms:
                panel_axes.plot(line.sizes, line.rms, marker="o", markersize=3, color=colors(i), label=f"{step}")
        _finish_panel(panel_axes, panel, panel.name[len(prefix) :], axis, sizes)
    for unused in axes[len(panels) :]:
        unused.set_visible(False)
    lines = figure.axes[0].get_lines()
    figure.legend(
        handles=lines, title="after step", loc="outside lower center", ncols=len(lines), fontsize=8, title_fontsize=8
    )
    figure.suptitle(title, fontsize=9, color=_GOOD if passed else _BAD, wrap=True)
    with whole_file(path) as part:
        figure.savefig(part, dpi=130, format=Path(path).suffix[1:] or "png")


def _finish_panel(axes: Any, panel: Slope, name: str, axis: str, sizes: Collection[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    middle = (low * high) ** 0.5
    # The y axis spans at least a factor of 8, so that noise on a flat line does not look like a trend.
    axes.set_ylim(min(low, middle / 8**0.5), max(high, middle * 8**0.5))
    axes.set_xticks(list(sizes), [f"{x:g}" for x in sizes], minor=False)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.set_xlabel(axis, fontsize=7)
    slope = f"{panel.slope:+.2f}" if math.isfinite(panel.slope) else panel.status
    axes.set_title(
        f"{_short(name)}\n{panel.quantity}, slope {slope}",
        fontsize=8,
        color="black" if panel.status == "pass" else _BAD,
    )


def _short(name: str, longest: int = 38) -> str:
    """The end of a name, which says more than its beginning."""
    return name if len(name) <= longest else "..." + name[-longest + 3 :]


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            mismatch("plot", found="no matplotlib", expected="it installed", do="pip install matplotlib.")
        ) from error
    return matplotlib
