"""Tilings of the experts' kernels: a fixed default each, and the fastest of a few, timed once and remembered.

What was timed is kept in a file, so that the next process starts with it. A choice depends on sizes and not on one routing: the
mean number of rows per expert, rounded up to a power of two, the widths, types, device and Triton version.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lightning_mue.checks import mismatch
from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.kernels.triton_tools.launching import describe, multiprocessors
from lightning_mue.kernels.triton_tools.timing import may_time, milliseconds


class ExpertTiling(NamedTuple):
    """How a kernel cuts its work.

    Attributes:
        rows: Rows of a tile of the result.
        cols: Columns of a tile of the result.
        inner: How much of the inner dimension is loaded at once.
        stages: Loads in flight.
        warps: Warps a tile.
        group: Row tiles that are walked together, so that their operands stay in L2.
        waves: 0: a program for every tile. Else persistent: this many programs per multiprocessor, each taking tile after
            tile.
        described: Load by the bulk copy engine (TMA) what is contiguous.
    """

    rows: int
    cols: int
    inner: int
    stages: int
    warps: int
    group: int = 8
    waves: int = 0
    described: bool = False

    @property
    def constants(self) -> dict[str, int]:
        """What a kernel is compiled for."""
        return _constants(self)


@lru_cache
def _constants(tiling: ExpertTiling) -> dict[str, int]:
    names = {"ROWS": tiling.rows, "COLS": tiling.cols, "INNER": tiling.inner, "GROUP": tiling.group}
    return {**names, "num_stages": tiling.stages, "num_warps": tiling.warps}


class TilingKey(NamedTuple):
    """What the choice of a tiling depends on.

    Attributes:
        kernel: "up", "down", "hidden", "dx", "dw" or "dw_down".
        activation: A key of `ACTIVATIONS`: it determines the planes, and the registers that a tile needs.
        rows: Mean rows per expert, rounded up to a power of two.
        experts: E.
        d: Width.
        h: Expert hidden width.
        dtype: Of the products.
        precision: Of float32 products, "tf32" or "ieee".
        device: Where it runs.
    """

    kernel: str
    activation: str
    rows: int
    experts: int
    d: int
    h: int
    dtype: torch.dtype
    precision: str
    device: torch.device

    @property
    def gated(self) -> bool:
        """Whether there are two planes."""
        return ACTIVATIONS[self.activation].gated

    @property
    def name(self) -> str:
        """The key in the file of choices: the same in every process on this type of machine."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        dtype = str(self.dtype).removeprefix("torch.")
        parts = (*self[:6], dtype, self.precision, device, f"triton {triton.__version__}")
        return "/".join(str(part) for part in parts)


#: Tried for 16-bit types, per kernel; the first is the default. Compiled for sm_90 with Triton 3.6 and 3.9 (no device was at
#: hand): all use the wide matrix instructions (wgmma), 16-byte loads and stores, and fit in 227 KiB of shared memory at one
#: program per multiprocessor. None spills registers with SwiGLU but the widest of "hidden" (320 bytes; 472 with 3.6), nor a
#: default with GELU but that of "up" (256 bytes).
_HALF: dict[str, tuple[ExpertTiling, ...]] = {
    "two sums": (
        ExpertTiling(128, 128, 64, 4, 8),
        ExpertTiling(128, 128, 64, 4, 8, described=True),
        ExpertTiling(128, 128, 64, 4, 8, waves=1, described=True),
        ExpertTiling(64, 128, 64, 4, 4),
    ),
    "one sum": (
        ExpertTiling(128, 256, 64, 4, 8),
        ExpertTiling(128, 256, 64, 4, 8, described=True),
        ExpertTiling(128, 256, 64, 4, 8, waves=1, described=True),
        # Two programs a multiprocessor: one loads while the other stores.
        ExpertTiling(128, 128, 64, 3, 8, described=True),
        ExpertTiling(128, 128, 64, 4, 8),
        ExpertTiling(64, 128, 64, 4, 4),
    ),
    "hidden": (
        ExpertTiling(128, 128, 64, 4, 8),
        ExpertTiling(128, 128, 64, 4, 8, described=True),
        ExpertTiling(128, 128, 64, 4, 8, waves=1, described=True),
        ExpertTiling(128, 256, 64, 3, 8, described=True),
        ExpertTiling(64, 128, 64, 4, 4),
    ),
    # Of n stages, loads by index get n / 2: the index is loaded before them.
    "dw, two sums": (
        ExpertTiling(128, 128, 64, 5, 8),
        ExpertTiling(128, 128, 64, 7, 8),
        ExpertTiling(128, 128, 64, 5, 8, waves=1),
    ),
    "dw, one sum": (
        ExpertTiling(128, 256, 64, 5, 8),
        ExpertTiling(128, 256, 64, 7, 8),
        ExpertTiling(128, 128, 64, 7, 8),
    ),
}
_TF32 = (ExpertTiling(128, 64, 32, 4, 4), ExpertTiling(128, 128, 32, 3, 8), ExpertTiling(64, 64, 32, 4, 4))
_IEEE = (ExpertTiling(64, 64, 16, 3, 4), ExpertTiling(128, 64, 16, 3, 8))


