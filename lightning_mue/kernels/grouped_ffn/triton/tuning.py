"""How the experts' kernels cut their work: a fixed default each, and the fastest of a few, timed once and remembered.

What was timed is kept in a file, so that the next process starts with it. A choice depends on the kind of problem and not on
one routing: the mean number of rows per expert, in powers of two, the widths, types, device and Triton version.
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

from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.kernels.triton_tools.launching import describe, multiprocessors
from lightning_mue.kernels.triton_tools.timing import may_time as _may_time
from lightning_mue.kernels.triton_tools.timing import milliseconds as _milliseconds


class Tiling(NamedTuple):
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
def _constants(tiling: Tiling) -> dict[str, int]:
    names = {"ROWS": tiling.rows, "COLS": tiling.cols, "INNER": tiling.inner, "GROUP": tiling.group}
    return {**names, "num_stages": tiling.stages, "num_warps": tiling.warps}


class Kind(NamedTuple):
    """What a choice depends on.

    Attributes:
        kernel: "up", "down", "hidden", "dx", "dw" or "dw_down".
        activation: A key of `ACTIVATIONS`: it decides on the planes, and on the registers that a tile needs.
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
        """The key in the file of choices: the same in every process on this kind of machine."""
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        parts = (
            *self[:6],
            str(self.dtype).removeprefix("torch."),
            self.precision,
            device,
            f"triton {triton.__version__}",
        )
        return "/".join(str(part) for part in parts)


#: Tried for 16-bit types, per kernel; the first is the default. Compiled for sm_90 with Triton 3.6 and 3.9 (no device was at
#: hand): all use the wide matrix instructions (wgmma), 16-byte loads and stores, and fit in 227 KiB of shared memory at one
#: program per multiprocessor. None spills registers with SwiGLU but the widest of "hidden" (320 bytes; 472 with 3.6), nor a
#: default with GELU but that of "up" (256 bytes).
_HALF: dict[str, tuple[Tiling, ...]] = {
    "two sums": (
        Tiling(128, 128, 64, 4, 8),
        Tiling(128, 128, 64, 4, 8, described=True),
        Tiling(128, 128, 64, 4, 8, waves=1, described=True),
        Tiling(64, 128, 64, 4, 4),
    ),
    "one sum": (
        Tiling(128, 256, 64, 4, 8),
        Tiling(128, 256, 64, 4, 8, described=True),
        Tiling(128, 256, 64, 4, 8, waves=1, described=True),
        Tiling(128, 128, 64, 3, 8, described=True),  # two programs a multiprocessor: one loads while the other stores
        Tiling(128, 128, 64, 4, 8),
        Tiling(64, 128, 64, 4, 4),
    ),
    "hidden": (
        Tiling(128, 128, 64, 4, 8),
        Tiling(128, 128, 64, 4, 8, described=True),
        Tiling(128, 128, 64, 4, 8, waves=1, described=True),
        Tiling(128, 256, 64, 3, 8, described=True),
        Tiling(64, 128, 64, 4, 4),
    ),
    # Of n stages, loads by index get n / 2: the index is loaded before them.
    "dw, two sums": (Tiling(128, 128, 64, 5, 8), Tiling(128, 128, 64, 7, 8), Tiling(128, 128, 64, 5, 8, waves=1)),
    "dw, one sum": (Tiling(128, 256, 64, 5, 8), Tiling(128, 256, 64, 7, 8), Tiling(128, 128, 64, 7, 8)),
}
_TF32 = (Tiling(128, 64, 32, 4, 4), Tiling(128, 128, 32, 3, 8), Tiling(64, 64, 32, 4, 4))
_IEEE = (Tiling(64, 64, 16, 3, 4), Tiling(128, 64, 16, 3, 8))


