"""The plan of the house: imports go one way, rooms without circles, sizes, one meaning a word, references that exist."""

from __future__ import annotations

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import lightning_mue

PACKAGE = Path(lightning_mue.__file__).parent
ROOT = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
#: A room may import those of the lines above it; rooms of one line are independent of each other.
ORDER = [
    {"names", "sharded", "checks", "console", "contract", "files", "seeds"},
    {"namespaces", "class_paths"},
    {"parameterizations", "diagnostics", "kernels", "health"},
    {"optim", "moe", "metrics"},
    {"models"},
    {"callbacks", "data", "analysis"},
    {"cli"},
]
KNOWS_NO_LIGHTNING = ORDER[0] | ORDER[2] | {"metrics"}
#: What the house may have at most. A figure that falls is lowered here.
MOST_FILES_AT_ONE_LEVEL, MOST_LONG_FILES, LONG_FILE = 13, 3, 300
MOST_LONG_FUNCTIONS, LONG_FUNCTION = 1, 40


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {module_of(path): path for path in FILES}


def imports(path):
    """All imports of a file, those inside functions and of types alone too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((*node.module.split("."), alias.name) for alias in node.names)


def imported_modules(path):
    """The package's own modules that a file imports."""
    for name in imports(path):
        if name[0] == PACKAGE.name:
            yield next(name[:n] for n in range(len(name), 0, -1) if name[:n] in MODULES)


def rank_of(room):
    return next(i for i, rooms in enumerate(ORDER) if room in rooms)


def test_imports_go_one_way():
    for path in FILES:
        if path == PACKAGE / "__init__.py":
            continue
        own = module_of(path)[1]
        for name in imports(path):
            outside = name[0] in ("lightning", "pytorch_lightning") and own in KNOWS_NO_LIGHTNING
            assert not outside, f"{path}: {name}"
        for other in imported_modules(path):
            if len(other) > 1 and other[1] != own:
                assert rank_of(other[1]) < rank_of(own), f"{path} imports {'.'.join(other)}"


def test_own_imports_exist():
    """The type checker ignores a module that is missing, and an import inside a function fails only when it runs."""
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE.name:
                assert tuple(node.module.split(".")) in MODULES, f"{path} imports {node.module}"


@pytest.mark.parametrize("room", sorted({p.parent for p in FILES}), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_circle_inside_a_room(room):
    """Files and folders of one folder import each other in one direction, lazy and type-only imports counted."""
    depth = len(module_of(room / "__init__.py"))
    arrows = {}
    for path in FILES:
        module = module_of(path)
        if module[:depth] == module_of(room / "__init__.py") and len(module) > depth:
            for other in imported_modules(path):
                if other[:depth] == module[:depth] and len(other) > depth and other[depth] != module[depth]:
                    arrows.setdefault(module[depth], set()).add(other[depth])
    left = dict(arrows)
    while free := [a for a, targets in left.items() if not targets & set(left)]:
        for a in free:
            del left[a]
    assert not left, f"circle among {left}"


def test_few_files_at_one_level():
    counts = Counter(path.parent for path in FILES)
    assert {str(d): n for d, n in counts.items() if n > MOST_FILES_AT_ONE_LEVEL} == {}


def test_few_long_files():
    lengths = {str(p.relative_to(PACKAGE)): p.read_text(encoding="utf-8").count("\n") for p in FILES}
    long = {name: n for name, n in lengths.items() if n > LONG_FILE}
    assert len(long) <= MOST_LONG_FILES, long


def code_lines(function):
    """Lines of a function without its docstring, comments and empty lines."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    lines = {line for statement in body for node in ast.walk(statement) for line in _lines(node)}
    return len(lines)


def _lines(node):
    if not hasattr(node, "lineno"):
        return ()
    return (node.lineno, node.end_lineno) if isinstance(node, (ast.expr, ast.stmt)) else ()


def test_few_long_functions_outside_kernels():
    long = {
        f"{path.relative_to(PACKAGE)}:{node.name}": n
        for path in FILES
        if "kernels" not in path.parts
        for node in ast.walk(tree_of(path))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (n := code_lines(node)) > LONG_FUNCTION
    }
    assert len(long) <= MOST_LONG_FUNCTIONS, long


def test_a_class_name_means_one_thing():
    names = Counter(node.name for path in FILES for node in ast.walk(tree_of(path)) if isinstance(node, ast.ClassDef))
    assert {name: n for name, n in names.items() if n > 1} == {}


#: Files whose references are checked; this one names what is refused.
TEXTS = [
    path
    for pattern in (
        "lightning_mue/**/*.py",
        "tests/**/*.py",
        "benchmarks/*",
        "docs/**/*.md",
        "configs/*",
        "*.md",
        "*.toml",
        "Makefile",
    )
    for path in sorted(ROOT.glob(pattern))
    if path.is_file()
]
_FILE = re.compile(r"(?<![\w/.*{<-])((?:[\w-]+/)*[\w-]+\.(?:md|py|yaml|sh))(?![\w/])")
#: Files that users, tests or runs write; other projects' files.
_NOT_OURS = {
    "gpt.py",  # of the tutorial, like the next two
    "moe_gpt.py",
    "moe.yaml",
    "health.md",
    "base.yaml",
    "plan.yaml",
    "config.yaml",
    "run.yaml",
    "saved_config.yaml",
    "pretrain.py",
    "script.py",
    "train.py",
    "trial.yaml",
    "setup.py",
    "hparams.yaml",
}


#: Sources are papers and pages of docs/, not documents that stand elsewhere.
_ELSEWHERE = re.compile(
    r"\btheory \d|theory section|\bissue \d|design\.md|lightning-mechanics|performance\.md", re.IGNORECASE
)


def names_a_file(path, name):
    """A named file is in the project: from the root, beside the text, from the package, or by its bare name."""
    places = (ROOT / name, path.parent / name, PACKAGE / name)
    return any(place.exists() for place in places) or ("/" not in name and name in {p.name for p in TEXTS})


def test_references_exist():
    dangling = []
    for path in TEXTS:
        if path == Path(__file__):
            continue
        text = path.read_text(encoding="utf-8")
        dangling += [f"{path}: {found}" for found in _ELSEWHERE.findall(text)]
        if path.suffix == ".md" or (path.suffix == ".py" and path.is_relative_to(PACKAGE)):
            named = set(_FILE.findall(text)) - _NOT_OURS
            dangling += [f"{path}: {name}" for name in named if not names_a_file(path, name)]
    assert dangling == []


def test_the_changelog_names_modules_that_exist():
    """Each new place in the table of moved modules can be imported; `.name` and a trailing dot repeat what stands before."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = re.findall(r"^  \| (`lightning_mue\..*?) \| (`lightning_mue\..*) \|$", text, re.M)
    assert len(rows) > 20
    for old, new in rows:
        leaves = [name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", old)]
        parent = ""
        for name in re.findall(r"`([\w.]+)`", new):
            whole = parent + name if name.startswith(".") else name
            parent = whole.rstrip(".").rpartition(".")[0]
            for place in [whole + leaf for leaf in leaves] if whole.endswith(".") else [whole]:
                assert tuple(place.split(".")) in MODULES, place
