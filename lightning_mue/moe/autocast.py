"""Autocast on any device, the meta device included (where `torch.autocast` itself raises)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def disabled(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast is off."""
    # Not `torch.amp.is_autocast_available`: torch 2.11 cannot compile it, and would break the graph.
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def compute_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on x's device, or None when it is off."""
    device_type = x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