def candidates(key: TilingKey) -> tuple[ExpertTiling, ...]:
    """Return what is tried for a key; the first is taken where nothing can be timed."""
    if key.dtype == torch.float32:
        return _TF32 if key.precision == "tf32" else _IEEE
    shape = {
        "up": "two sums" if key.gated else "one sum",
        "hidden": "hidden",
        "dw": "dw, two sums" if key.gated else "dw, one sum",
        "dw_down": "dw, one sum",
    }.get(key.kernel, "one sum")
    tilings = _HALF[shape]
    if key.rows <= 64 and not key.kernel.startswith("dw"):  # tiles of 128 rows would be half empty
        return tuple(sorted(tilings, key=lambda t: t.rows))
    return tilings


def choose(key: TilingKey, run: Callable[[ExpertTiling], Any]) -> ExpertTiling:
    """Return the fastest tiling for this key; times the candidates now if none is known and timing is possible.

    Timing waits for the device. It happens at the first call of a key that is not in the file of choices; not while a CUDA
    graph is captured, and not with LIGHTNING_MUE_AUTOTUNE=0.
    """
    if key in _chosen:
        return _chosen[key]
    tilings = candidates(key)
    timing_is_possible = may_time(key.device)
    if not timing_is_possible and key.device.type != "cuda":
        return tilings[0]
    known = _read(cache_file()).get(key.name)
    # A tiling that is no longer a candidate is timed again.
    tiling = next((t for t in tilings if list(t) == known), None)
    if tiling is None:
        if not timing_is_possible:
            return tilings[0]
        tiling = min(tilings, key=lambda t: milliseconds(run, t))
        _write(cache_file(), key.name, tiling)
    return _chosen.setdefault(key, tiling)


_chosen: dict[TilingKey, ExpertTiling] = {}


def cache_file() -> Path:
    """Return the file of choices: `tilings.json` in LIGHTNING_MUE_CACHE, or in ~/.cache/lightning_mue."""
    folder = os.environ.get("LIGHTNING_MUE_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "lightning_mue") / "tilings.json"


def _read(file: Path) -> dict[str, Any]:
    """The choices in a file; none, with a warning, if it is damaged."""
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:  # json's and unicode's errors are ValueErrors
        found, do = f"no choices of tilings ({error})", "It is ignored. Delete it."
        warnings.warn(mismatch(str(file), found=found, expected="a JSON object", do=do), stacklevel=2)
        return {}
    return content


def _write(file: Path, name: str, tiling: ExpertTiling) -> None:
    """Add a choice to a file. Readers see the old file or the new one; of two writers at a time, one choice may be lost."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {**_read(file), name: list(tiling)}
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as new:
            json.dump(content, new, indent=0, sort_keys=True)
        os.chmod(new.name, 0o644)  # others may share the folder
        os.replace(new.name, file)
    except OSError as error:
        found, expected = f"{error}, so that tilings are timed again in every process", "a file that can be written"
        do = "Set LIGHTNING_MUE_CACHE to a folder that can be written."
        warnings.warn(mismatch(str(file), found=found, expected=expected, do=do), stacklevel=2)


def programs(tiling: ExpertTiling, tiles: int, device: torch.device) -> tuple[int]:
    """Return the grid for at most `tiles` tiles."""
    return (max(1, min(tiles, tiling.waves * multiprocessors(device)) if tiling.waves else tiles),)


def weights_to_read(weights: tuple[Tensor, ...], tiling: ExpertTiling, *, k_last: bool) -> tuple[tuple[Any, ...], str]:
    """Return what `load_weight` reads, and how: descriptors if wanted and possible for all, else the tensors.

    `weights` are stacks [E, n, k] if `k_last`, else [E, k, n].
    """
    if tiling.described:
        block = (tiling.cols, tiling.inner) if k_last else (tiling.inner, tiling.cols)
        described = tuple(describe(w, block) for w in weights)
        if None not in described:
            return described, "nk" if k_last else "kn"
    return weights, ""
