"""Choice of a tiling for the experts' kernels: a fixed default each, or the fastest of a few, timed once and remembered.

What was timed is kept in a file, so that the next process starts with it. A choice depends on sizes and not on one routing: the
mean number of rows per expert, rounded up to a power of two, the widths, types, device and Triton version.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mue.checks import mismatch
from lightning_mue.files import whole_file
from lightning_mue.kernels.grouped_ffn.triton.tilings import SMALLEST, ExpertTiling, TilingKey, candidates, shared_bytes
from lightning_mue.kernels.triton_tools.launching import describe, multiprocessors
from lightning_mue.kernels.triton_tools.timing import NO_ROOM, launch_fitting, may_time, milliseconds


def launch_chosen(key: TilingKey, run: Callable[[ExpertTiling], Any]) -> Any:
    """Launch with what `choose` returns, or with what fits if that does not, against the estimate; return the result."""
    tiling = choose(key, run)
    try:
        return run(tiling)
    except NO_ROOM:
        others = sorted(candidates(key), key=lambda t: shared_bytes(key, t, 0), reverse=True)
        tiling, result = launch_fitting(run, [*(t for t in others if t != tiling), SMALLEST])
        _chosen[key] = tiling
        return result


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
    known = _remembered(cache_file()).get(key.name)
    # A tiling that is no longer a candidate is timed again.
    tiling = next((t for t in tilings if list(t) == known), None)
    if tiling is None:
        if not timing_is_possible:
            return tilings[0]
        tiling = min(tilings, key=lambda t: milliseconds(run, t))
        _write(cache_file(), key.name, tiling)
        _remembered(cache_file())[key.name] = list(tiling)
    return _chosen.setdefault(key, tiling)


_chosen: dict[TilingKey, ExpertTiling] = {}
_files: dict[Path, dict[str, Any]] = {}  # by name, as read at the first launch: a launch is no time to read files


def cache_file() -> Path:
    """Return the file of choices: `tilings.json` in LIGHTNING_MUE_CACHE, or in ~/.cache/lightning_mue."""
    folder = os.environ.get("LIGHTNING_MUE_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "lightning_mue") / "tilings.json"


def _remembered(file: Path) -> dict[str, Any]:
    """The choices in a file, which is read once a process."""
    if file not in _files:
        _files[file] = _read(file)
    return _files[file]


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
        content = {**_read(file), name: list(tiling)}
        with whole_file(file) as part:
            part.write_text(json.dumps(content, indent=0, sort_keys=True))
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
