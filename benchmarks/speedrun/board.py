"""The board: what the stored runs say, as rows, claims and a Markdown page. Nothing is trained here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import targets
from common import STAMPS, machine
from entries import Entry
from measure import confirm, curve, transfer
from runs import NotRun, Runs
from targets import Claim

from lightning_mue.files import whole_file

Row = dict[str, Any]
NOT_RUN = "not run yet"


def rows(runs: Runs, entries: Sequence[Entry]) -> list[Row]:
    """One row an entry and column, or an entry, column and rule for transfers."""
    made: list[Row] = []
    for entry in entries:
        made += [_steps_row(runs, entry, column) for column in ("dense", "moe")]
        for column in ("moe", "width x 2"):
            made += [_transfer_row(runs, entry, column, rule) for rule in entry.settings["rules"]]
    return made


def _steps_row(runs: Runs, entry: Entry, column: str) -> Row:
    row: Row = {"entry": entry.name, "column": column, "rule": ""}
    met = _stored(lambda: curve(runs, entry, column))
    if met in (NOT_RUN, None):
        return row | {"steps": met or "not reached"}
    row |= {"steps": met.steps, "low": met.low, "high": met.high, "nats per doubling": met.slope, "std": met.deviation}
    found = _stored(lambda: confirm(runs, entry, column))
    if found in (NOT_RUN, None):
        return row | {"confirmed": found or "no try counted"}
    return row | {"confirmed": found.steps, "p": found.p, "losses": found.losses}


def _transfer_row(runs: Runs, entry: Entry, column: str, rule: str) -> Row:
    row: Row = {"entry": entry.name, "column": column, "rule": rule}
    at = _stored(lambda: transfer(runs, entry, column, rule))
    if at in (NOT_RUN, None):
        return row | {"steps": at or "the base does not reach the target"}
    row |= {"steps": at.to_target, "extra": at.extra, "best factor": at.best}
    return row | {"losses": at.losses, "length": at.steps}


def _stored(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except NotRun:
        return NOT_RUN


def claims(board: Sequence[Row]) -> list[Claim]:
    """The figures that the board is to reach; NaN where runs are missing."""

    def of(name: str, column: str, key: str, rule: str = "") -> float:
        rows = [row for row in board if (row["entry"], row["column"], row["rule"]) == (name, column, rule)]
        value = rows[0].get(key) if rows else None
        return float(value) if isinstance(value, (int, float)) else math.nan

    made = []
    for column in ("dense", "moe"):
        for peer, target in (("muon", 0.95), ("normuon", 0.95), ("adamw", 0.5)):
            ratios = {key: of("ours", column, key) / of(peer, column, key) for key in ("confirmed", "steps")}
            key = "steps" if math.isnan(ratios["confirmed"]) else "confirmed"
            how = {"steps": "interpolated, without confirmation", "confirmed": "confirmed"}[key]
            made.append(Claim(f"{column}: steps of ours over {peer}'s, {how}", "at most", target, ratios[key]))
    for column in ("moe", "width x 2"):
        for name, rule, direction, target in (
            ("ours", "hyperp", "at most", 0.03),
            ("adamw", "complete-mue", "at most", 0.03),
            ("adamw", "sp", "at least", 0.2),
        ):
            what = f"base -> {column}: share of extra steps, {name} under {rule}"
            made.append(Claim(what, direction, target, of(name, column, "extra", rule)))
    return made


def write(runs: Runs, entries: Sequence[Entry], stem: Path) -> bool:
    """Write ``.json`` and ``.md``, print the claims, and return whether all hold."""
    board, here = rows(runs, entries), machine()
    made = claims(board)
    stamps = {"threads": int(here["threads"]), **{key: here[key] for key in STAMPS[1:]}}
    stored = [{**claim.to_json(), "threads": stamps["threads"], "date": stamps["date"]} for claim in made]
    stamped = [{**row, **stamps} for row in board]
    result = {"machine": here, "claims": stored, "task": dict(vars(runs.task)), "rows": stamped}
    with whole_file(stem.with_suffix(".json")) as path:
        path.write_text(json.dumps(result, indent=1) + "\n")
    with whole_file(stem.with_suffix(".md")) as path:
        path.write_text(page(runs, board, here, made))
    print(stem.with_suffix(".md").read_text())
    return targets.report(made)


def page(runs: Runs, board: Sequence[Row], here: dict[str, str], made: Sequence[Claim]) -> str:
    """The Markdown page."""
    task = runs.task
    head = [
        f"# Speedrun: steps to {task.target:g} nats per byte",
        "",
        f"{here['cpu']} ({here['isa']}), {here['date']}, commit {here['commit']}. Protocol: docs/speedrun.md. Fewest steps first.",
        "",
        f"Interpolated: with a 90 % interval over {task.curve_seeds} seeds. Confirmed: the shortest tried length of",
        f"which the mean loss of {task.seeds} seeds is below the target (one-sided t-test, p < 0.01).",
        "",
    ]
    for column in ("dense", "moe"):
        of = [row for row in board if row["column"] == column and not row["rule"]]
        of.sort(key=lambda row: row["steps"] if isinstance(row["steps"], float) else math.inf)
        head += [f"## {_title(runs, column)}", "", "| entry | interpolated | confirmed | p |", "|---|---|---|---|"]
        head += [
            f"| {row['entry']} | {_steps(row)} | {row.get('confirmed', '')} | {_number(row.get('p'), '.1g')} |"
            for row in of
        ]
        head += [""]
    columns = "| to | entry | rule | loss at x 0.5, x 1, x 2 of the rates | extra steps | steps to the target |"
    head += ["## Transfer: hyperparameters of the dense base", "", columns, "|---|---|---|---|---|---|"]
    for row in (row for row in board if row["rule"]):
        losses = ", ".join(f"{loss:.3f}" for loss in row.get("losses", {}).values())
        cells = [
            row["column"],
            row["entry"],
            row["rule"],
            losses,
            _number(row.get("extra"), ".1%"),
            _number(row["steps"], ".0f"),
        ]
        head.append("| " + " | ".join(cells) + " |")
    head += ["", "## Targets", "", *(f"- {claim}" for claim in made), ""]
    return "\n".join(head)


def _title(runs: Runs, column: str) -> str:
    return f"{column}: {', '.join(f'{key} {value}' for key, value in runs.task.sizes(column).items())}"


def _steps(row: Row) -> str:
    if not isinstance(row["steps"], float):
        return str(row["steps"])
    return f"{row['steps']:.0f} ({row['low']:.0f}-{row['high']:.0f})"


def _number(value: Any, form: str) -> str:
    return "" if value is None else value if isinstance(value, str) else format(value, form)
