"""Which exceptions are errors of the input, to be told in a paragraph; all others keep their traceback."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from traceback import walk_tb

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_mue.checks import brief

_PACKAGE = Path(__file__).parents[2]
#: Where errors of Lightning's, torch's and the parser's own checks come from, and what those of a user's module pass through.
_LIBRARIES = [Path(torch.__file__).parents[1], Path(sysconfig.get_path("stdlib"))]
#: Exceptions that input may cause.
KINDS = (ValueError, TypeError, OSError, RuntimeError, MisconfigurationException, KeyError, AttributeError, ImportError)
_STEPS = {"training_step", "validation_step", "test_step", "predict_step", "optimizer_step", "backward"}


def message_of(error: BaseException) -> str | None:
    """The message of an error of the input, also if the parser has wrapped it; None for an error that is none.

    That is one that this package raised, or else one from Lightning or torch before any step, with no code of the user's
    between.
    """
    inner: BaseException | None = error
    while inner is not None:
        files = [Path(frame.f_code.co_filename) for frame, _ in walk_tb(inner.__traceback__)]
        own = bool(files) and _PACKAGE in files[-1].parents
        if own and isinstance(inner, (ValueError, TypeError, OSError)):
            return str(inner)
        inner = inner.__cause__ or inner.__context__
    frames = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    if any(code.co_name in _STEPS for code in frames):
        return None
    known = [_PACKAGE, *_LIBRARIES]
    files = [Path(code.co_filename) for code in frames]
    called = max((i for i, file in enumerate(files) if _PACKAGE / "cli" in file.parents), default=0)
    if all(any(folder in file.parents for folder in known) for file in files[called:]):
        return f"{brief(error, 900)} (LIGHTNING_MUE_TRACEBACK=1 shows where it came from.)"
    return None
