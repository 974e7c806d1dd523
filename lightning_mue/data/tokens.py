"""Language modelling on files of token ids made by any tokenizer, as nanoGPT and LitGPT write them.

Shape legend: N tokens in a file or split.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np

from lightning_mue.checks import mismatch, require_choice, require_types, value_error
from lightning_mue.data.base import LanguageDataModule, Splits

TokenDtype = Literal["uint16", "uint32"]

_SCAN_TOKENS = 1 << 24
# Formats with a header, which would be read as tokens.
_HEADERS = {
    b"\x93NUMPY": ("a NumPy .npy file", "Write the ids with `array.tofile(path)` instead."),
    (20240520).to_bytes(4, "little"): ("an llm.c data file", "Remove its header of 1024 bytes."),
}


class TokenDataModule(LanguageDataModule):
    """Language modelling on raw files of little-endian token ids without a header, memory-mapped.

    In `setup` every process reads the files once to find their largest id. If the model has a `vocab_size`, it is
    checked against this id before the first step.

    Args:
        train_path: Token file for training.
        val_path: Token file for validation; with None, the last `val_fraction` of `train_path` is used.
        dtype: Type of an id: "uint16" or "uint32".
        context_length: Inputs in a window, S.
        batch_size: Windows in the micro-batch of one process, B.
        val_fraction: Part of `train_path` kept for validation, in (0, 1); unused with `val_path`.
        val_batches: Validation batches per process at most, spread evenly over the split; None for all.
        seed: Data seed, 0 or more; None: that of `seed_everything`, or 0.
        bytes_per_token: Mean number of bytes of text per token, if known; with it a model can report bits per byte.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        train_path: str | Path,
        val_path: str | Path | None = None,
        *,
        dtype: TokenDtype = "uint16",
        context_length: int = 1024,
        batch_size: int = 8,
        val_fraction: float = 0.05,
        val_batches: int | None = 20,
        seed: int | None = None,
        bytes_per_token: float | None = None,
    ) -> None:
        super().__init__(
            context_length=context_length,
            batch_size=batch_size,
            val_fraction=val_fraction,
            val_batches=val_batches,
            seed=seed,
        )
        require_choice("dtype", dtype, get_args(TokenDtype))
        require_types(TokenDataModule.__init__, locals())
        if bytes_per_token is not None and not bytes_per_token > 0:
            raise value_error("bytes_per_token", found=bytes_per_token, expected="a number above 0, or null if unknown")
        self.train_path = Path(train_path).expanduser()
        self.val_path = None if val_path is None else Path(val_path).expanduser()
        self.dtype: TokenDtype = dtype
        self.bytes_per_token = bytes_per_token
        self._largest: tuple[int, str] | None = None

    def load_splits(self) -> Splits:
        """Maps the files.

        Raises:
            FileNotFoundError: A file does not exist.
            ValueError: A file is not a raw file of `dtype`.
        """
        train_N = map_tokens("train_path", self.train_path, self.dtype)
        if self.val_path is not None:
            return Splits(train_N, map_tokens("val_path", self.val_path, self.dtype))
        boundary = len(train_N) - round(len(train_N) * self.val_fraction)
        return Splits(train_N[:boundary], train_N[boundary:])

    def largest_token(self) -> tuple[int, str]:
        """Returns the largest id and the file in which it occurs; the files are scanned once.

        Raises:
            FileNotFoundError: A file does not exist.
            ValueError: A file is not a raw file of `dtype`, or is empty.
        """
        if self._largest is None:
            files = {"train_path": self.train_path, "val_path": self.val_path}
            found = [
                (largest_id(map_tokens(name, path, self.dtype)), f"{name}={str(path)!r}")
                for name, path in files.items()
                if path is not None
            ]
            self._largest = max(found)
        return self._largest

    def describe(self) -> str:
        """Names the corpus in messages."""
        val = "" if self.val_path is None else f", val_path={str(self.val_path)!r}"
        return f"train_path={str(self.train_path)!r}{val}"


def map_tokens(name: str, path: Path, dtype: TokenDtype) -> np.ndarray:
    """Maps the ids `[N]` of a raw token file, read-only, after checks of its size and first bytes.

    Raises:
        FileNotFoundError: The path is not a file.
        ValueError: The file is empty, is no multiple of the dtype's size, or begins with a known header.
    """
    expected = f"a raw file of {dtype} token ids"
    if not path.is_file():
        raise FileNotFoundError(mismatch(name, found=f"{str(path)!r}, which is not a file", expected=expected))
    little_endian = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size
    if size == 0:
        raise value_error(name, found=f"{str(path)!r}, which is empty", expected=expected)
    if size % little_endian.itemsize:
        raise value_error(
            name,
            found=f"{str(path)!r} of {size} bytes",
            expected=f"a multiple of the {little_endian.itemsize} bytes of dtype={dtype!r}",
            do="The file is truncated, or its ids have another dtype: write it again, or set dtype.",
        )
    with path.open("rb") as file:
        start = file.read(8)
    for magic, (what, do) in _HEADERS.items():
        if start.startswith(magic):
            raise value_error(name, found=f"{str(path)!r}, {what}", expected=expected, do=do)
    return np.memmap(path, dtype=little_endian, mode="r")


def largest_id(tokens_N: np.ndarray) -> int:
    """Returns the largest of the ids `[N]`, N >= 1, reading 16 Mi of them at a time."""
    return max(int(tokens_N[i : i + _SCAN_TOKENS].max()) for i in range(0, len(tokens_N), _SCAN_TOKENS))
