"""Memory of the CPU backend: work buffers that stay, and huge pages for large results.

To touch new memory first costs more than to compute on it: 0.8 ms a megabyte on pages of 4 KiB, 0.3 ms on pages of 2 MiB,
against 0.15 ms to fill memory that is there (measured; virtual machine, one core).
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

_HUGE_BYTES = 1 << 22  # from this size on, most of a tensor lies on whole huge pages
_KEPT_BYTES = 1 << 27  # a larger work buffer is given back
_spare: dict[str, list[Tensor]] = {}  # by purpose, as many as were ever in use at the same time


def new_empty(like: Tensor, *shape: int) -> Tensor:
    """A tensor of undefined content, of the type and on the device of `like`; on huge pages where it is large."""
    return on_huge_pages(like.new_empty(shape))


def on_huge_pages(out: Tensor) -> Tensor:
    """Ask for huge pages for a new tensor, if it is large; returns the tensor."""
    size = out.numel() * out.element_size()
    if size >= _HUGE_BYTES and out.device.type == "cpu":
        start = out.data_ptr() + -out.data_ptr() % mmap.PAGESIZE
        _advise_huge(start, (out.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE)
    return out


def _advise_huge(start: int, size: int) -> None:
    """A hint, which the kernel may ignore."""
    madvise = _madvise()
    if madvise is not None:
        madvise(start, size, mmap.MADV_HUGEPAGE)


@cache
def _madvise() -> Any:
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # Linux alone has it
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


class Scratch:
    """Named work buffers of one thread; each holds the rows of one block."""

    def __init__(self, flat: Tensor, columns: Mapping[str, int], max_rows: int) -> None:
        parts = flat.split([max_rows * width for width in columns.values()])
        self._parts = dict(zip(columns, zip(parts, columns.values(), strict=True), strict=True))
        self._views: dict[tuple[str, int, int], Tensor] = {}

    def get(self, name: str, shape: tuple[int, int]) -> Tensor:
        """Undefined content, [*shape, columns of that name]."""
        key = (name, *shape)
        if key not in self._views:
            part, width = self._parts[name]
            self._views[key] = part.as_strided((*shape, width), (shape[1] * width, width, 1))
        return self._views[key]


@contextmanager
def borrowed(purpose: str, like: Tensor, size: int) -> Iterator[Tensor]:
    """Lend a buffer of undefined content, which can be written to in inference mode only.

    Args:
        purpose: Buffers of one purpose are about equally large.
        like: Gives type and device.
        size: Number of elements.
    """
    spare, n_bytes = _spare.setdefault(purpose, []), size * like.element_size()
    with torch.inference_mode():
        try:
            flat = spare.pop()  # atomic, unlike a look whether there is one
        except IndexError:
            flat = torch.empty(0, dtype=torch.uint8)
        if len(flat) < n_bytes or flat.device != like.device:
            # A little more, for the next step needs a little more or less.
            flat = new_empty(torch.empty(0, dtype=torch.uint8, device=like.device), n_bytes + n_bytes // 8)
        lent = flat[:n_bytes].view(like.dtype)
    yield lent
    if flat.device.type == "cpu" and len(flat) <= _KEPT_BYTES:
        spare.append(flat)
