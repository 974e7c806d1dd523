"""``lightning-mue report``: one HTML page about one run or several, from what their loggers wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lightning_mue.analysis.forecast.record import read_record
from lightning_mue.analysis.forecast.score import HEADERS, score
from lightning_mue.checks import value_error
from lightning_mue.cli.parsing.parser import WordsParser
from lightning_mue.health.card import headline, look
from lightning_mue.health.reference import Reference
from lightning_mue.health.report import read_runs, write_report


def report_command(args: Sequence[str]) -> None:
    """Reads the runs, writes the page, and prints a line for each run.

    Raises:
        ValueError: If a folder holds no run, a loss is in no run, the output is a folder, or a forecast is not of these runs.
    """
    parser = WordsParser("report", description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a logger's folder, or one that holds several")
    parser.add_argument("--output", default="report.html", help="the page to write (default: %(default)s)")
    parser.add_argument(
        "--loss", action="append", default=[], metavar="TAG", help="a training loss that is not called one; repeatable"
    )
    parser.add_argument("--forecast", metavar="FILE", help="score these runs against a forecast")
    parser.add_argument(
        "--reference", nargs="+", default=[], metavar="DIR", help="healthy runs to compare with, step by step"
    )
    options = parser.parse_args(args)
    if Path(options.output).is_dir():
        found = f"the folder {options.output}"
        raise value_error("--output", found=found, expected="a file", do=f"Give {options.output}/report.html.")
    reference = Reference.read(options.reference) if options.reference else None
    runs = read_runs(options.runs, losses=options.loss, reference=reference)
    console = Console(soft_wrap=True, highlight=False)
    tables = {}
    if options.forecast is not None:
        record = read_record(Path(options.forecast))
        rows = [row for run in runs for row in score(record, run.name, run.folder, run.metrics)]
        tables[f"Forecast of {record['made']}"] = [HEADERS, *rows]
    page = write_report(runs, options.output, reference, tables=tables)
    for title, lines in tables.items():
        console.print(
            title,
            *(", ".join(f"{h} {c}" for h, c in zip(HEADERS, r, strict=True)) for r in lines[1:]),
            sep="\n  ",
            markup=False,
        )
    for run in runs:
        word, colour = look(run.verdict)
        console.print(f"[{colour}]{word}[/]  {run.name}: ", end="")
        console.print(headline(run.verdict), markup=False)
    console.print(f"written: {page}", markup=False)
