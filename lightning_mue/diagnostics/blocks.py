"""In what portions a diagnostic goes through a large tensor."""

from __future__ import annotations

import torch

#: Elements of a block. On a CPU its float32 temporaries stay in the caches, where they are several times as fast as in memory;
#: a GPU wants much work at once (a temporary has 32 MiB).
ON_CPU, ELSEWHERE = 1 << 19, 1 << 23


def block_elements(device: torch.device) -> int:
    """Elements of a float32 temporary."""
    return ON_CPU if device.type == "cpu" else ELSEWHERE
