"""The parsers of the command line, whose errors are one paragraph. An option is written out: no prefix is taken for it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_mue.cli.parsing.messages import explained
from lightning_mue.cli.parsing.options import Given, nearest
from lightning_mue.cli.parsing.words import check_words


class BriefParser(LightningArgumentParser):
    """Lightning's parser; an error is told by key, what was found and what was expected, and what may have been meant."""

    #: The words that are being parsed, and the names of all commands; set by the command line.
    given: Sequence[str] = ()
    commands: Sequence[str] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the paragraph and ends with status 2; with LIGHTNING_MUE_TRACEBACK=1 raises the error."""
        if not self.exit_on_error:  # a parser inside another one
            super().error(message, ex)
        given = Given(BriefParser.given, self, BriefParser.commands)
        if os.environ.get("LIGHTNING_MUE_TRACEBACK"):
            raise ex or ValueError(message)
        _end(explained(message, given), given.command)


class WordsParser(argparse.ArgumentParser):
    """Of commands that have a few options of their own, and no configuration.

    Args:
        command: Its name.
        **options: As of argparse.ArgumentParser.
    """

    def __init__(self, command: str, **options: Any) -> None:
        super().__init__(prog=f"lightning-mue {command}", allow_abbrev=False, **options)
        self.command, self.given = command, Given((), self, (command,))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's; options that are given twice, and misspelled ones of this command, are refused.

        Raises:
            ValueError: An option has two values.
        """
        own = self.given.options()
        check_words(
            args, [name for a in self._actions if isinstance(a, argparse._AppendAction) for name in a.option_strings]
        )
        found, others = super().parse_known_args(args, namespace)
        for word in others:  # those with a dot, and --model, --data and so on, are the run's
            name = word.partition("=")[0]
            begins = [each for each in own if each[2] == name[2:3].lower()]
            if name.startswith("--") and "." not in name and nearest(name, begins):
                self.error(f"unrecognized arguments: {word}")
        return found, others

    def error(self, message: str) -> NoReturn:
        """Prints the paragraph and ends with status 2."""
        _end(explained(message, self.given), self.command)


def _end(paragraph: str, command: str) -> NoReturn:
    command = f"lightning-mue {command}".strip()
    print(f"lightning-mue: error: {paragraph} `{command} --help` lists the options.", file=sys.stderr)
    raise SystemExit(2) from None
