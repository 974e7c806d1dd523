"""Writes the tables of the derivation pages from the code, so that both agree.

``python -m lightning_mue.parameterizations.document`` rewrites the text between the markers of every page in
``docs/derivations``; ``--check`` only reports pages that are out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lightning_mue.checks import mismatch, value_error
from lightning_mue.files import whole_file
from lightning_mue.parameterizations.rules.kinds import Family
from lightning_mue.parameterizations.rules.monomial import SYMBOLS, parse
from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.parameterizations.rules.table import RULES, Parameterization, Preset, Row, get_rule

START, END = "<!-- table:start -->", "<!-- table:end -->"


def _pages() -> dict[str, list[str]]:
    pages: dict[str, list[str]] = {}
    for name, rule in RULES.items():
        if rule.page and rule.resolve is None:  # `mssp` is one of its regimes
            pages.setdefault(Path(rule.page).stem, []).append(name)
    return pages


#: Page -> its rules. The first is shown in full, the others by what differs from it.
PAGES: Mapping[str, Sequence[str]] = _pages()


def render(names: Sequence[str]) -> str:
    """Markdown: per rule and optimizer family one table, then the rule's other settings.

    The first rule is shown in full, each further one by the rows in which it differs from the first.
    """
    first, *others = (get_rule(name) for name in names)
    parts = [_legend((first, *others)), *_sections(first, None)]
    for other in others:
        parts += _sections(other, first)
    return "\n\n".join(parts)


def _legend(rules: Iterable[Parameterization]) -> str:
    cells = [cell for rule in rules for cell in _cells(rule)]
    used = {symbol for cell in cells for symbol in parse(cell).powers}
    listed = ", ".join(f"`{symbol}` {meaning}" for symbol, meaning in SYMBOLS.items() if symbol in used)
    return (
        "A cell multiplies the value tuned at the base; a symbol is the ratio target / base: "
        f"{listed}. Roles with equal rows share a line."
    )


def _cells(rule: Parameterization) -> Iterator[str]:
    yield rule.betas
    yield rule.tied_output or "1"
    yield from rule.multipliers.values()
    yield from rule.invariants.values()
    for table in rule.tables.values():
        for row in table.values():
            yield from (row.init, row.lr, row.wd, row.eps)


def _sections(rule: Parameterization, reference: Parameterization | None) -> list[str]:
    parts = [f"### Rule `{rule.name}`\n\nSource: {rule.source}."]
    for family, table in rule.tables.items():
        known = reference.tables.get(family, {}) if reference is not None else {}
        rows = {role: row for role, row in table.items() if known.get(role) != row}
        if not rows:
            continue
        rest = f"; the other roles as `{reference.name}`" if reference is not None and len(rows) < len(table) else ""
        parts.append(f"Optimizer family `{family}`{rest}:\n\n{_table(rows, family)}")
    settings = [line for line in _settings(rule) if reference is None or line not in set(_settings(reference))]
    return [*parts, "\n".join(settings)] if settings else parts


def _table(rows: Mapping[Role, Row], family: Family) -> str:
    """One Markdown table; SGD has no epsilon."""
    columns = ["init", "lr", "wd"] + (["eps"] if family != "sgd" else [])
    merged: dict[Row, list[str]] = {}
    for role in Role:
        if role in rows:
            merged.setdefault(rows[role], []).append(role.value)
    head = ["role", "init std", *columns[1:], "status", "source"]
    lines = [head, ["---"] * len(head)]
    for row, roles in merged.items():
        cells = [f"`{getattr(row, column)}`" for column in columns]
        if row.tied:
            cells[0] += ", every expert alike"
        if row.absent_init:
            cells[0] += f" (base without one: `{row.absent_init}` of its absolute sizes)"
        lines.append([", ".join(roles), *cells, row.status, row.source])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _settings(rule: Parameterization) -> list[str]:
    """What else the rule holds, as a Markdown list."""

    def listed(values: Mapping[str, str]) -> str:
        return ", ".join(f"{name} `{cell}`" for name, cell in values.items())

    routers = "; ".join(f"{setting} {' or '.join(sorted(values))}" for setting, values in rule.routing.items())
    lines = {
        "Forward multipliers": listed(rule.multipliers),
        "Tied embeddings": f"the row of `embedding`; the logits times `{rule.tied_output}`" if rule.tied_output else "",
        "`1 - beta` of Adam": f"`{rule.betas}`" if rule.betas != "1" else "",
        "Axes along which transfer is claimed": ", ".join(sorted(rule.moves)),
        "Router for which transfer over experts is claimed": routers,
        "Must not change": ", ".join(f"{symbol} ({SYMBOLS[symbol]})" for symbol in sorted(rule.fixed)),
        "Depth exponent": f"alpha = {rule.alpha:g} only" if rule.alpha is not None else "",
        "Models with the same limit agree in (absolute sizes)": listed(rule.invariants),
    }
    presets = [_preset(name, preset) for name, preset in rule.presets.items()]
    return [f"* {what}: {text}." for what, text in lines.items() if text] + presets


def _preset(name: str, preset: Preset) -> str:
    parts = []
    if preset.base:
        parts.append("base " + ", ".join(f"{key} {value:.10g}" for key, value in preset.base.items()))
    parts += [f"{key} {value:g}" for key, value in preset.hyperparameters.items()]
    for pattern, factors in preset.factors.items():
        shown = " and ".join(f"{column} x {factor:g}" for column, factor in factors.items())
        parts.append(f"`{pattern}` {shown}".replace("|", "\\|"))
    return f"* Preset `{name}` ({preset.source}): {'; '.join(parts)}."


def rewrite(page: str, names: Sequence[str]) -> str:
    """The text of a page with the tables of its rules between the markers rendered again.

    Raises:
        ValueError: If a marker is missing or occurs twice, or they are in the wrong order.
    """
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        found = f"{page.count(START)} line(s) {START} and {page.count(END)} line(s) {END}"
        expected = f"one line {START} and after it one line {END}"
        raise value_error("page", found=found, expected=expected, do="Put them where the tables belong.")
    before, rest = page.split(START)
    return f"{before}{START}\n\n{render(names)}\n\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrites or checks the pages; returns the number of pages that were out of date and still are."""
    parser = argparse.ArgumentParser(prog="python -m lightning_mue.parameterizations.document", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("docs/derivations"), help="where the pages are")
    parser.add_argument("--check", action="store_true", help="report pages that are out of date, write nothing")
    options = parser.parse_args(arguments)
    stale = 0
    for name, rules in PAGES.items():
        path = options.folder / f"{name}.md"
        try:
            old = path.read_text(encoding="utf-8")
            new = rewrite(old, rules)
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
        if new == old:
            continue
        if options.check:
            stale += 1
            do = f"Run `python -m {__package__}.document`."
            print(mismatch(str(path), found="tables that are out of date", expected="the code's", do=do))
        else:
            with whole_file(path) as part:
                part.write_text(new, encoding="utf-8")
            print(f"{path}: written")
    return stale


if __name__ == "__main__":
    sys.exit(main())
