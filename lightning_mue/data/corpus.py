"""Selects the files of a text corpus and splits their bytes into training and validation."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lightning_mue.checks import mismatch, value_error
from lightning_mue.data.cache import CACHE_TAG

# Ends every document: it does not occur in text, so a model can learn where a document ends. Its id is 0.
SEPARATOR = b"\0"

_CHUNK_BYTES = 1 << 20
_SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages"})
_STDLIB_SKIPPED_FOLDERS = _SKIPPED_FOLDERS | {"test", "tests", "idle_test"}


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus at the time of listing.

    Attributes:
        name: Path relative to the corpus folder, with forward slashes.
        size: Bytes.
        mtime_ns: Time of the last change, nanoseconds since 1970.
    """

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class TextCorpus:
    """A text file, or the files of a folder whose name matches a pattern, read as bytes.

    Folders are searched to any depth. Left out are hidden files and folders, `__pycache__`, installed packages, and
    folders tagged as caches (https://bford.info/cachedir), so that a corpus never contains its own cache.

    Attributes:
        root: Folder, or the one file.
        pattern: Shell-style pattern of file names; unused for a single file.
        skipped: Names of folders to leave out.
    """

    root: Path
    pattern: str = "*"
    skipped: frozenset[str] = _SKIPPED_FOLDERS

    @classmethod
    def standard_library(cls, pattern: str = "*.py") -> TextCorpus:
        """Returns the running Python's own library without its tests: about 12 MB that need no download."""
        return cls(Path(sysconfig.get_path("stdlib")), pattern, _STDLIB_SKIPPED_FOLDERS)

    def files(self) -> list[SourceFile]:
        """Lists the corpus, sorted by name.

        Raises:
            FileNotFoundError: The path does not exist.
            ValueError: There are no bytes in it.
        """
        if not self.root.exists():
            raise FileNotFoundError(
                mismatch(
                    "path",
                    found=f"{str(self.root)!r}, which does not exist",
                    expected="a text file or a folder of text files",
                    do="Correct it, or leave path out to use the source code of Python's standard library.",
                )
            )
        paths = [self.root] if self.root.is_file() else sorted(self._walk(), key=self._name)
        stats = [path.stat() for path in paths]
        files = [SourceFile(self._name(p), s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True)]
        if not sum(file.size for file in files):
            raise value_error(
                "path",
                found=f"{str(self.root)!r}, where {len(files)} files match pattern={self.pattern!r}, with no bytes in them",
                expected="text",
                do="Give a folder with text in it, or another pattern.",
            )
        return files

    def split(self, files: list[SourceFile], val_fraction: float) -> dict[str, Iterator[bytes]]:
        """Returns the bytes of both splits, in pieces.

        A folder is split by file: a file goes to validation when a hash of its name falls below `val_fraction`, so
        that adding a file moves no other file. A file that alone would make up half of validation or more stays in
        training (unless there is no other), so that the validation loss averages over many files. A single file is
        split by position; its end is the validation split.

        Returns:
            "train" and "val", each an iterator of bytes. It raises ValueError at a file that cannot be read.
        """
        if self.root.is_file():
            boundary = files[0].size - round(files[0].size * val_fraction)
            return {"train": _read(self.root, 0, boundary), "val": _read(self.root, boundary, None)}
        chosen = [file for file in files if in_validation(file.name, val_fraction)]
        too_large = 0.5 * val_fraction * sum(file.size for file in files)
        val = {file.name for file in chosen if file.size < too_large} or {file.name for file in chosen}
        return {
            "train": self._documents([file for file in files if file.name not in val]),
            "val": self._documents([file for file in files if file.name in val]),
        }

    def _documents(self, files: list[SourceFile]) -> Iterator[bytes]:
        for file in files:
            yield from _read(self.root / file.name, 0, None)
            yield SEPARATOR

    def _walk(self) -> Iterator[Path]:
        for folder, subfolders, names in os.walk(self.root, onerror=_raise):
            if CACHE_TAG in names and Path(folder) != self.root:
                subfolders.clear()
                continue
            subfolders[:] = [name for name in subfolders if name not in self.skipped and not name.startswith(".")]
            for name in names:
                path = Path(folder, name)
                if not name.startswith(".") and fnmatch.fnmatchcase(name, self.pattern) and path.is_file():
                    yield path

    def _name(self, path: Path) -> str:
        return path.name if path == self.root else path.relative_to(self.root).as_posix()


def in_validation(name: str, val_fraction: float) -> bool:
    """Returns whether a file belongs to validation; this depends on its name alone, and is the same on every machine.

    >>> [in_validation(name, 0.5) for name in ("a.txt", "b.txt", "c.txt", "d.txt")]
    [True, False, True, False]
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64


def _read(path: Path, start: int, stop: int | None) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            file.seek(start)
            while stop is None or start < stop:
                piece = file.read(_CHUNK_BYTES if stop is None else min(_CHUNK_BYTES, stop - start))
                if not piece:
                    return
                start += len(piece)
                yield piece
    except OSError as error:
        # Not an OSError: the caller, which writes the bytes, must be able to tell this from a full disk.
        raise value_error(
            "path",
            found=f"the corpus file {str(path)!r}, which could not be read ({error})",
            expected="readable files",
            do="Make it readable, or exclude it with a narrower pattern.",
        ) from error


def _raise(error: OSError) -> None:
    # By default os.walk skips a folder that it cannot read.
    raise error
