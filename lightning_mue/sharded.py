"""DTensors and plain tensors: whether a tensor is sharded, this rank's part of it, and the whole of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor. Imports nothing, because builds of torch without distributed have no DTensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory; a plain tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, gathered from all ranks (a collective); a plain tensor as it is."""
    if is_sharded(tensor) and torch.distributed.is_initialized():
        return tensor.full_tensor()  # type: ignore[attr-defined]
    return tensor


def cutting_dims(tensor: Any) -> tuple[Any, tuple[int, ...]]:
    """The mesh of a DTensor and the mesh dimensions over which it is sharded; (None, ()) for a plain tensor."""
    if not is_sharded(tensor):
        return None, ()
    return tensor.device_mesh, tuple(i for i, placement in enumerate(tensor.placements) if hasattr(placement, "dim"))
