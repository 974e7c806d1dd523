"""The command line on a small corpus."""

from __future__ import annotations

import pytest

from lightning_mue import MoELanguageModel
from lightning_mue.cli import main
from lightning_mue.cli.lightning_cli import MuECLI

_PARSERS = {}


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
def every_command():
    """For tests of the whole command line: see `_parsers_kept` and `_short_sample`."""


@pytest.fixture(autouse=True)
def _parsers_kept(request, monkeypatch):
    """The parser of a command is made once for all tests: that is two thirds of the time of a command line."""
    if "every_command" in request.fixturenames:
        return
    make = MuECLI.setup_parser

    def setup_parser(self, add_subcommands, *args):
        key = (*self.subcommands(), add_subcommands)
        if key not in _PARSERS:
            before = set(vars(self))
            make(self, add_subcommands, *args)
            _PARSERS[key] = {name: value for name, value in vars(self).items() if name not in before}
        vars(self).update(_PARSERS[key])

    monkeypatch.setattr(MuECLI, "setup_parser", setup_parser)


@pytest.fixture(autouse=True)
def _short_sample(request, monkeypatch):
    """The text sample at the end of a fit is 8 tokens, not 240, which take longer than the fit itself."""
    if "every_command" in request.fixturenames:
        return
    generate = MoELanguageModel.generate
    monkeypatch.setattr(
        MoELanguageModel, "generate", lambda self, prompt, count, **more: generate(self, prompt, 8, **more)
    )


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
