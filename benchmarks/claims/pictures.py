"""Pictures of a claim: the certificate's, and one of two rules side by side for a first look."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_mue.analysis.certificate import Certificate
from lightning_mue.analysis.certificate.measures import SizeResult
from lightning_mue.analysis.certificate.pictures import draw
from lightning_mue.files import whole_file

#: Of Okabe and Ito, told apart by the colour-blind; the base is black. Each has a marker of its own, too.
_STYLES = (
    ("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^"), ("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X"),
)  # fmt: skip


def save_certificate(certificate: Certificate, path: Path) -> None:
    """Loss against learning rate, a row an axis and a panel a rule."""
    _save(draw(certificate.results), path)


def side_by_side(
    certificate: Certificate, panels: Mapping[str, str], labels: Mapping[str, str], path: Path, top: float
) -> None:
    """Loss above each model's own best against learning rate, one panel a rule, all sizes of the rule's first axis.

    Args:
        certificate: Of the claim.
        panels: Rule -> title.
        labels: Size -> its name in the picture.
        path: Of the PNG.
        top: Largest loss shown, in percent above the best.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.9), layout="constrained", dpi=100)
    drawn = figure.subplots(1, len(panels), sharey=True)
    for panel, (rule, title) in zip(drawn, panels.items(), strict=True):
        result = next(r for r in certificate.results if r.rule == rule)
        for transfer in result.transfers:
            style = _STYLES[list(labels).index(transfer.label)]
            _curve(panel, transfer, labels[transfer.label], style, base=transfer is result.transfers[0])
        base = result.transfers[0].optimum
        if base is not None:
            panel.axvline(base.rate.value, color="black", linewidth=1, linestyle=":")
        panel.set_xscale("log", base=2)
        ticks = sorted({float(rate) for t in result.transfers for rate in t.rates})
        panel.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        panel.set_ylim(-0.02 * top, top)
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("learning rate given to the optimizer")
        panel.grid(alpha=0.25)
    drawn[0].set_ylabel("loss above the model's own best, %")
    figure.legend(*drawn[0].get_legend_handles_labels(), loc="outside right center", fontsize=9, frameon=False)
    _save(figure, path)


def _curve(panel: Any, transfer: SizeResult, label: str, style: tuple[str, str], *, base: bool) -> None:
    """Points, and the parabola through those round the best, above the parabola's least."""
    colour, marker = style
    best = transfer.optimum.loss.value if transfer.optimum else float(np.min(transfer.losses))
    finite = np.isfinite(transfer.losses)
    rates, losses = transfer.rates[finite], 100 * (transfer.losses[finite] / best - 1)
    width = 2.4 if base else 1.3
    panel.plot(rates, losses, marker, color=colour, markersize=6 if base else 5, zorder=3 if base else 2)
    fit = transfer.optimum
    if fit is None:
        panel.plot(rates, losses, "-", color=colour, linewidth=width)
    else:
        x = np.linspace(np.log2(rates[0]), np.log2(rates[-1]), 80)
        inside = (x >= np.log2(fit.rates[0])) & (x <= np.log2(fit.rates[-1]))
        curve = 100 * fit.curvature.value * (x - fit.log2_rate.value) ** 2 / best
        panel.plot(2 ** x[inside], curve[inside], "-", color=colour, linewidth=width)
        panel.plot(rates, losses, "-", color=colour, linewidth=0.5, alpha=0.5)
    panel.plot([], [], f"{marker}-", color=colour, linewidth=width, label=label)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        figure.savefig(part, format="png", metadata={"Software": None})
