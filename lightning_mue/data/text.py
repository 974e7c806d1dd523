"""Byte-level language modelling on any text: no tokenizer, no download."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_mue.checks import require_types, value_error
from lightning_mue.data.base import LanguageDataModule, Splits
from lightning_mue.data.cache import ByteCache, default_cache_dir
from lightning_mue.data.corpus import TextCorpus


class TextDataModule(LanguageDataModule):
    """Language modelling on the bytes of a text file or folder (vocabulary 256).

    Bytes are used unchanged, in any encoding. In a folder a NUL byte (id 0) ends each file. A folder is split by a hash
    of each file's name, a single file by position. The splits are written once to a checksummed cache and memory-mapped.
    The cache is rebuilt when it is damaged or the source has changed (a file's name, size or modification time).

    Args:
        path: Text file or folder; None for the source of Python's standard library, about 12 MB.
        pattern: Shell-style pattern of file names in a folder; None for `*.py` in the standard library, else `*`.
        context_length: Inputs in a window, S.
        batch_size: Windows in the micro-batch of one process, B.
        val_fraction: Part of the corpus kept for validation, in (0, 1).
        val_batches: Validation batches per process at most, spread evenly over the split; None for all.
        seed: Data seed, 0 or more; None: that of `seed_everything`, or 0.
        cache_dir: Folder of the caches; None for $LIGHTNING_MUE_CACHE, else $XDG_CACHE_HOME/lightning_mue, else
            ~/.cache/lightning_mue.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.
    """

    #: A token is a byte, so bits per token are bits per byte.
    bytes_per_token: float = 1.0

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        pattern: str | None = None,
        context_length: int = 256,
        batch_size: int = 32,
        val_fraction: float = 0.05,
        val_batches: int | None = 20,
        seed: int | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            context_length=context_length,
            batch_size=batch_size,
            val_fraction=val_fraction,
            val_batches=val_batches,
            seed=seed,
        )
        require_types(TextDataModule.__init__, locals())
        if path is None:
            self.corpus = TextCorpus.standard_library(pattern or "*.py")
        else:
            self.corpus = TextCorpus(Path(path).expanduser().resolve(), pattern or "*")
        self.cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()

    def prepare_data(self) -> None:
        """Builds the cache unless there is a valid one; Lightning calls this once per node.

        Raises:
            FileNotFoundError: The path does not exist.
            ValueError: The corpus is empty or cannot be read, or the cache cannot be written.
        """
        files = self.corpus.files()
        manifest = {**self._identity(), "files": [asdict(file) for file in files]}
        cache = self._cache()
        if cache.is_valid(manifest):
            return
        splits = self.corpus.split(files, self.val_fraction)
        try:
            cache.write(manifest, splits)
        except OSError as error:
            raise value_error(
                "cache_dir",
                found=f"{str(cache.folder)!r}, where the corpus {self.describe()} could not be written ({error})",
                expected="a writable folder with room for a copy of the corpus",
                do="Set cache_dir, or the environment variable LIGHTNING_MUE_CACHE, to such a folder.",
            ) from error

    def load_splits(self) -> Splits:
        """Maps the cache, uint8.

        Raises:
            FileNotFoundError: `prepare_data` has not run.
        """
        cache = self._cache()
        return Splits(train=cache.open("train"), val=cache.open("val"))

    def largest_token(self) -> tuple[int, str]:
        """Returns 255: any byte may occur."""
        return 255, f"byte-level text (TextDataModule, {self.describe()})"

    def describe(self) -> str:
        """Names the corpus in messages."""
        return f"path={str(self.corpus.root)!r}"

    def _identity(self) -> dict[str, Any]:
        """The settings that identify a cache; the files themselves may change."""
        return {
            "root": str(self.corpus.root),
            "pattern": self.corpus.pattern,
            "skipped": sorted(self.corpus.skipped),
            "val_fraction": self.val_fraction,
        }

    def _cache(self) -> ByteCache:
        key = hashlib.sha256(json.dumps(self._identity(), sort_keys=True).encode()).hexdigest()
        return ByteCache(self.cache_dir / f"text-{key[:16]}")
