"""A certificate as files and as a table for the terminal."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.table import Table

from lightning_mue.analysis.certificate.measures import Limits, SizeResult
from lightning_mue.analysis.certificate.pictures import COLOURS, draw
from lightning_mue.analysis.certificate.verdict import AxisResult, octaves, percent, plain
from lightning_mue.analysis.fits import Estimate
from lightning_mue.analysis.trials import Value
from lightning_mue.files import whole_file
from lightning_mue.health.pictures import as_svg

#: Heading -> what it says of an axis; the same on the page and in the terminal.
_SUMMARY = {
    "worst drift (octaves)": lambda r: octaves(_worst_drift(r)),
    "worst penalty": lambda r: percent(r.worst.penalty) if r.worst else "-",
    "E flat (octaves)": lambda r: plain(r.figures.flat_error),
    "exponent p": lambda r: plain(r.figures.exponent),
    "E law (octaves)": lambda r: plain(r.figures.law_error),
    "kappa": lambda r: plain(r.figures.kappa),
    "R(inf)": lambda r: percent(r.figures.penalty_limit),
}
_SIZES = ("size", "N", "best rate", "loss there", "curvature", "drift (octaves)", "penalty", "note")


def as_table(results: Sequence[AxisResult], base: Mapping[str, Value], notes: Sequence[str]) -> Table:
    """The verdicts and the three figures, a line for each rule and axis."""
    table = Table(title=f"Does the rate hold? Tuned at {_words(base)}", caption=" ".join(notes) or None)
    for heading in ("axis", "rule", "seeds", "verdict", *_SUMMARY):
        table.add_column(heading, overflow="fold")
    for r in _by_axis(results):
        verdict = f"[{COLOURS[r.verdict]}]{r.verdict}[/]"
        table.add_row(r.axis, r.rule, str(len(r.seeds)), verdict, *(write(r) for write in _SUMMARY.values()))
    return table


def write_pages(
    folder: Path, results: Sequence[AxisResult], base: Mapping[str, Value], limits: Limits, notes: Sequence[str]
) -> Path:
    """Writes certificate.html, .png, .csv and .json to a folder and returns the path of the page."""
    figure = draw(results)
    with whole_file(folder / "certificate.png") as part:
        figure.savefig(part, format="png")
    texts = {
        "html": _html(results, base, limits, notes, as_svg(figure)),
        "csv": _csv(results),
        "json": json.dumps(_json(results, base, limits, notes), indent=1, allow_nan=False),
    }
    for kind, text in texts.items():
        with whole_file(folder / f"certificate.{kind}") as part:
            part.write_text(text, encoding="utf-8")
    return folder / "certificate.html"


def _html(
    results: Sequence[AxisResult], base: Mapping[str, Value], limits: Limits, notes: Sequence[str], picture: str
) -> str:
    from jinja2 import Environment, PackageLoader, select_autoescape

    loader = PackageLoader("lightning_mue.analysis.certificate")
    environment = Environment(loader=loader, autoescape=select_autoescape(["html", "j2"]))
    return environment.get_template("certificate.html.j2").render(
        results=_by_axis(results),
        base=_words(base),
        limits=limits,
        notes=notes,
        picture=picture,
        colours=COLOURS,
        summary=_SUMMARY,
        headings=_SIZES,
        cells=_cells,
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _cells(t: SizeResult) -> list[str]:
    """One line of an axis's table of sizes."""
    number = "-" if math.isnan(t.ratio) else f"{t.ratio:.3g}"
    fit = t.optimum
    of_fit = ["-"] * 3 if fit is None else [plain(fit.rate), _loss(fit.loss), plain(fit.curvature)]
    return [t.label, number, *of_fit, octaves(t.drift), percent(t.penalty), t.problem]


def _loss(loss: Estimate) -> str:
    return f"{loss.value:.4g} [{loss.low:.4g}, {loss.high:.4g}]"


def _csv(results: Sequence[AxisResult]) -> str:
    """A line for each rule, axis and size."""
    rows = list(_rows(results))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _rows(results: Sequence[AxisResult]) -> Iterator[dict[str, Any]]:
    for r in results:
        for t in r.transfers:
            optimum = t.optimum
            named = {
                "best_rate": optimum.rate if optimum else Estimate(math.nan),
                "loss": optimum.loss if optimum else Estimate(math.nan),
                "curvature": optimum.curvature if optimum else Estimate(math.nan),
                "drift": t.drift,
                "penalty": t.penalty,
            }
            row = {"rule": r.rule, "axis": r.axis, "size": t.label, "N": t.ratio, "seeds": len(r.seeds)}
            for name, estimate in named.items():
                row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            yield {**row, "verdict": r.verdict, "problem": t.problem}


def _json(
    results: Sequence[AxisResult], base: Mapping[str, Value], limits: Limits, notes: Sequence[str]
) -> dict[str, Any]:
    """All of a certificate; infinite ends and unknown values are null."""
    axes = [
        {
            "rule": r.rule,
            "axis": r.axis,
            "seeds": list(r.seeds),
            "verdict": r.verdict,
            "reason": r.reason,
            "figures": asdict(r.figures),
            "sizes": [
                {
                    "size": t.label,
                    "ratio": t.ratio,
                    "rates": t.rates.tolist(),
                    "losses": t.losses.tolist(),
                    "best_rate": asdict(t.optimum.rate) if t.optimum else None,
                    "loss": asdict(t.optimum.loss) if t.optimum else None,
                    "curvature": asdict(t.optimum.curvature) if t.optimum else None,
                    "drift": asdict(t.drift),
                    "penalty": asdict(t.penalty),
                    "problem": t.problem,
                }
                for t in r.transfers
            ],
        }
        for r in results
    ]
    return _finite({"base": dict(base), "limits": asdict(limits), "notes": list(notes), "axes": axes})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _worst_drift(result: AxisResult) -> Estimate:
    known = [t.drift for t in result.transfers[1:] if not math.isnan(t.drift.value)]
    return max(known, key=lambda drift: abs(drift.value), default=Estimate(math.nan))


def _by_axis(results: Sequence[AxisResult]) -> list[AxisResult]:
    """Rules side by side: all of the first axis, then of the next."""
    names = list(dict.fromkeys(result.axis for result in results))
    return sorted(results, key=lambda result: names.index(result.axis))


def _words(size: Mapping[str, Value]) -> str:
    return ", ".join(f"{name}={value}" for name, value in size.items())
