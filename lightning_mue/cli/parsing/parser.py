"""The parser of the command line, whose errors are one paragraph."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_mue.cli.parsing.messages import explained
from lightning_mue.cli.parsing.options import Given


class BriefParser(LightningArgumentParser):
    """Lightning's parser; an error is told by key, what was found and what was expected, and what may have been meant."""

    #: The words that are being parsed, and the names of all commands; set by the command line.
    given: Sequence[str] = ()
    commands: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the paragraph and ends with status 2; with LIGHTNING_MUE_TRACEBACK=1 raises the error."""
        if not self.exit_on_error:  # a parser inside another one
            super().error(message, ex)
        given = Given(BriefParser.given, self, BriefParser.commands)
        if os.environ.get("LIGHTNING_MUE_TRACEBACK"):
            raise ex or ValueError(message)
        command = f"lightning-mue {given.command}".strip()
        print(
            f"lightning-mue: error: {explained(message, given)} `{command} --help` lists the options.", file=sys.stderr
        )
        raise SystemExit(2) from None
