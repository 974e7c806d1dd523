"""What parsers would pass over in silence: an option or a key that is given twice, of which the last would count.

Values of options are looked into, too: files of YAML, and mappings that stand on the command line.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import yaml

from lightning_mue.checks import value_error


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
        _check_document(name, value)
        key = name.replace("-", "_")
        if name in repeatable or name.endswith("+") or name.startswith(lists):
            continue
        if seen.setdefault(key, value) != value:
            raise value_error(name, found=f"{seen[key]!r} and {value!r}", expected="one value", do="Remove the other.")


def _options(args: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option, value); "" where none follows."""
    for word, following in zip(args, [*args[1:], "--"], strict=True):
        name, equals, value = word.partition("=")
        if name.startswith("--") or name == "-c":
            yield name, value if equals or following.startswith("--") else following


def _check_document(name: str, value: str) -> None:
    text = value if value.startswith(("{", "[")) else ""
    try:
        if Path(value).suffix in (".yaml", ".yml", ".json") and Path(value).is_file():
            text = Path(value).read_text(encoding="utf-8")
        twice = next(_twice(yaml.compose(text, Loader=yaml.SafeLoader)), None)
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