def candidates(kind: Kind) -> tuple[Tiling, ...]:
    """Return what is tried for a kind; the first is taken where nothing can be timed."""
    if kind.dtype == torch.float32:
        return _TF32 if kind.precision == "tf32" else _IEEE
    shape = {
        "up": "two sums" if kind.gated else "one sum",
        "hidden": "hidden",
        "dw": "dw, two sums" if kind.gated else "dw, one sum",
        "dw_down": "dw, one sum",
    }.get(kind.kernel, "one sum")
    tilings = _HALF[shape]
    if kind.rows <= 64 and not kind.kernel.startswith("dw"):  # tiles of 128 rows would be half empty
        return tuple(sorted(tilings, key=lambda t: t.rows))
    return tilings


def choose(kind: Kind, run: Callable[[Tiling], Any]) -> Tiling:
    """Return the fastest tiling for this kind, timed now if it is not known and can be.

    Timing waits for the device. It happens at the first call of a kind that is not in the file of choices; not while a CUDA
    graph is captured, and not with LIGHTNING_MUE_AUTOTUNE=0.
    """
    if kind in _chosen:
        return _chosen[kind]
    tilings = candidates(kind)
    may_time = _may_time(kind.device)
    if not may_time and kind.device.type != "cuda":
        return tilings[0]
    known = _read(cache_file()).get(kind.name)
    tiling = next((t for t in tilings if list(t) == known), None)  # one that is not offered any more is timed again
    if tiling is None:
        if not may_time:
            return tilings[0]
        tiling = min(tilings, key=lambda t: _milliseconds(run, t))
        _write(cache_file(), kind.name, tiling)
    return _chosen.setdefault(kind, tiling)


_chosen: dict[Kind, Tiling] = {}


def cache_file() -> Path:
    """Return the file of choices: `tilings.json` in LIGHTNING_MUE_CACHE, or in ~/.cache/lightning_mue."""
    folder = os.environ.get("LIGHTNING_MUE_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "lightning_mue") / "tilings.json"


def _read(file: Path) -> dict[str, Any]:
    """The choices in a file; none, with a warning, if it is damaged."""
    try:
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"found a {type(content).__name__}, expected an object")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:  # json's and unicode's errors are ValueErrors
        warnings.warn(
            f"{file}, the choices of tilings, cannot be read and is ignored: {error}. Delete it.", stacklevel=2
        )
        return {}
    return content


def _write(file: Path, name: str, tiling: Tiling) -> None:
    """Add a choice to a file. Readers see the old file or the new one; of two writers at a time, one choice may be lost."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = {**_read(file), name: list(tiling)}
        with tempfile.NamedTemporaryFile("w", dir=file.parent, suffix=".tmp", delete=False) as new:
            json.dump(content, new, indent=0, sort_keys=True)
        os.chmod(new.name, 0o644)  # others may share the folder
        os.replace(new.name, file)
    except OSError as error:
        warnings.warn(
            f"{file}: cannot keep the choice of a tiling ({error}); it is timed again in every process. "
            "Set LIGHTNING_MUE_CACHE to a folder that can be written.",
            stacklevel=2,
        )


def programs(tiling: Tiling, tiles: int, device: torch.device) -> tuple[int]:
    """Return the grid for at most `tiles` tiles."""
    return (max(1, min(tiles, tiling.waves * multiprocessors(device)) if tiling.waves else tiles),)


def weights_to_read(weights: tuple[Tensor, ...], tiling: Tiling, *, k_last: bool) -> tuple[tuple[Any, ...], str]:
    """Return what `load_weight` reads, and how: descriptors if wanted and possible for all, else the tensors.

    Args:
        weights: Stacks [E, n, k] if `k_last`, else [E, k, n].
        tiling: Of the kernel.
        k_last: Whether the inner dimension is the last one.
    """
    if tiling.described:
        block = (tiling.cols, tiling.inner) if k_last else (tiling.inner, tiling.cols)
        described = tuple(describe(w, block) for w in weights)
        if None not in described:
            return described, "nk" if k_last else "kn"
    return weights, ""
