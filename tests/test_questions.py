"""The commands of the page of questions: those that show a plan run, and show what the answer says; sweeps are planned."""

from __future__ import annotations

import re
import subprocess

import pytest
from helpers.pages import ROOT, blocks, command, lines, printed, run_here

from lightning_mue.cli import sweep

LINES = [line[1:] for kind, text in blocks("questions.md") if kind == "bash" for line in lines(text)]
#: A word of the line -> what its table shows: role and factors, or a line below it.
SHOWN = {
    "tokens: 819200": r"embedding .* std 0\.073 +0\.5 +0\.5 ",
    "n_experts 64": r"expert_up .* 0\.25 +4 +0\.003997 ",
    "alpha 0.5": r"hidden .* 0\.1768 +4 ",
    "n_heads 2": r"forward multiplier +transformer\.blocks\.\*\.attention\.core\.scale = 0\.04419",
    "tie_embeddings true": r"unembedding .* 1 +1 +0\.25 (.*\n)*.*unembedding\.output_multiplier = 0\.25",
    "hyperp-paper": r"unembedding .* 0\.25 │ +0\.12 │ +0\.25 ",
    "initialize false": r"hidden .* 0\.25 +4 ",
}


def test_the_page_has_a_command_for_every_answer():
    answers = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8").split("\n## ")[1:]
    without = [answer.splitlines()[0] for answer in answers if "```bash" not in answer and "See it" not in answer]
    assert len(answers) >= 10
    assert without == []


@pytest.mark.slow
def test_every_plan_is_shown(monkeypatch):
    monkeypatch.chdir(ROOT)
    plans = [line for line in LINES if line[0] == "explain"]
    for line in plans:
        told = printed(lambda line=line: command(line))
        expected = [pattern for words, pattern in SHOWN.items() if words in " ".join(line).replace("--mue.", "")]
        assert len(expected) == 1, line
        assert re.search(expected[0], told), (line, told)
    assert len(plans) == len(SHOWN)


@pytest.mark.slow
def test_every_other_command_is_one(monkeypatch):
    """Sweeps and checks up to their first training."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(subprocess, "run", run_here)
    monkeypatch.setattr(sweep, "check_builds", lambda plan, cli: None)
    planned = []
    monkeypatch.setattr(sweep, "_run", lambda options, plan: planned.append(plan))
    others = [line for line in LINES if line[0] != "explain"]
    for line in others:
        end = ["--print_config"] if line[0] == "coord-check" else []
        printed(lambda line=line, end=end: command([*line, *end]))
    assert len(planned) == sum(line[0] == "sweep" for line in others) == 2
    assert all(plan.seeds == 3 for plan in planned)
