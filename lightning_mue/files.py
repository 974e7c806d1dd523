"""Files that are written whole or not at all, readable by all whom the umask lets read, and never through another's link."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

#: End of the names of files that are being written.
PART = ".mue-part"
_STALE_SECONDS = 3600.0
_UMASK = os.umask(0o077)  # it can be read only by setting it, which is done while there is but one thread
os.umask(_UMASK)
#: What a trial of a sweep writes into its folder for the process that started it, while it runs and at its end.
TRIAL_PROGRESS, TRIAL_RESULT = "progress.json", "result.json"
#: Environment variable, set for a trial whose standard input ends when the process that started it dies.
TRIAL_WATCHED = "LIGHTNING_MUE_TRIAL"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Gives a path beside the file to write to; the file is replaced by it when the block ends, and left alone on an error.

    A reader, and a run that is killed meanwhile, find the old file or the whole new one, flushed to disk. The folder is made
    if it is missing. The other path has a random name and is made anew, so that nobody can place a link there; a link at
    ``path`` itself is replaced, not followed. What killed writers left in the folder is removed.

    Raises:
        OSError: What writing raises; what was written so far is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():  # told now, not after the work of writing
        raise IsADirectoryError(f"{str(path)!r} is a folder, not a file")
    remove_parts_of_the_dead(path.parent)
    part, descriptor = _new_part(path)
    try:
        yield part
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.chmod(_mode(path))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
        os.close(descriptor)


def remove_parts_of_the_dead(folder: Path) -> None:
    """Removes files in a folder that a killed process was writing; those of living ones are locked."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for name in [entry.path for entry in entries if entry.name.startswith(".") and entry.name.endswith(PART)]:
            with contextlib.suppress(OSError):
                if _is_abandoned(name):
                    os.unlink(name)


def _new_part(path: Path) -> tuple[Path, int]:
    """An empty file beside a path, and its descriptor, which is locked until this process closes it or dies."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=PART, dir=path.parent)
        _lock(descriptor)
        with contextlib.suppress(FileNotFoundError):  # taken for abandoned before it was locked
            if os.stat(name).st_ino == os.fstat(descriptor).st_ino:
                return Path(name), descriptor
        os.close(descriptor)


def _mode(path: Path) -> int:
    """Permissions of a file: those that it has, or those that a new one gets."""
    kept = path.exists() and not path.is_symlink()
    return stat.S_IMODE(path.stat().st_mode) & 0o777 if kept else 0o666 & ~_UMASK


def _lock(descriptor: int) -> bool | None:
    """Locks an open file; False if another process has done so, None if files cannot be locked here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except (OSError, AttributeError):  # a file system or an operating system without such locks
        return None


def _is_abandoned(name: str) -> bool:
    """Whether the writer of a part is dead: its lock is free; without locks, it has not written for an hour."""
    descriptor = os.open(name, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        locked = _lock(descriptor)
        return time.time() - os.fstat(descriptor).st_mtime > _STALE_SECONDS if locked is None else locked
    finally:
        os.close(descriptor)
