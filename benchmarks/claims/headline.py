"""The picture of the README, from the committed runs of three claims: does the best rate stay?

    python benchmarks/claims/headline.py [--processor NAME]

Loss above each model's own best against learning rate: a dense model and six MoEs with the callback; a wider dense model and a
wider MoE with it and without.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lightning_mue.analysis.certificate import certify
from lightning_mue.analysis.certificate.measures import SizeResult
from lightning_mue.analysis.trials import Value, read_trials
from lightning_mue.files import whole_file

_ROOT = Path(__file__).parents[2]
#: Of Okabe and Ito, told apart by the colour-blind; the base is black. Each has a marker of its own, too.
_STYLES = ("ok", "s#0072B2", "^#D55E00", "D#009E73", "v#CC79A7", "P#E69F00", "X#56B4E9")
_MOES = (
    "dense, tuned",
    "4 experts, top 1",
    "8, top 2",
    "16, top 4",
    "24, top 4, shared",
    "32, top 8",
    "64, top 8, grouped",
)
_WIDER = ("dense, width 32, tuned", "dense, width 128", "16 experts, width 128")
_WIDER_CLAIMS: Mapping[str, Mapping[str, Value]] = {
    "width": {"width": 32},
    "dense_to_moe": {"width": 32, "n_experts": 0},
}
#: Claims and their bases, which are one model; rule, title, names of the sizes.
_PANELS: tuple[tuple[Mapping[str, Mapping[str, Value]], str, str, tuple[str, ...]], ...] = (
    ({"complete_mue": {"n_experts": 0}}, "complete-mue", "dense to MoE, with MuECallback", _MOES),
    (_WIDER_CLAIMS, "complete-mue", "width x 4, with MuECallback", _WIDER),
    (_WIDER_CLAIMS, "sp", "width x 4, without", _WIDER),
)
#: Largest loss shown, in percent above the best.
_TOP = 12.0


def draw(processor: str) -> Figure:
    """The picture, of the runs on a processor."""
    figure = Figure(figsize=(9, 4.2), layout="constrained", dpi=100)
    for panel, (claims, rule, title, names) in zip(figure.subplots(1, 3, sharey=True), _PANELS, strict=True):
        found = [_transfers(claim, base, rule, processor) for claim, base in claims.items()]
        _panel(panel, [found[0][0], *(each for of in found for each in of[1:])], names)
        panel.set_title(title, fontsize=10.5)
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel("loss above the model's own best, %")
    return figure


def _transfers(claim: str, base: Mapping[str, Value], rule: str, processor: str) -> list[SizeResult]:
    """The sizes of a claim, the base first."""
    trials = read_trials(_ROOT / "benchmarks" / "results" / "claims" / f"{claim}_{processor}.csv")
    (result,) = certify([t for t in trials if t.rule == rule], base).results
    return list(result.transfers)


def _panel(panel: Any, transfers: list[SizeResult], names: tuple[str, ...]) -> None:
    for transfer, name, style in zip(transfers, names, _STYLES[: len(names)], strict=True):
        _curve(panel, transfer, name, style[0], style[1:], base=transfer is transfers[0])
    base = transfers[0].optimum
    if base is not None:
        panel.axvline(base.rate.value, color="black", linewidth=1, linestyle=":")
    panel.set_xscale("log", base=2)
    ticks = sorted({float(rate) for t in transfers for rate in t.rates})
    panel.set_xticks(ticks, [f"{rate:g}" for rate in ticks], fontsize=8.5)
    panel.set_ylim(-0.03 * _TOP, _TOP)
    panel.set_xlabel("learning rate given to the optimizer")
    panel.grid(alpha=0.25)
    panel.legend(fontsize=8, loc="upper center", framealpha=0.8)


def _curve(panel: Any, transfer: SizeResult, name: str, marker: str, colour: str, *, base: bool) -> None:
    """The points, joined; the optimum, a star, is the least of the certificate's parabola."""
    fit, finite = transfer.optimum, np.isfinite(transfer.losses)
    best = fit.loss.value if fit else float(np.min(transfer.losses))
    excess = 100 * (transfer.losses[finite] / best - 1)
    width = 2.2 if base else 1.2
    panel.plot(transfer.rates[finite], excess, f"{marker}-", color=colour, markersize=5, linewidth=width, label=name)
    if fit:
        panel.plot(fit.rate.value, 0, "*", color=colour, markersize=11, markeredgecolor="white", markeredgewidth=0.6)


def main() -> None:
    """Writes docs/images/transfer.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processor", default="amd-epyc-avx512bf16", help="as in the names of the results")
    figure = draw(parser.parse_args().processor)
    with whole_file(_ROOT / "docs" / "images" / "transfer.png") as part:
        figure.savefig(part, format="png", metadata={"Software": None})


if __name__ == "__main__":
    main()
