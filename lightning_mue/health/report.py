"""One self-contained HTML page about one run or several: verdicts first, then the panels that they are read from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lightning_mue.checks import value_error
from lightning_mue.files import whole_file
from lightning_mue.health.card import HEADERS, LEGEND, LOOKS, cells, headline, look
from lightning_mue.health.indicators import indicator_of
from lightning_mue.health.judging import Health, Symptom, judge
from lightning_mue.health.losses import is_loss
from lightning_mue.health.pictures import as_svg, heat_map, layered, lines, split_place, without_shared_start
from lightning_mue.health.reference import Reference
from lightning_mue.health.series import Run, Series, find_runs, read_run

#: Heading -> regular expressions of the tags below it; a tag belongs to the first that matches.
SECTIONS: Mapping[str, Sequence[str]] = {
    "Transfer from the base": ["transfer/.*"],
    "Guard": ["guard/.*"],
    "Stability": ["stability/.*"],
    "Routing": ["routing/.*"],
    "Updates": ["updates/.*"],
    "Spectra": ["spectral/.*"],
    "Learning rates": ["mue/.*", "lr(-.*)?", ".*learning_rate.*"],
    "Training": [".*"],
}
#: The order of the page.
_ORDER = ("Training", "Transfer from the base", "Guard", "Stability", "Routing", "Updates", "Spectra", "Learning rates")
#: Lines of one panel at most: more layers than that are a heat map only.
_MOST_LINES = 8


@dataclass(frozen=True)
class ReportedRun:
    """A run as the report shows it: name, metrics, verdict, and the text of its ``plan.yaml`` (empty without one)."""

    name: str
    folder: Path
    metrics: Run
    verdict: Health
    plan: str

    @property
    def final(self) -> dict[str, float]:
        """The last value of every loss and of bits per byte."""
        shown = (tag for tag in self.metrics if is_loss(tag) or "bits_per_byte" in tag)
        return {tag: float(self.metrics[tag].values[-1]) for tag in sorted(shown)}


def read_runs(
    folders: Iterable[str | Path], *, losses: Iterable[str] = (), reference: Reference | None = None
) -> list[ReportedRun]:
    """Reads and judges every run in the folders; names are the parts of the paths in which they differ.

    Args:
        folders: What loggers wrote, or folders of such folders.
        losses: Tags of further training losses.
        reference: Healthy runs to compare with, step by step.

    Raises:
        ValueError: If a folder holds no run, or a loss is in no run.
    """
    paths = list(dict.fromkeys(path.resolve() for folder in folders for path in find_runs(folder)))
    metrics = {path: read_run(path) for path in paths}
    for loss in losses:
        if not any(loss in run for run in metrics.values()):
            known = sorted({tag for run in metrics.values() for tag in run})
            raise value_error(
                "--loss", found=repr(loss), expected="a metric of the run", do=f"It logged {', '.join(known[:20])}."
            )
    return [
        ReportedRun(name, path, metrics[path], judge(metrics[path], losses=losses, reference=reference), _plan_of(path))
        for path, name in zip(paths, _short_names(paths), strict=True)
    ]


def write_report(
    runs: Sequence[ReportedRun],
    path: str | Path,
    reference: Reference | None = None,
    *,
    tables: Mapping[str, Sequence[Sequence[str]]] | None = None,
) -> Path:
    """Writes the page, whole or not at all, and returns its path.

    With a `reference` it shows the range of healthy runs; `tables` (heading -> lines, the first a header) stand in it.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape

    environment = Environment(
        loader=PackageLoader("lightning_mue.health"), autoescape=select_autoescape(["html", "j2"])
    )
    page = environment.get_template("report.html.j2").render(
        runs=runs,
        look=look,
        legend=LEGEND,
        headline=headline,
        headers=HEADERS,
        cells=cells,
        tables=tables or {},
        sections=_sections(runs, reference),
        heat_maps=_heat_maps(runs),
        now=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )
    with whole_file(path) as part:
        part.write_text(page, encoding="utf-8")
    return Path(path)


def _sections(runs: Sequence[ReportedRun], reference: Reference | None) -> dict[str, list[str]]:
    """Heading -> panels as SVG, without empty ones."""
    panels: dict[str, dict[str, list[str]]] = {name: {} for name in _ORDER}
    for tag in dict.fromkeys(tag for run in runs for tag in run.metrics):
        section = next(name for name, patterns in SECTIONS.items() if any(re.fullmatch(p, tag) for p in patterns))
        panels[section].setdefault(_panel_of(tag), []).append(tag)
    return {
        section: [
            as_svg(_panel(title, tags, runs, reference)) for title, tags in titles.items() if len(tags) <= _MOST_LINES
        ]
        for section, titles in panels.items()
        if any(len(tags) <= _MOST_LINES for tags in titles.values())
    }


def _panel_of(tag: str) -> str:
    """The panel in which a tag is a line: one for each metric and place, one for its layers, one for a loss of each kind."""
    group, layer = split_place(tag)
    if layer:
        return f"{group} by layer"
    if is_loss(tag):
        return "loss"
    return re.sub(r"_(mean|max|min|step|epoch)$", "", tag)


def _panel(title: str, tags: Sequence[str], runs: Sequence[ReportedRun], reference: Reference | None) -> Any:
    labels = dict(zip(tags, _labels(tags, title), strict=True))
    shown: dict[str, dict[str, Series]] = {
        run.name: {labels[tag]: run.metrics[tag] for tag in tags if tag in run.metrics} for run in runs
    }
    found = indicator_of(tags[0])
    band = (None, None) if found is None else (found[0].watch, found[0].act)
    marks = [(f.step, LOOKS[f.level][1]) for run in runs for f in run.verdict.symptoms if _is_shown(f, found)]
    ranges = [] if reference is None else [both for tag in tags if (both := reference.band(tag)) is not None]
    return lines(title, shown, band=band, marks=marks, ranges=ranges)


def _labels(tags: Sequence[str], title: str) -> list[str]:
    if title.endswith(" by layer"):
        return without_shared_start([split_place(tag)[1] for tag in tags])
    return [tag if title == "loss" else tag.removeprefix(title).strip("/_") for tag in tags]


def _is_shown(symptom: Symptom, found: tuple[Any, str, str] | None) -> bool:
    return found is not None and symptom.indicator == found[0] and symptom.where == found[1]


def _heat_maps(runs: Sequence[ReportedRun]) -> dict[str, list[str]]:
    """Run -> heat maps as SVG of the metrics that have a value for each layer."""
    maps = {
        run.name: [as_svg(heat_map(group, layers)) for group, layers in layered(run.metrics).items()] for run in runs
    }
    return {name: svgs for name, svgs in maps.items() if svgs}


def _plan_of(folder: Path) -> str:
    path = folder / "plan.yaml"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The end of each path, from the first part in which they differ; names stay different."""
    if len(paths) == 1:
        return [paths[0].parent.name + "/" + paths[0].name if paths[0].name.startswith("version_") else paths[0].name]
    shared = 0
    while len({path.parts[: shared + 1] for path in paths}) == 1:
        shared += 1
    return ["/".join(path.parts[shared:]) or path.name for path in paths]
