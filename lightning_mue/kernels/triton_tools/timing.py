"""Timing of tilings: whether it may be done now, and how long a launch takes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench


def may_time(device: torch.device) -> bool:
    """Return whether timing is possible here and wanted."""
    wanted = os.environ.get("LIGHTNING_MUE_AUTOTUNE", "1") != "0"
    return wanted and device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def milliseconds(run: Callable[[Any], Any], tiling: Any) -> float:
    """Return the median time of a launch; infinite if the tiling does not fit the device."""
    try:
        return float(do_bench(lambda: run(tiling), warmup=5, rep=20, return_mode="median"))
    except (OutOfResources, PTXASError, torch.OutOfMemoryError):  # the last one is of `do_bench`'s own buffer
        return float("inf")
