"""The derivation pages show the tables of the code, and nothing else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_mue.parameterizations import RULES, Role
from lightning_mue.parameterizations.document import END, PAGES, START, main, render, rewrite

FOLDER = Path(__file__).parents[2] / "docs" / "derivations"


@pytest.mark.parametrize("page", PAGES)
def test_committed_page_is_what_the_code_renders(page):
    text = (FOLDER / f"{page}.md").read_text(encoding="utf-8")
    assert text == rewrite(text, PAGES[page]), "run `python -m lightning_mue.parameterizations.document`"
    for heading in ("**Claim.**", "**Layer.**", "**Why the cells are what they are.**", "**What to check.**"):
        assert heading in text, heading


def test_every_rule_has_a_page():
    """`sp` has nothing to derive; `mssp` is one of its regimes."""
    documented = {rule for rules in PAGES.values() for rule in rules}
    assert documented == {*RULES} - {"sp", "mssp"}


def test_a_page_that_is_out_of_date_is_found_and_rewritten(tmp_path, capsys):
    for page in FOLDER.glob("*.md"):
        (tmp_path / page.name).write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    assert main([str(tmp_path), "--check"]) == 0
    page = tmp_path / "mup.md"
    current = page.read_text(encoding="utf-8")
    page.write_text(current.replace("`d^-1/2`", "`d^-1/3`"), encoding="utf-8")
    assert main([str(tmp_path), "--check"]) == 1
    assert re.search(r"mup\.md: found tables that are out of date, expected the code's\. Run", capsys.readouterr().out)
    assert main([str(tmp_path)]) == 0
    assert page.read_text(encoding="utf-8") == current


def test_a_changed_cell_changes_the_page(monkeypatch):
    before = render(["mup"])
    rule = RULES["mup"]
    table = {**rule.tables["adam"], Role.HIDDEN: replace(rule.tables["adam"][Role.HIDDEN], lr="d^-2")}
    monkeypatch.setitem(RULES, "mup", replace(rule, tables={**rule.tables, "adam": table}))
    after = render(["mup"])
    assert "`d^-2`" in after
    assert "`d^-2`" not in before


def test_every_row_of_a_rule_is_on_its_page():
    text = render(["moe-dmft"])
    for role, row in RULES["moe-dmft"].tables["adam"].items():
        lines = [line for line in text.splitlines() if re.match(rf"\| ([a-z_, ]*, )?{role.value}[, ]", line)]
        assert len(lines) == 1, role
        cells = [cell.strip() for cell in lines[0].strip("|").split("|")]
        assert cells[1].startswith(f"`{row.init}`")
        assert cells[2:7] == [f"`{row.lr}`", f"`{row.wd}`", f"`{row.eps}`", row.status, row.source]


def test_variants_show_only_what_differs():
    text = render(["moe-dmft", "moe-dmft-half"]).split("### Rule `moe-dmft-half`")[1]
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| role", "| ---"))]
    assert len(rows) == 1
    assert rows[0].startswith("| router | `d^-1/2`")


@pytest.mark.parametrize(
    "text",
    ["no markers", START, f"{END}\n{START}", f"{START}\n{END}\n{START}\n{END}"],
    ids=("none", "one", "order", "two"),
)
def test_markers_that_do_not_fit_are_refused(text, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"page: found \d line\(s\) .*, expected one line <!-- table:start -->"):
        rewrite(text, ["mup"])
    first = f"{next(iter(PAGES))}.md"
    (tmp_path / first).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert f"{first}: page: found" in capsys.readouterr().err


def test_a_missing_page_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert f"{next(iter(PAGES))}.md" in capsys.readouterr().err
