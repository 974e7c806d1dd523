"""Pictures of a run's metrics: lines of one indicator, and heat maps of a metric over layers and steps.

Shape legend: L layers, n samples.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_mue.health.series import Run, Series

#: Columns of a heat map at most: more samples than that are thinned evenly.
_MOST_COLUMNS = 400


def split_place(tag: str) -> tuple[str, str]:
    """(group of tags, layer) of a metric of one layer, by its index or by the name of a module with one; else (tag, "").

    Example:
        >>> split_place("stability/rms/ffn/03"), split_place("updates/lr/hidden/model.layers.0.q_proj")
        (('stability/rms/ffn', '03'), ('updates/lr/hidden', 'model.layers.0.q_proj'))
        >>> split_place("routing/max_violation_max")
        ('routing/max_violation_max', '')
    """
    group, _, layer = tag.rpartition("/")
    return (group, layer) if group and re.fullmatch(r"\d+|.+\.\d+(\..+)?", layer) else (tag, "")


def _order(layer: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in layer.split(".")]


def without_shared_start(names: Sequence[str]) -> list[str]:
    """Names of modules without what all begin with."""
    parts = [name.split(".") for name in names]
    shared = 0
    while min(map(len, parts)) > shared + 1 and len({p[shared] for p in parts}) == 1:
        shared += 1
    return [".".join(p[shared:]) for p in parts]


def layered(run: Run) -> dict[str, dict[str, Series]]:
    """Group of tags -> layer -> series, for each metric with at least two layers that is not the same everywhere.

    Example:
        >>> from lightning_mue.health.series import series_of
        >>> a, b = series_of([(0, 1.0)]), series_of([(0, 2.0)])
        >>> list(layered({"stability/rms/ffn/00": a, "stability/rms/ffn/01": b, "train/loss": a}))
        ['stability/rms/ffn']
    """
    groups: dict[str, dict[str, Series]] = {}
    for tag, series in run.items():
        group, layer = split_place(tag)
        if layer:
            groups.setdefault(group, {})[layer] = series
    kept = {group: layers for group, layers in groups.items() if len(layers) > 1 and _varies(layers)}
    return {group: dict(sorted(layers.items(), key=lambda each: _order(each[0]))) for group, layers in kept.items()}


def _varies(layers: Mapping[str, Series]) -> bool:
    values = np.concatenate([series.values for series in layers.values()])
    return not np.all(values == values[0])


def heat_map(title: str, layers: Mapping[str, Series]) -> Any:
    """A figure of a metric's value, layer by step; the colour scale is logarithmic where all values are positive."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    steps = np.unique(np.concatenate([series.steps for series in layers.values()]))
    steps = steps[:: max(1, -(-len(steps) // _MOST_COLUMNS))]
    table = np.full((len(layers), len(steps)), np.nan)
    for row, series in enumerate(layers.values()):
        column = np.searchsorted(steps, series.steps)
        fits = (column < len(steps)) & (steps[np.minimum(column, len(steps) - 1)] == series.steps)
        table[row, column[fits]] = series.values[fits]
    finite = table[np.isfinite(table)]
    spread = len(finite) > 0 and finite.min() > 0 and finite.max() > 3 * finite.min()
    height = 0.95 + min(5.0, max(0.9, 0.14 * len(layers)))
    names = without_shared_start(list(layers))
    margin = 0.48 + max(0, max(map(len, names)) - 2) * 0.055
    width = 3.92 + margin
    figure = Figure(figsize=(width, height), dpi=130)  # margins by hand: a layout engine takes half of the time
    axes = figure.add_axes((margin / width, 0.5 / height, 3.34 / width, 1 - 0.8 / height))
    colours = _colours()
    picture = axes.imshow(
        np.ma.masked_invalid(table),
        aspect="auto",
        interpolation="nearest",
        cmap=colours,
        norm=LogNorm() if spread else None,
    )
    axes.set_title(title, fontsize=9)
    shown = np.unique(np.linspace(0, len(steps) - 1, min(8, len(steps))).astype(int))
    axes.set_xticks(shown, [f"{steps[i]:d}" for i in shown], fontsize=7)
    rows = np.unique(np.linspace(0, len(layers) - 1, min(16, len(layers))).astype(int))
    axes.set_yticks(rows, [names[i] for i in rows], fontsize=7)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    bar = figure.add_axes(((margin + 3.41) / width, 0.5 / height, 0.09 / width, 1 - 0.8 / height))
    figure.colorbar(picture, cax=bar, format="%.2g").ax.tick_params(which="both", labelsize=6)
    bar.yaxis.set_minor_formatter("{x:.1g}" if spread and finite.max() < 30 * finite.min() else "")
    return figure


def lines(
    title: str,
    runs: Mapping[str, Mapping[str, Series]],
    *,
    band: tuple[float | None, float | None] = (None, None),
    marks: Sequence[tuple[int, str]] = (),
    ranges: Sequence[tuple[Series, Series]] = (),
) -> Any:
    """A figure of lines: run -> label -> series.

    Args:
        title: What is shown.
        runs: Lines of one run have one colour where there are several runs.
        band: (watch, act) limits, drawn where they are within reach of the lines.
        marks: (step, colour) of symptoms, drawn as vertical lines.
        ranges: (lowest, highest) of healthy runs, drawn as areas behind the lines.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.9, 2.5), layout="constrained")
    axes = figure.subplots()
    tab10 = colormaps["tab10"]
    drawn: list[float] = []
    several = len(runs) > 1
    for low, high in ranges:
        axes.fill_between(low.steps, low.values, high.values, color="#1b7837", alpha=0.15, linewidth=0)
    for i, (run, tags) in enumerate(runs.items()):
        for j, (label, series) in enumerate(tags.items()):
            style = ("-", "--", ":", "-.")[j % 4] if several else "-"
            name = f"{run}: {label}" if several and label else run if several else label
            axes.plot(
                series.steps,
                series.values,
                style,
                color=tab10((i if several else j) % 10),
                linewidth=1.1,
                marker="o" if len(series.steps) == 1 else None,
                label=name,
            )
            drawn += [v for v in series.values if np.isfinite(v)]
    if drawn and min(drawn) > 0 and max(drawn) > 30 * min(drawn):
        axes.set_yscale("log")
    for limit, colour in zip(band, ("#b35806", "#b2182b"), strict=True):
        if limit is not None and drawn and max(drawn) > 0.3 * limit:
            axes.axhline(limit, color=colour, linewidth=0.8, linestyle="--")
    for step, colour in marks:
        axes.axvline(step, color=colour, linewidth=0.8, alpha=0.7)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.set_xlabel("step", fontsize=8)
    if 0 < sum(map(len, runs.values())) <= 12 and any(label or several for tags in runs.values() for label in tags):
        axes.legend(fontsize=6, framealpha=0.7)
    return figure


def as_svg(figure: Any) -> str:
    """A figure as an SVG element, to stand inside a page; its ids are the same at every call."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning_mue"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def as_pixels(figure: Any) -> np.ndarray:
    """A figure as uint8 [height, width, 3]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _colours() -> Any:
    from matplotlib import colormaps

    colours = colormaps["viridis"].copy()
    colours.set_bad("#dddddd")
    return colours
