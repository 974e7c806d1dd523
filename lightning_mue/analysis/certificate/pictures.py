"""Loss against learning rate for each size: one row an axis, one panel a rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_mue.analysis.certificate.measures import SizeResult
from lightning_mue.analysis.certificate.verdict import AxisResult

COLOURS = {"transfers": "#1b7837", "drifts": "#b2182b", "cannot tell": "#b35806"}
_PANEL, _LEGEND = 3.6, 1.2


def draw(results: Sequence[AxisResult]) -> Any:
    """A figure of every axis and rule. Sizes of an axis have one colour each; the optimum is a star, with its interval."""
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(result.axis for result in results))
    rules = list(dict.fromkeys(result.rule for result in results))
    rows, columns = len(axes_names), len(rules)
    figure = Figure(figsize=(_PANEL * columns + _LEGEND, 3.0 * rows), layout="constrained", dpi=130)
    grid = figure.subplots(rows, columns, squeeze=False, sharey="row")
    for row, axis in enumerate(axes_names):
        for column, rule in enumerate(rules):
            panel = grid[row, column]
            result = next((r for r in results if (r.axis, r.rule) == (axis, rule)), None)
            if result is None:
                panel.set_visible(False)
                continue
            _panel(panel, result)
            if column == 0:
                panel.set_ylabel("loss", fontsize=8)
        _zoom([grid[row, c] for c in range(columns)], [r for r in results if r.axis == axis])
    return figure


def _panel(panel: Any, result: AxisResult) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(0.0, 0.88, len(result.transfers)))
    base = result.transfers[0].optimum
    if base is not None:
        panel.axvline(base.rate.value, color="#888888", linewidth=0.9, linestyle="--")
    for colour, transfer in zip(colours, result.transfers, strict=True):
        _size(panel, transfer, colour)
    panel.set_xscale("log", base=2)
    ticks = sorted({rate for t in result.transfers for rate in t.rates})
    shown = ticks[:: max(1, math.ceil(len(ticks) / 7))]
    panel.set_xticks(shown, [f"{rate:.2g}" for rate in shown], minor=False, rotation=30)
    panel.tick_params(labelsize=7, labelleft=True)
    panel.grid(alpha=0.3)
    panel.set_xlabel("learning rate (before the rule)", fontsize=8)
    panel.set_title(f"{result.rule}, {result.axis}: {result.verdict}", fontsize=9, color=COLOURS[result.verdict])
    panel.legend(fontsize=6.5, framealpha=0.6, loc="best")


def _size(panel: Any, transfer: SizeResult, colour: Any) -> None:
    finite = np.isfinite(transfer.losses)
    rates = transfer.rates
    panel.plot(
        rates[finite], transfer.losses[finite], "o-", color=colour, markersize=3, linewidth=0.9, label=transfer.label
    )
    for rate in rates[~finite]:
        panel.plot(rate, 0.97, "x", color=colour, markersize=5, transform=panel.get_xaxis_transform())  # diverged
    fit = transfer.optimum
    if fit is None:
        return
    x = np.linspace(math.log2(fit.rates[0]), math.log2(fit.rates[-1]), 60)
    panel.plot(
        2**x,
        fit.loss.value + fit.curvature.value * (x - fit.log2_rate.value) ** 2,
        color=colour,
        linewidth=2.2,
        alpha=0.45,
    )
    low, high = np.clip([fit.log2_rate.low, fit.log2_rate.high], math.log2(rates[0]), math.log2(rates[-1]))
    panel.plot([2**low, 2**high], [fit.loss.value] * 2, color=colour, linewidth=1.2)
    panel.plot(
        fit.rate.value, fit.loss.value, "*", color=colour, markersize=10, markeredgecolor="black", markeredgewidth=0.5
    )


def _zoom(panels: Sequence[Any], results: Sequence[AxisResult]) -> None:
    """Losses far above the best, of rates near divergence, would press the valleys flat: they leave the picture at the top."""
    losses = np.concatenate([t.losses[np.isfinite(t.losses)] for r in results for t in r.transfers])
    bests = [t.losses[np.isfinite(t.losses)].min() for r in results for t in r.transfers if np.isfinite(t.losses).any()]
    if not bests:
        return
    span = max(max(bests) - min(bests), 0.08 * min(bests))
    top = min(losses.max(), max(bests) + span)
    margin = 0.06 * (top - min(bests)) or 0.01
    for panel in panels:
        panel.set_ylim(min(bests) - margin, top + margin)
