"""Which type multiplies fastest on this CPU, float32 or bfloat16: measured once in a process, the same on all ranks.

Flags do not tell. With AMX bfloat16 is some 3 times as fast as float32 and with AVX512-BF16 2.3 to 2.9 times; with AVX2 alone it
is emulated and 100 times as slow, and libraries can be limited to less than the processor has (ONEDNN_MAX_CPU_ISA).
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from functools import cache
from statistics import geometric_mean
from threading import Thread
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from lightning_mue.checks import require_choice

logger = logging.getLogger(__name__)

#: Fixes the type for a process, without a measurement.
VARIABLE = "LIGHTNING_MUE_CPU_DTYPE"
_TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Products that are timed, [B, n, k] by [B, k, n]: what orthogonalization and experts multiply, the smallest first.
_SHAPES = ((8, 64, 256), (64, 64, 256), (8, 256, 512), (2, 512, 512))
_REPEATS = 4
#: bfloat16 must be so much faster in the geometric mean to be taken, since float32 is more exact, and the choice should not
#: depend on noise.
_LEAST_GAIN = 1.25
#: One shape of which bfloat16 is no more than so many times as fast ends the measurement.
_HOPELESS = 0.5
#: Below this, converting operands and results of bfloat16 costs less than multiplying in it.
_SLOW = 0.7
_STORE_KEY = "lightning_mue/cpu_product_dtype"
_agreed: WeakKeyDictionary[Any, str] = WeakKeyDictionary()  # by job: another one may have other ranks


def cpu_product_dtype() -> torch.dtype:
    """Return the type of matrix products on the CPU where either would do: torch.float32 or torch.bfloat16.

    The first call measures for some 50 ms, unless LIGHTNING_MUE_CPU_DTYPE names one, and logs the choice. Where
    torch.distributed is initialized, all ranks take the choice of the first one that asks, so that replicas stay equal on
    unequal machines.

    Raises:
        ValueError: LIGHTNING_MUE_CPU_DTYPE is neither "float32" nor "bfloat16".
    """
    if fixed := fixed_choice():
        return _TYPES[fixed]
    if not (dist.is_available() and dist.is_initialized()):
        return _TYPES[_measured()]
    job = dist.group.WORLD
    if job not in _agreed:
        _agreed[job] = _first_choice()
    return _TYPES[_agreed[job]]


def bfloat16_is_slow() -> bool:
    """Return whether products of bfloat16 matrices gain from being computed in float32, conversions included.

    By the same measurement, each rank for its own processor, or by LIGHTNING_MUE_CPU_DTYPE. Between the two bounds neither
    type is sure to be faster, and what is bfloat16 is multiplied as it is.

    Raises:
        ValueError: LIGHTNING_MUE_CPU_DTYPE is neither "float32" nor "bfloat16".
    """
    if fixed := fixed_choice():
        return fixed == "float32"
    return _gain() < _SLOW


def fixed_choice() -> str | None:
    """Return what LIGHTNING_MUE_CPU_DTYPE says, or None if it is not set.

    Raises:
        ValueError: It is neither "float32" nor "bfloat16".
    """
    if fixed := os.environ.get(VARIABLE):
        require_choice(VARIABLE, fixed, _TYPES)
    return fixed or None


def _first_choice() -> str:
    """The choice of the first rank of the job that asks; by the job's key-value store, which needs no collective."""
    own = _measured()
    try:
        store = dist.distributed_c10d._get_default_store()
        choice = store.compare_set(_STORE_KEY, "", own).decode()
    except (AttributeError, RuntimeError, NotImplementedError):  # a store that cannot, such as a fake process group's
        return own
    if choice != own:
        logger.warning("Matrix products run in %s, another rank's choice; this processor would take %s.", choice, own)
    return choice


@cache
def _measured() -> str:
    mean = _gain()
    choice = "bfloat16" if mean >= _LEAST_GAIN else "float32"
    logger.info(
        "Matrix products whose type is free run in %s on this CPU: bfloat16 is %.2g times as fast as float32. %s=%s fixes it.",
        *(choice, mean, VARIABLE, choice),
    )
    return choice


@cache
def _gain() -> float:
    """How many times as fast bfloat16 is. Measured in a thread of its own: without the caller's autocast or other modes."""
    gains: list[float] = []
    worker = Thread(target=lambda: gains.extend(_gains()), name="lightning-mue-measurement")
    worker.start()
    worker.join()
    if len(gains) == len(_SHAPES):
        return geometric_mean(gains)
    return gains[-1] if gains and gains[-1] < _HOPELESS else 1.0  # 1: the measurement failed


def _gains() -> Iterator[float]:
    """How many times as fast bfloat16 is, for each shape; ends with the first at which it is slower, to lose no time."""
    for shape in _SHAPES:
        gain = _seconds(shape, torch.float32) / _seconds(shape, torch.bfloat16)
        yield gain
        if gain < _HOPELESS:
            return


def _seconds(shape: tuple[int, int, int], dtype: torch.dtype) -> float:
    """The least time of a product, after one that does not count."""
    batch, n, k = shape
    with torch.inference_mode():
        x, out = torch.ones(batch, n, k, dtype=dtype), torch.empty(batch, n, n, dtype=dtype)
        times = []
        for _ in range(_REPEATS + 1):
            start = time.perf_counter()
            torch.bmm(x, x.mT, out=out)
            times.append(time.perf_counter() - start)
    return max(min(times[1:]), 1e-9)
