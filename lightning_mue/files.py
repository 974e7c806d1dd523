"""Files that are written whole or not at all, and names of those by which processes talk to each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: What a trial of a sweep writes into its folder for the process that started it, while it runs and at its end.
TRIAL_PROGRESS, TRIAL_RESULT = "progress.json", "result.json"
#: Environment variable, set for a trial whose standard input ends when the process that started it dies.
TRIAL_WATCHED = "LIGHTNING_MUE_TRIAL"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a path beside the file to write to; the file is replaced by it when the block ends, and left alone on an error.

    A reader, and a run that is killed meanwhile, find the old file or the whole new one. The folder is made if it is missing.

    Raises:
        OSError: What writing raises; what was written so far is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
