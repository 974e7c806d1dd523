"""Cache of a corpus on disk, with a manifest from which it is seen whether the cache is still valid."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_mue.checks import mismatch
from lightning_mue.files import whole_file

SPLITS = ("train", "val")
CACHE_TAG = "CACHEDIR.TAG"

_FORMAT = 2
# Backup tools recognize a cache folder by this line, too.
_CACHE_SIGNATURE = b"Signature: 8a477f597d28d172789f06886806bc55"


def default_cache_dir() -> Path:
    """Returns $LIGHTNING_MUE_CACHE, else $XDG_CACHE_HOME/lightning_mue, else ~/.cache/lightning_mue."""
    if own := os.environ.get("LIGHTNING_MUE_CACHE"):
        return Path(own).expanduser()
    # The XDG specification says to ignore a relative path.
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "lightning_mue"


class ByteCache:
    """Stores the train and val splits of one corpus as raw uint8 files with a `manifest.json`, in one folder.

    Every file is written whole or not at all, the manifest last. An interrupted build therefore leaves no valid manifest, and
    the next build removes what it had written. Processes that build the same corpus at the same time write
    the same bytes, so it does not matter which of them is last. The folder is created when needed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def is_valid(self, corpus: Mapping[str, Any]) -> bool:
        """Returns whether the cache holds exactly this corpus (JSON types), undamaged: size and SHA-256 of every split."""
        manifest = self._manifest()
        if manifest is None or manifest["corpus"] != _as_json(corpus):
            return False
        return all(
            self._has_size(split, entry) and _sha256(self._path(split)) == entry["sha256"]
            for split, entry in manifest["splits"].items()
        )

    def write(self, corpus: Mapping[str, Any], splits: Mapping[str, Iterable[bytes]]) -> None:
        """Builds the cache of a corpus (JSON types) from the pieces of "train" and "val", and replaces an older one.

        Raises:
            OSError: The folder cannot be written.
        """
        with whole_file(self.folder / CACHE_TAG) as part:
            part.write_bytes(_CACHE_SIGNATURE)
        entries = {split: self._write_split(split, splits[split]) for split in SPLITS}
        manifest = {"format": _FORMAT, "corpus": corpus, "splits": entries}
        with whole_file(self.folder / "manifest.json") as part:
            part.write_text(json.dumps(manifest, indent=1), encoding="utf-8")

    def open(self, split: str) -> np.ndarray:
        """Maps a split, uint8 `[N]`, read-only.

        Raises:
            FileNotFoundError: There is no complete cache. Only sizes are checked here; `is_valid` checks the contents.
        """
        manifest = self._manifest()
        if manifest is None or not self._has_size(split, manifest["splits"][split]):
            raise FileNotFoundError(
                mismatch(
                    "cache_dir",
                    found=f"no complete cache of the corpus in {str(self.folder)!r}",
                    expected="the files that prepare_data() writes",
                    do="Call prepare_data() first. With several nodes, either each needs its own cache folder or all must "
                    "share one.",
                )
            )
        # An empty file cannot be mapped.
        path = self._path(split)
        return np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)

    def _manifest(self) -> dict[str, Any] | None:
        try:
            manifest = json.loads((self.folder / "manifest.json").read_bytes())
            if manifest["format"] != _FORMAT:
                return None
            entries = {split: manifest["splits"][split] for split in SPLITS}
            for entry in entries.values():
                _ = int(entry["bytes"]), str(entry["sha256"])
            return {"corpus": manifest["corpus"], "splits": entries}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
            # A missing or truncated manifest, or a file of another program: there is no cache.
            return None

    def _has_size(self, split: str, entry: Mapping[str, Any]) -> bool:
        try:
            return self._path(split).stat().st_size == int(entry["bytes"])
        except OSError:
            return False

    def _write_split(self, split: str, pieces: Iterable[bytes]) -> dict[str, Any]:
        digest, size = hashlib.sha256(), 0
        with whole_file(self._path(split)) as part, part.open("wb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                size += len(piece)
        return {"bytes": size, "sha256": digest.hexdigest()}

    def _path(self, split: str) -> Path:
        return self.folder / f"{split}.bin"


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
