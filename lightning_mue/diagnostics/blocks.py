"""In what portions a diagnostic goes through a large tensor, and the memory that it works in."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

#: Elements of a block. On a CPU its float32 temporaries stay in the caches, where they are several times as fast as in memory;
#: a GPU wants much work at once (a temporary has 32 MiB).
ON_CPU, ELSEWHERE = 1 << 19, 1 << 23

_kept = threading.local()


def block_elements(device: torch.device) -> int:
    """Elements of a float32 temporary."""
    return ON_CPU if device.type == "cpu" else ELSEWHERE


def scratch(elements: int, device: torch.device) -> Tensor:
    """Float32 [elements] with any values, until the next call of this thread.

    On a CPU it is the same memory each time, up to that of four blocks: new memory costs a page fault for every 4 KiB, which takes
    longer than to compute on it. Elsewhere torch keeps freed memory itself.
    """
    if device.type != "cpu" or elements > 4 * ON_CPU or torch.compiler.is_compiling():
        return torch.empty(elements, dtype=torch.float32, device=device)
    memory = getattr(_kept, "memory", None)
    if memory is None or memory.numel() < elements:
        with torch.inference_mode(False):
            memory = torch.empty(elements, dtype=torch.float32)
        if type(memory) is Tensor:  # not inside a mode that makes others
            _kept.memory = memory
    return memory[:elements]
