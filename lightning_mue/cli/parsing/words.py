"""What parsers would pass over in silence: options and keys that are given twice, variables of the environment that nothing reads.

Values of options are looked into, too: files of YAML, and mappings that stand on the command line.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import yaml
from lightning.pytorch.utilities import rank_zero_warn

from lightning_mue.checks import mismatch, value_error
from lightning_mue.cli.parsing.options import nearest

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast
#: Variables of the environment that this package and its tests read.
_VARIABLES = tuple(
    f"LIGHTNING_MUE_{name}" for name in ("AUTOTUNE", "CACHE", "CPU_DTYPE", "TRACEBACK", "TRIAL", "TEST_SEED")
)


def check_words(args: Sequence[str], repeatable: Collection[str]) -> None:
    """Refuses a command line with two values for one key.

    Arguments of list items, which follow ``--trainer.callbacks+=CLASS``, may come once for each item.

    Args:
        args: The words.
        repeatable: Options that may be given several times.

    Raises:
        ValueError: With the key and both values.
    """
    options = list(_options(args))
    lists = tuple(f"{name.removesuffix('+')}." for name, _ in options if name.endswith("+"))
    seen: dict[str, str] = {}
    for name, value in options:
        _check_document(value)
        key = name.replace("-", "_")
        if name in repeatable or name.endswith("+") or name.startswith(lists):
            continue
        if seen.setdefault(key, value) != value:
            raise value_error(name, found=f"{seen[key]!r} and {value!r}", expected="one value", do="Remove the other.")


def check_environment() -> None:
    """Refuses misspelled variables of this package, and warns of Lightning's for the trainer, which a command line overrides.

    Raises:
        ValueError: With the nearest name.
    """
    for name in os.environ:
        if name.startswith("PL_TRAINER_"):
            key = f"--trainer.{name.removeprefix('PL_TRAINER_').lower()}"
            found, expected = "a variable of the environment, which is not read here", "an option"
            rank_zero_warn(mismatch(name, found=found, expected=expected, do=f"Give {key}, or unset it."))
        own = name.startswith("LIGHTNING_MUE_") and not os.environ.get("JSONARGPARSE_DEFAULT_ENV")
        if own and name not in _VARIABLES:
            found, expected = "a variable of the environment that nothing reads", f"one of {', '.join(_VARIABLES)}"
            raise value_error(name, found=found, expected=expected, do=nearest(name, _VARIABLES))


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option, value); "" where none follows."""
    for word, following in zip(args, [*args[1:], "--"], strict=False):
        name, equals, value = word.partition("=")
        if name.startswith("--") or name == "-c":
            yield name, value if equals or following.startswith("--") else following


def _check_document(value: str) -> None:
    text = value if value.startswith(("{", "[")) else ""
    try:
        if Path(value).suffix in (".yaml", ".yml", ".json") and Path(value).is_file():
            text = Path(value).read_text(encoding="utf-8")
        twice = next(_twice(yaml.compose(text, Loader=_LOADER)), None)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):  # the parser tells it
        return
    if twice is not None:
        key, lines = twice
        found = f"a second value in line {lines[1]} of {value}, after that of line {lines[0]}"
        raise value_error(key, found=found, expected="each key once", do="Remove one of them.")


def _twice(node: yaml.Node | None, path: str = "") -> Iterator[tuple[str, tuple[int, int]]]:
    """(dotted path, its lines) of each key that a mapping has twice."""
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _twice(item, f"{path}[{i}]")
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            here, line = f"{path}.{key.value}".lstrip("."), key.start_mark.line + 1
            if here in lines and key.value != "<<":
                yield here, (lines[here], line)
            lines[here] = line
            yield from _twice(value, here)
