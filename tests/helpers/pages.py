"""Pages of docs as a reader meets them: their blocks, and their command lines run in this process."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

from lightning_mue.analysis.sweep.runner import OWN_COMMAND
from lightning_mue.cli import main

ROOT = Path(__file__).parents[2]
_RUN = subprocess.run


def sections(page: str) -> list[list[tuple[str, str]]]:
    """(language, text) of each fenced block of a page in docs, in order, by the headings that they stand under."""
    parts = (ROOT / "docs" / page).read_text(encoding="utf-8").split("\n## ")
    return [re.findall(r"```(\w+)\n(.*?)```", part, flags=re.DOTALL) for part in parts]


def blocks(page: str) -> list[tuple[str, str]]:
    """The same of the whole page."""
    return [block for section in sections(page) for block in section]


def lines(text: str) -> list[list[str]]:
    """The words of each command of a bash block, which a backslash continues on the next line."""
    return [shlex.split(line) for line in text.replace("\\\n", " ").splitlines()]


def printed(action) -> str:
    """What a call prints."""
    told = io.StringIO()
    with redirect_stdout(told):
        action()
    return told.getvalue()


def command(words) -> None:
    """Runs ``lightning-mue`` with these words; fails unless its status is 0."""
    status = 0
    try:
        main(list(words))
    except SystemExit as stop:
        status = stop.code
    assert not status, words


def run_here(called, **options):
    """`subprocess.run`, for lightning-mue itself in this process, which has imported everything."""
    if tuple(called[: len(OWN_COMMAND)]) != OWN_COMMAND:
        return _RUN(called, **options)
    return subprocess.CompletedProcess(called, 0, stdout=printed(lambda: command(called[3:])), stderr="")
