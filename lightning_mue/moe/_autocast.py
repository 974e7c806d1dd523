"""Autocast on any device, the meta device included (where `torch.autocast` itself raises)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def disabled(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast is off."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def compute_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on x's device, or None when it is off."""
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None
