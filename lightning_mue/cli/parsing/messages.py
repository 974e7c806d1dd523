"""Turns the parser's errors, pages that hold the right line somewhere, into one paragraph: key, found, expected, nearest key.

The text is all that the parser gives. What is not recognized here is shown shortened, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mue.checks import mismatch
from lightning_mue.cli.parsing.options import Given, nearest

_LONGEST = 160
_KEY = re.compile(r"^(?:- )?Parser key \"([^\"]+)\":\s*(.*)$")
_SAYS = re.compile(
    r"Option '|Expected (?!a path but)|Problem with|Not a valid|Not of type|module '|No module|Unable|Invalid|File does"
)
_WORDS = {"<class 'NoneType'>": "null", "NoneType": "null", "typing.": "", "collections.abc.": "", "pathlib.": ""}


@dataclass(frozen=True)
class _Reason:
    """One line that says what is wrong: the keys around it from the outside in, the types allowed there, the line, what follows."""

    keys: tuple[str, ...]
    types: str
    text: str
    rest: str

    @property
    def rank(self) -> tuple[int, int]:
        """How much it tells: a line deep inside, or about a name, tells more than that the whole is of another type."""
        telling = ("Not ", "Problem with", "Option ")  # in ascending order
        return len(self.keys), max((i + 1 for i, word in enumerate(telling) if self.text.startswith(word)), default=0)


def explained(message: str, given: Given) -> str:
    """The paragraph for a message of the parser."""
    text = message.strip()
    for pattern, told in _SIMPLE:
        if found := re.search(pattern, text, re.DOTALL):
            return told(found, given)
    # Of an argument that takes a function or a class, the error inside is added to the line, and the value to its end.
    text = re.sub(r"Type \S.* expects a function or a callable class: ", "", text)
    text = re.sub(r"\. Got value: Namespace\(.*$", "", text, flags=re.MULTILINE)
    reasons = list(_reasons(text))
    if not reasons:
        return _short(" ".join(text.split()), 600)
    return _told(max(reasons, key=lambda reason: reason.rank), given)


def _reasons(text: str) -> Iterator[_Reason]:
    """The lines that say what is wrong, with the keys under which they stand by their indentation."""
    stack: list[tuple[int, str, str]] = []
    lines = text.splitlines()
    for i, line in enumerate(lines):
        indent, content = len(line) - len(line.lstrip(" -")), line.lstrip(" -")
        if key := _KEY.match(content):
            stack = [each for each in stack if each[0] < indent] + [(indent, key[1], "")]
            content = key[2]
        around = [each for each in stack if each[0] <= indent]
        if content.startswith("Subtypes:") and around:
            stack = [*around[:-1], (*around[-1][:2], content.removeprefix("Subtypes:").strip(" []"))]
        elif around and _SAYS.match(content):
            yield _Reason(tuple(each[1] for each in around), around[-1][2], content, "\n".join(lines[i + 1 :]))


def _told(reason: _Reason, given: Given) -> str:
    top = ".".join(reason.keys)
    if option := re.match(r"Option '([^']+)' is not accepted", reason.text):
        known = given.options_under(reason.keys[0], option[1])
        return _unknown(given.written(reason.keys[0], option[1]), known)
    key = given.written(reason.keys[0], ".".join(reason.keys[1:])) if len(reason.keys) > 1 else top
    named = re.search(r"class_path '([^']+)'|dot import path string: (\S+)", reason.text)
    if lacking := re.match(r"module '([^']+)' has no attribute '(\w+)'", reason.text):
        path = f"{lacking[1]}.{lacking[2]}"
        expected = "the path of a class that is there"
        return mismatch(key, found=repr(path), expected=expected, do=nearest(path, given.classes(path)))
    if named:
        path = (named[1] or named[2]).rstrip(".")
        inner = " ".join(reason.rest.split("\n")[0].split()) if named[1] else ""
        if foreign := re.search(r"unrecognized arguments: --([\w.]+)", inner):
            return _unknown(f"{top}.{foreign[1]}", given.options_under(reason.keys[0], foreign[1]))
        found = (
            f"the class {path!r}, which cannot be used ({_short(inner)})" if inner else f"{path!r}, which is no class"
        )
        expected = "the path of a class that is installed, of the type that belongs here"
        return mismatch(key, found=found, expected=expected, do=nearest(path, given.classes(path)))
    expected, _, value = reason.text.partition(". Got value: ")
    if not value and (shown := re.search(r"Given value: (.*)", reason.rest)):
        value = shown[1]
    if nested := re.match(r"NestedArg\(key='[^']*', val=(.*)\)$", value):
        value = nested[1].strip("'")
    types = reason.types or expected.removeprefix("Expected ").removeprefix("a ")
    return mismatch(key, found=_short(value) or "something else", expected=_plain(types))


def _plain(types: str) -> str:
    """Types as users know them: ``<class 'int'>, <class 'NoneType'>`` is "int or null"."""
    for old, new in _WORDS.items():
        types = types.replace(old, new)
    types = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", types)
    if choices := re.findall(r"Literal\[([^\]]*)\]", types):  # several are one choice
        others = re.sub(r"Literal\[[^\]]*\](, )?", "", types)
        types = f"one of {', '.join(choices)}{f', {others}' if others else ''}"
    types = re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", types)
    return _short(types.replace(", null", " or null"), 300)


def _short(text: Any, limit: int = _LONGEST) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def _unknown(key: str, known: Sequence[str]) -> str:
    last = key.removeprefix("--").partition(" ")[0]
    return mismatch(
        key, found="a name that is not known here", expected="an option that there is", do=nearest(last, known)
    )


def _unrecognized(found: re.Match[str], given: Given) -> str:
    first = found[1].split()[0].partition("=")[0]
    if not first.startswith("-"):
        return mismatch(
            _short(found[1]), found="a word that belongs to no option", expected="options, each as --key value"
        )
    return _unknown(first, given.options())


def _required(found: re.Match[str], given: Given) -> str:
    key = found[1].removeprefix(f"{given.command}.").strip()
    hint = "Give it in the file of --config, or as an option." if "--config" in given.options() else ""
    return mismatch(_short(key), found="nothing", expected="a value: the command needs it", do=hint)


def _no_value(found: re.Match[str], given: Given) -> str:
    return mismatch(found[1], found="nothing", expected="a value after it")


def _no_number(found: re.Match[str], given: Given) -> str:
    return mismatch(found[1], found=_short(found[3]), expected=f"a value that is {found[2]}")


def _command(found: re.Match[str], given: Given) -> str:
    name = given.args[0] if given.args else ""
    known = [*given.commands]
    what = repr(name) if name else "nothing"
    return mismatch("command", found=what, expected=f"one of {', '.join(known)}", do=nearest(name, known))


def _bad_config(found: re.Match[str], given: Given) -> str:
    what = f"text that is no YAML ({_short(found[1], 300)})"
    return mismatch(
        "--config", found=what, expected="a YAML file of options", do="Look at the line named, or the one before."
    )


#: Errors that stand alone: pattern -> paragraph.
_SIMPLE = [
    (r"^unrecognized arguments: (.*)", _unrecognized),
    (r"^argument subcommand: |expected \"subcommand\"", _command),
    (r"^the following arguments are required: (.*)", _required),
    (r"^argument (\S+): (expected .*)", _no_value),
    (r"^argument (\S+): invalid (\w+) value: (.*)", _no_number),
    (r"does not accept option '([^']+)'", lambda found, given: _unknown(found[1], given.options())),
    (r"^Problems parsing config: (.*)", _bad_config),
    (
        r"^Parser key \"config\":\s*(.*)",
        lambda found, given: mismatch("--config", found=_short(found[1]), expected="a YAML file that can be read"),
    ),
]
