"""Every page of docs can be found: from the index, and every link between pages leads to a file."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
LINK = re.compile(r"\]\(([\w./-]+)(?:#[\w-]+)?\)")


def links(page):
    return {(page.parent / target).resolve() for target in LINK.findall(page.read_text(encoding="utf-8"))}


def test_every_page_is_linked_from_the_index():
    found = links(DOCS / "index.md") | links(DOCS / "indicators" / "README.md")
    pages = {page.resolve() for page in DOCS.rglob("*.md")} - {(DOCS / "index.md").resolve()}
    assert len(pages) > 40
    assert sorted(page.relative_to(DOCS.resolve()).as_posix() for page in pages - found) == []


def test_the_index_is_one_screen():
    assert len((DOCS / "index.md").read_text(encoding="utf-8").splitlines()) <= 50


def test_every_link_leads_somewhere():
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md"]
    broken = [f"{page.name} -> {target}" for page in pages for target in links(page) if not target.exists()]
    assert broken == []
