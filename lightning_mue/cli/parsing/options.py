"""What a command line may hold: its options, those of the classes that it names, and the classes there are."""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

#: Where classes of configurations are, beside the module that was named.
_HOMES: tuple[str, ...] = ("lightning_mue", "lightning_mue.data", "torch.optim", "torch.optim.lr_scheduler")
_HOMES += ("lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.strategies")


def nearest(key: str, known: Iterable[str]) -> str:
    """The question whether a name was meant, or nothing if no name is near.

    Near is one that differs in case or a few letters, that differs so in the last part of its path, or that begins like this.
    """
    small = {name.lower(): name for name in reversed(list(known))}
    key = key.lower()
    close = difflib.get_close_matches(key, small, n=1, cutoff=0.75)
    if not close:
        last = {name.rpartition(".")[2].removeprefix("--"): name for name in small}
        near = difflib.get_close_matches(key.rpartition(".")[2].removeprefix("--"), last, n=1, cutoff=0.7)
        begins = f"--{key.removeprefix('--')}" if key else "nothing"
        close = [last[name] for name in near] or [name for name in reversed(small) if name.startswith(begins)]
    return f"Did you mean {small[close[0]]!r}?" if close else ""


@dataclass(frozen=True)
class Given:
    """A command line: its words, its parser (of one command, or of all), and the names of the commands."""

    args: Sequence[str]
    parser: Any
    commands: Sequence[str]

    @property
    def command(self) -> str:
        """The command, or ""."""
        return next((arg for arg in self.args if arg in self.commands), "")

    def options(self) -> list[str]:
        """The options of the parser, as they are written on the command line."""
        chosen = self.parser
        for action in self.parser._actions:
            chosen = (getattr(action, "_name_parser_map", None) or {}).get(self.command, chosen)
        named = [action.option_strings for action in chosen._actions if action.dest != "help"]
        return [name for names in named for name in names if name.startswith("--") and not name.endswith("+")]

    def options_under(self, top: str, option: str) -> list[str]:
        """The arguments of the classes that the command line and its files name under a key, nearest to one of these names."""
        paths = [path for key, path in self._class_paths() if key.startswith(top)]
        return [name for path in dict.fromkeys(paths) for name in arguments_of(path)]

    def written(self, top: str, rest: str) -> str:
        """A key as the user wrote it: an option of the command line, or a path in a file."""
        last = rest.rpartition(".")[2]
        for arg in self.args:
            name = str(arg).partition("=")[0]
            by_name = top == "trainer.callbacks" and name.count(".") == 1  # --mue.rule
            if (name.startswith(f"--{top}.") or by_name) and name.endswith(f".{last}"):
                return name
        inside = [key for document in self._documents() for key, _ in _walk(document) if key.startswith(top)]
        parts = rest.split(".")
        ends = [".".join(["", *parts[n:]]) for n in range(len(parts))]  # the longest end that a key has tells most
        return next((key for end in ends for key in inside if key.endswith(end)), f"{top}.{rest}")

    def classes(self, path: str) -> list[str]:
        """Paths of classes that could have been meant by one."""
        found = []
        for home in dict.fromkeys([path.rpartition(".")[0], *_HOMES]):
            with contextlib.suppress(Exception):  # whatever importing raises, there is nothing to propose
                found += [f"{home}.{name}" for name in dir(import_module(home)) if name[:1].isupper()]
        return found

    def _documents(self) -> Iterator[Any]:
        for i, arg in enumerate(self.args):
            name, equals, value = str(arg).partition("=")
            path = value if equals else next(iter(self.args[i + 1 : i + 2]), "")
            if name == "--config":
                with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
                    yield yaml.safe_load(Path(str(path)).read_text(encoding="utf-8"))

    def _class_paths(self) -> Iterator[tuple[str, str]]:
        for document in self._documents():
            for key, value in _walk(document):
                if key.endswith("class_path") and isinstance(value, str):
                    yield key, value
        for i, arg in enumerate(self.args):
            name, equals, value = str(arg).partition("=")
            path = value if equals else str(next(iter(self.args[i + 1 : i + 2]), ""))
            if name.startswith("--") and path.replace(".", "").replace("_", "").isalnum() and path[:1].isalpha():
                yield name.removeprefix("--").rstrip("+"), path


def _walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of everything in a document."""
    if isinstance(value, dict):
        for name, inner in value.items():
            here = f"{key}.{name}" if key else str(name)
            yield here, inner
            yield from _walk(inner, here)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _walk(inner, f"{key}[{i}]")


def arguments_of(path: str) -> list[str]:
    """The arguments of a class as the parser knows them, those that it passes on included."""
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
        if not isinstance(cls, type):
            return []
        parser = ArgumentParser(exit_on_error=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parser.add_class_arguments(cls, fail_untyped=False)
    except Exception:  # no class that the parser reads: there is nothing to propose
        return []
    return [action.dest for action in parser._actions if action.dest != "help" and not action.dest.endswith(".help")]
