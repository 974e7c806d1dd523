"""Timing of tilings: whether it may be done now, and how long a launch takes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from lightning_mue.checks import mismatch

#: What a launch raises if the tiling does not fit the device.
NO_ROOM = (OutOfResources, PTXASError)


def may_time(device: torch.device) -> bool:
    """Return whether timing is possible here and wanted."""
    wanted = os.environ.get("LIGHTNING_MUE_AUTOTUNE", "1") != "0"
    return wanted and device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def milliseconds(run: Callable[[Any], Any], tiling: Any) -> float:
    """Return the median time of a launch; infinite if the tiling does not fit the device."""
    try:
        return float(do_bench(lambda: run(tiling), warmup=5, rep=20, return_mode="median"))
    except (*NO_ROOM, torch.OutOfMemoryError):  # the last one is of `do_bench`'s own buffer
        return float("inf")


def launch_fitting(run: Callable[[Any], Any], tilings: Sequence[Any]) -> tuple[Any, Any]:
    """Launch with the first of the tilings that fits the device; return it, and what the launch returns.

    What fits is estimated, and a device or compiler that nobody has tried may take more. Nothing has run when a launch says so.

    Raises:
        RuntimeError: None fits.
    """
    reason: Exception | None = None
    for tiling in tilings:
        try:
            return tiling, run(tiling)
        except NO_ROOM as error:
            reason = error
    found = f"no tiling that fits this device, of {len(tilings)} ({reason})"
    do = "Use backend='auto' with another device, or backend='torch'; and please report the device."
    raise RuntimeError(mismatch("triton", found=found, expected="one that fits", do=do)) from reason
