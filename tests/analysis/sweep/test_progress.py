"""A line for each run where there is no terminal, a bar with the time left in one, and a table that says what is no optimum."""

import io
import math
from pathlib import Path

import pytest
from helpers.sweeps import plan
from rich.console import Console

from lightning_mue.analysis.sweep.plan import Job, Point
from lightning_mue.analysis.sweep.progress import ConsoleWatcher, best_rates, time_left
from lightning_mue.analysis.sweep.storage import Entry, Outcome
from lightning_mue.console import to_text


def entries(losses, state="finished", seconds=100.0):
    cell = plan().cells()[0]
    return [
        Entry(i, i, Job(cell, Point(lr), 0), "w", state, Outcome(loss, seconds=seconds), {})
        for i, (lr, loss) in enumerate(losses.items())
    ]


def shown(terminal, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with ConsoleWatcher(console, 2) as watcher:
        done = entries({0.01: 2.5})
        watcher.state([*done, *entries({0.02: math.nan}, "running", math.nan)], 3, [0.5])
        watcher.ended(Job(plan().cells()[0], Point(0.02), 1), Outcome(1.25, seconds=90.0), Path())
        (tmp_path / "log.txt").write_text("first\nlast words\n")
        watcher.ended(Job(plan().cells()[0], Point(0.04), 1), Outcome(math.nan, error="status 1: x"), tmp_path)
        watcher.ended(Job(plan().cells()[0], Point(0.08), 1), Outcome(math.inf, seconds=3.0), tmp_path)
    return console.file.getvalue()


def test_lines_where_there_is_no_terminal(tmp_path):
    text = shown(False, tmp_path)
    assert "[2 of 5, about 6 min left] none lr=0.02 seed=1: 1.2500 (90 s)\n" in text
    assert "none lr=0.04 seed=1: crashed (status 1: x)\nfirst\nlast words\nthe whole log: " in text
    assert "none lr=0.08 seed=1: diverged (3 s)" in text
    assert "\x1b" not in text
    assert "sweep, 1 running" not in text


def test_a_bar_in_a_terminal(tmp_path):
    text = shown(True, tmp_path)
    assert "sweep, 1 running here" in text
    assert "about 6 min left" in text


@pytest.mark.parametrize(
    ("running", "missing", "parts", "seconds"),
    [(1, 3, [0.5], 350.0), (2, 3, [0.5], 225.0), (0, 3, [], None)],
)
def test_time_left(running, missing, parts, seconds):
    now = entries({0.01: 1.0}) + entries({0.1 * (i + 1): 1.0 for i in range(running)}, "running", math.nan)
    assert time_left(now, missing, parts) == seconds
    assert time_left(now[1:], missing, parts) is None


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({0.01: 2.0, 0.02: 1.0, 0.04: 3.0}, ["0.02", "1.0000"]),
        ({0.01: 1.0, 0.02: 2.0}, ["0.01", "not between two finite losses: raise --extend"]),
        ({0.01: math.inf, 0.02: math.inf}, ["all diverged: raise --extend"]),
        ({0.01: math.nan}, ["no run was finished"]),
    ],
)
def test_the_table_says_what_is_no_optimum(losses, expected):
    text = to_text(best_rates(plan(), entries(losses)))
    assert all(part in text for part in expected)
    assert ("raise" in text) == any("raise" in part for part in expected)
