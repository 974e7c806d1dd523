"""What is in a folder of checkpoints: which are complete, whether their bytes are the ones that were written, which to delete.

A checkpoint is a folder ``step-000123``, which was ``step-000123.tmp`` until its last byte was on disk. Its manifest lists the
other files with their sizes and SHA-256 sums, and carries a sum of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_mue.checks import listed, value_error

MANIFEST = "manifest.json"
#: The file of a checkpoint that is not sharded.
WHOLE = "checkpoint.ckpt"
#: Names of folders that are not complete, or are being deleted.
UNFINISHED = ".tmp"
_NAME = re.compile(r"step-(\d{6,})")


def name_of(step: int) -> str:
    """Name of the checkpoint of a step.

    Example:
        >>> name_of(123)
        'step-000123'
    """
    return f"step-{step:06d}"


def complete(dirpath: Path, *, unreadable: int = 1 << 62) -> list[tuple[int, Path]]:
    """Step and folder of each checkpoint that was written to its end, in the order of writing.

    By the number in its manifest, not by step: a run that went back to an earlier step writes the newest checkpoint there. Where
    the manifest is damaged, `unreadable` takes the number's place.
    """
    found = []
    for folder in dirpath.iterdir() if dirpath.is_dir() else ():
        if (match := _NAME.fullmatch(folder.name)) and (folder / MANIFEST).is_file():
            found.append((_serial(folder, unreadable), int(match[1]), folder))
    return [(step, folder) for _, step, folder in sorted(found)]


def next_serial(dirpath: Path) -> int:
    """Number of the next checkpoint in a folder."""
    return 1 + max((_serial(folder, 0) for _, folder in complete(dirpath)), default=0)


def _serial(folder: Path, unreadable: int) -> int:
    try:
        return int(read_manifest(folder)["serial"])
    except ValueError:
        return unreadable


def sum_of(path: Path, chunk: int = 1 << 22) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while data := file.read(chunk):
            digest.update(data)
    return digest.hexdigest()


def describe(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    return {"bytes": path.stat().st_size, "sha256": sum_of(path)}


def write_manifest(folder: Path, files: dict[str, Any], **facts: int) -> None:
    """Writes the manifest of a checkpoint whose files these are."""
    body = {"format": 1, **facts, "files": files}
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({**body, "sha256": _sum_of_body(body)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: It is missing or damaged.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if manifest.pop("sha256") == _sum_of_body(manifest):
            return manifest
        found = f"{folder}, whose {MANIFEST} was changed after it was written"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        found = f"{folder}, whose {MANIFEST} cannot be read ({type(error).__name__})"
    raise value_error("checkpoint", found=found, expected="a checkpoint as it was written", do=_REMEDY)


def _sum_of_body(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


_REMEDY = "Delete this folder, and start from the one before (ckpt_path: auto does)."


def damages(folder: Path, part: int = 0, parts: int = 1, *, contents: bool = True) -> Iterator[str]:
    """What is wrong with a checkpoint, in words; `contents` compares the sums too, not sizes alone.

    Ranks share the work: each looks at one of so many `parts` of the files.

    Raises:
        ValueError: The manifest is missing or damaged.
    """
    for name, wanted in sorted(read_manifest(folder)["files"].items())[part::parts]:
        path = folder / name
        try:
            if path.stat().st_size != wanted["bytes"]:
                yield f"{name} with {path.stat().st_size} bytes instead of {wanted['bytes']}"
            elif contents and sum_of(path) != wanted["sha256"]:
                yield f"{name} with other bytes than were written"
        except OSError as error:
            yield f"{name}, which cannot be read ({type(error).__name__})"


def words_of_damages(folder: Path, part: int, parts: int) -> list[str]:
    """As `damages`; those of the manifest too."""
    try:
        return list(damages(folder, part, parts))
    except ValueError as error:
        return [str(error)]


def newest(dirpath: Path, *, contents: bool) -> Path | None:
    """The newest checkpoint without damage, of those in a folder; damaged ones are warned of."""
    for _, found in reversed(complete(dirpath)):
        try:
            refuse_damaged(found, damages(found, contents=contents))
            return found
        except ValueError as error:
            rank_zero_warn(f"{error} The one before is taken now.")
    return None


def refuse_damaged(folder: Path, found: Iterable[str]) -> None:
    """Refuses a checkpoint with damages.

    Raises:
        ValueError: With what was found.
    """
    if found := list(found):
        text = f"{folder}: {listed(found, limit=3)}"
        raise value_error("checkpoint", found=text, expected="the files as they were written", do=_REMEDY)


def path_for_lightning(folder: Path) -> Path:
    """What to give as ``ckpt_path``: the file of a whole checkpoint, the folder of a sharded one."""
    return folder / WHOLE if (folder / WHOLE).exists() else folder


def folder_of(ckpt_path: str | os.PathLike[str] | None) -> Path | None:
    """The folder of a checkpoint with a manifest, from what was given as ``ckpt_path``; None for another checkpoint."""
    if not ckpt_path:
        return None
    path = Path(ckpt_path)
    found = path.parent if path.name == WHOLE else path
    return found if (found / MANIFEST).is_file() else None


def finish(unfinished: Path, folder: Path) -> None:
    """Gives a written checkpoint its name; one of the same step, of an earlier run, is replaced."""
    sync(unfinished)
    if folder.exists():
        old = folder.with_name(f"{folder.name}.old{UNFINISHED}")
        remove(old)
        os.rename(folder, old)
    os.rename(unfinished, folder)
    sync(folder.parent)


def sync(path: Path) -> None:
    """Brings a file, or the list of a folder's files, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_unfinished(dirpath: Path) -> None:
    """Removes what killed runs left."""
    for folder in dirpath.glob(f"step-*{UNFINISHED}"):
        remove(folder)


def remove_old(dirpath: Path, keep_last: int, keep_every: int | None) -> None:
    """Deletes all but the newest checkpoints and those of every so many steps."""
    for step, folder in complete(dirpath, unreadable=0)[:-keep_last]:
        if not (keep_every and step % keep_every == 0):
            # Half a deleted checkpoint must not look like a whole one.
            doomed = folder.with_name(folder.name + UNFINISHED)
            remove(doomed)
            os.rename(folder, doomed)
            remove(doomed)


def remove(folder: Path) -> None:
    """Deletes a folder, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)
