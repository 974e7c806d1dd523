"""The command line on a small corpus."""

from __future__ import annotations

import pytest

from lightning_mue.cli import main


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A small folder of text, and a cache of its own."""
    monkeypatch.setenv("LIGHTNING_MUE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"file {i}: " + "the quick brown fox jumps over the lazy dog. " * 8)
    return folder


@pytest.fixture
def run(capsys):
    """Runs the command; returns (exit status, all output on one line with single spaces)."""

    def run(*args):
        status = 0
        try:
            main([str(a) for a in args])
        except SystemExit as stop:
            status = stop.code
        captured = capsys.readouterr()
        return status, " ".join((captured.out + captured.err).split())

    return run
