"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
