"""Memory of the CPU backend: work buffers kept from call to call, and results in large pages.

Writing to new memory for the first time is slow: the system finds and clears a page of 4 KiB at each 4 KiB.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor, UntypedStorage

_LARGE_PAGE = 1 << 21  # of x86; elsewhere the advice is no worse
_KEPT_BYTES = 1 << 27  # a larger buffer is freed after its use
_spare: dict[str, list[UntypedStorage]] = {}  # by purpose, as many as were ever in use at the same time


class Scratch:
    """Named work buffers of one thread; each holds the rows of one block. `weight` holds one weight of it."""

    def __init__(self, flat: Tensor, columns: Mapping[str, int], max_rows: int, weight: Tensor) -> None:
        self._weight = weight
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

    def weight_like(self, weight: Tensor) -> Tensor:
        """Undefined content of a weight's shape; one at a time."""
        return self._weight[: weight.numel()].view(weight.shape)

    def converted(self, weight: Tensor) -> Tensor:
        """A weight in the type of the buffers; until the next one."""
        return self.weight_like(weight).copy_(weight)


@contextmanager
def borrowed(purpose: str, like: Tensor, size: int) -> Iterator[Tensor]:
    """Lend a buffer of `size` elements of undefined content, of type and device of `like`.

    Buffers of one purpose are about equally large. After an error or an interrupt a buffer is not used again.
    """
    spare, n_bytes = _spare.setdefault(purpose, []), size * like.element_size()
    try:
        storage = spare.pop()  # atomic, unlike a look whether there is one
    except IndexError:
        storage = UntypedStorage(0)
    if len(storage) < n_bytes or storage.device != like.device:
        # A little more, because the next step needs a little more or less.
        storage = UntypedStorage(n_bytes + n_bytes // 8, device=like.device)
    # Kept as storages, since a tensor made in inference mode could not be written to outside of it.
    yield like.new_empty(0).set_(storage, 0, (size,), (1,))  # type: ignore[call-overload]
    if storage.device.type == "cpu" and len(storage) <= _KEPT_BYTES:
        spare.append(storage)


def in_large_pages(fresh: Tensor) -> Tensor:
    """Return the tensor, which nothing was written to; its memory then comes in large pages where the system has them.

    Gradients of the experts are freed and allocated again at every step. Where Linux lends large pages on request
    (/sys/kernel/mm/transparent_hugepage/enabled: madvise) this asks; elsewhere it changes nothing.
    """
    size, advise = fresh.untyped_storage().nbytes(), _madvise()
    if advise is None or fresh.device.type != "cpu" or size < 2 * _LARGE_PAGE:
        return fresh
    start = fresh.untyped_storage().data_ptr()
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    advise(first, start + size - first, mmap.MADV_HUGEPAGE)  # a refusal loses nothing but speed
    return fresh


@cache
def _madvise() -> Any:
    """The C library's function, or None."""
    if not sys.platform.startswith("linux") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
