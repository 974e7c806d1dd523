"""Memory in large pages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_mue.kernels.scratch import in_large_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def large_kib(t):
    """KiB of large pages in the mappings that the tensor's memory lies in."""
    start, found, inside = t.data_ptr(), 0, False
    for line in Path("/proc/self/smaps").read_text(encoding="utf-8").splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            low, high = (int(n, 16) for n in first.split("-"))
            inside = low < start + t.nbytes and start < high
        elif inside and first == "AnonHugePages:":
            found += int(rest[0])
    return found


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(encoding="utf-8"), reason="no large pages on request"
)
def test_large_tensors_lie_in_large_pages():
    plain = torch.empty(1 << 24, dtype=torch.uint8).fill_(1)
    advised = in_large_pages(torch.empty(1 << 26, dtype=torch.uint8)).fill_(1)
    assert large_kib(advised) > large_kib(plain)
    assert large_kib(advised) >= 1 << 15  # half: the system may be short of them


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("size", [0, 3, 1 << 23])
def test_the_tensor_itself_is_returned(device, size):
    t = torch.empty(size, device=device)
    assert in_large_pages(t) is t
