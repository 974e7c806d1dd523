"""``lightning-mue certify``: whether the rate tuned at one size holds at the others of a sweep, or of several side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from lightning_mue.analysis.certificate import Certificate, Limits, certify
from lightning_mue.analysis.certificate.pictures import COLOURS
from lightning_mue.analysis.trials import Trial, Value, read_trials
from lightning_mue.checks import require_choice, value_error
from lightning_mue.cli.parsing.parser import WordsParser
from lightning_mue.console import wide_console


def certify_command(args: Sequence[str]) -> None:
    """Writes certificate.html, .png, .csv and .json, and prints the verdicts; the exit status is 1 unless all transfer.

    Raises:
        ValueError: If a sweep cannot be read or certified.
    """
    parser = WordsParser("certify", description=__doc__)
    parser.add_argument("sweeps", nargs="+", metavar="SWEEP", help="a sweep's folder, or its trials.csv")
    parser.add_argument("--base", default="", metavar="NAME=VALUE,...", help="size tuned (default: the smallest)")
    parser.add_argument(
        "--rule", action="append", default=[], help="a rule that decides the exit status (default: all)"
    )
    parser.add_argument("--drift", type=float, default=Limits.drift, help="octaves allowed (default: %(default)s)")
    parser.add_argument("--penalty", type=float, default=Limits.penalty, help="loss allowed (default: %(default)s)")
    parser.add_argument("--output", help="folder of the certificate (default: that of the first sweep)")
    options = parser.parse_args(args)
    trials = read_sweeps(options.sweeps)
    for rule in options.rule:
        require_choice("--rule", rule, sorted({trial.rule for trial in trials}))
    certificate = certify(trials, read_size(options.base), limits=Limits(options.drift, options.penalty))
    write_and_show(certificate, options.output or table_of(options.sweeps[0]).parent)
    if not certificate.holds(options.rule):
        raise SystemExit(1)


def write_and_show(certificate: Certificate, folder: str | Path) -> None:
    """Writes a certificate's files, and prints its table and verdicts."""
    page = certificate.write(folder)
    console = wide_console()
    console.print(certificate)
    for result in certificate.results:
        console.print(f"[{COLOURS[result.verdict]}]{result.verdict}[/]  {result.rule}, {result.axis}: ", end="")
        console.print(result.reason, markup=False, highlight=False)
    console.print(f"written: {page}", markup=False, highlight=False, soft_wrap=True)


def read_sweeps(paths: Sequence[str]) -> list[Trial]:
    """The trials of several sweeps; a rule that is in more than one of them has the sweep's name added.

    Raises:
        ValueError: If a path is no table of trials, or two have one name.
    """
    tables = {path: read_trials(path) for path in dict.fromkeys(table_of(path) for path in paths)}
    counts = Counter(rule for trials in tables.values() for rule in {trial.rule for trial in trials})
    names = [_name_of(path) for path in tables]
    if len(set(names)) < len(names) and max(counts.values()) > 1:
        found = ", ".join(map(str, tables))
        raise value_error("SWEEP", found=found, expected="sweeps of one rule with names of their own", do="Rename one.")
    return [
        replace(trial, rule=f"{trial.rule} ({_name_of(path)})") if counts[trial.rule] > 1 else trial
        for path, trials in tables.items()
        for trial in trials
    ]


def table_of(path: str) -> Path:
    """The table of trials of a sweep's folder, or the path itself.

    Raises:
        ValueError: If it does not exist.
    """
    table = Path(path) / "trials.csv" if Path(path).is_dir() else Path(path)
    if not table.is_file():
        do = "`lightning-mue sweep` writes it."
        raise value_error("SWEEP", found=f"{path} without a table", expected="a folder with trials.csv", do=do)
    return table.resolve()


def _name_of(table: Path) -> str:
    return table.parent.name if table.name == "trials.csv" else table.stem


def read_size(text: str) -> dict[str, Value] | None:
    """A size from the command line; None if empty.

    Example:
        >>> read_size("width=64,n_experts=0")
        {'width': 64, 'n_experts': 0}
    """
    size: dict[str, Value] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not (name and equals and value):
            raise value_error("--base", found=repr(part), expected="NAME=VALUE", do="For example --base width=64.")
        size[name] = yaml.safe_load(value)
    return size or None
