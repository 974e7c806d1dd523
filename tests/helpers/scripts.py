"""Imports the scripts of a benchmark, which import each other by their bare names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

import lightning_mue

BENCHMARKS = Path(lightning_mue.__file__).parents[1] / "benchmarks"


@contextmanager
def imported(monkeypatch: pytest.MonkeyPatch, names: Sequence[str], folder: str = "") -> Iterator[SimpleNamespace]:
    """Modules by name, from ``benchmarks/`` and a folder in it, whose own come first; forgotten at the end."""
    for path in dict.fromkeys((BENCHMARKS, BENCHMARKS / folder)):
        monkeypatch.syspath_prepend(str(path))
    for name in names:  # a folder of tests may have the name of a script
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield SimpleNamespace(**{name: import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)
