from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_mue

PACKAGE = Path(lightning_mue.__file__).parent
#: A package may import those of earlier entries. Packages of one entry are independent.
ORDER = [
    {"parameterizations", "diagnostics", "kernels"},
    {"optim", "moe"},
    {"models"},
    {"callbacks", "data", "analysis"},
    {"cli"},
]
KNOWS_NO_LIGHTNING = {"parameterizations", "diagnostics", "kernels"}


def layer_of(part):
    return next(i for i, parts in enumerate(ORDER) if part in parts)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", [p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE], ids=str)
def test_imports_go_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        top, *rest = name.split(".")
        assert not (top in ("lightning", "pytorch_lightning") and own in KNOWS_NO_LIGHTNING), name
        if top == "lightning_mue" and rest and any(rest[0] in parts for parts in ORDER):
            other = rest[0]
            assert other == own or layer_of(other) < layer_of(own), f"{own} imports {name}"


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


def test_import_alone_loads_neither_torch_nor_lightning_nor_triton():
    code = "import sys, lightning_mue; print([m for m in ('torch', 'lightning', 'triton', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
