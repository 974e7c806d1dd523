from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_mue


def test_type_checkers_see_the_same_names_in_the_same_modules():
    tree = ast.parse(Path(lightning_mue.__file__).read_text())
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"lightning_mue.{module}" for name, module in lightning_mue._PUBLIC.items()}


def test_public_names():
    for name in lightning_mue.__all__:
        assert getattr(lightning_mue, name) is not None
        assert name in dir(lightning_mue)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = lightning_mue.Nothing


def test_import_alone_loads_nothing_large():
    """`import lightning_mue` loads modules of the standard library only, and dir() lists the public names all the same."""
    code = (
        "import sys; before = set(sys.modules); import lightning_mue; assert 'MuECallback' in dir(lightning_mue)\n"
        "print(*{m.partition('.')[0] for m in set(sys.modules) - before} - {'lightning_mue', *sys.stdlib_module_names})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == []  # neither torch nor lightning, triton, matplotlib, numpy or rich
