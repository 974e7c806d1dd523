"""A world of ranks that does not exist: a fake process group, and what each of its ranks would hold of a tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

from lightning_mue.checks import mismatch, value_error
from lightning_mue.sharded import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: Lightning's names of the dimensions of `ModelParallelStrategy`'s mesh.
AXES = ("data_parallel", "tensor_parallel")
#: Where a rank is on the mesh: name of a dimension -> coordinate.
Place = Mapping[str, int]


@contextmanager
def fake_world(data_parallel: int, tensor_parallel: int) -> Iterator[DeviceMesh]:
    """The mesh of so many ranks, of which this process is rank 0; collectives return at once and change nothing.

    Raises:
        RuntimeError: If torch.distributed is initialized: its process group would be the fake one.
    """
    if dist.is_initialized():
        do = "Make the dry run in a process of its own."
        raise RuntimeError(mismatch("process group", found="one", expected="none before a dry run", do=do))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    dist.init_process_group("fake", rank=0, world_size=data_parallel * tensor_parallel, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (data_parallel, tensor_parallel), mesh_dim_names=AXES)
    finally:
        dist.destroy_process_group()


def places(data_parallel: int, tensor_parallel: int) -> list[Place]:
    """Where each rank is, in the order of ranks."""
    return [dict(zip(AXES, at, strict=True)) for at in product(range(data_parallel), range(tensor_parallel))]


def coordinate(tensor: Any, place: Place) -> tuple[int, ...]:
    """The coordinate of a rank on a DTensor's mesh; () for a plain tensor.

    Raises:
        ValueError: If a dimension of the mesh has no name, or another than Lightning's.
    """
    if not is_sharded(tensor):
        return ()
    names = tensor.device_mesh.mesh_dim_names or ()
    if len(names) != tensor.device_mesh.ndim or not set(names) <= set(place):
        do = "In configure_model take parts of self.device_mesh, such as self.device_mesh['data_parallel']."
        found = f"one with the dimensions {names or tuple(tensor.device_mesh.shape)}"
        raise value_error("mesh of a parameter", found=found, expected=f"some of {', '.join(place)}", do=do)
    return tuple(place[name] for name in names)


def local_shape(tensor: Any, place: Place) -> tuple[int, ...]:
    """Shape of a rank's part of a tensor; a plain tensor is whole on every rank."""
    if not is_sharded(tensor):
        return tuple(tensor.shape)
    return _local_shape(
        tuple(tensor.shape), tuple(tensor.device_mesh.shape), coordinate(tensor, place), tuple(tensor.placements)
    )


@lru_cache(maxsize=1 << 16)
def _local_shape(
    shape: tuple[int, ...], mesh: tuple[int, ...], at: tuple[int, ...], placements: Sequence[Any]
) -> tuple[int, ...]:
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    return tuple(_compute_local_shape_and_global_offset(shape, mesh, list(at), placements)[0])


def local_bytes(tensor: Tensor, place: Place) -> int:
    """Bytes of a rank's part of a tensor."""
    return math.prod(local_shape(tensor, place)) * tensor.dtype.itemsize
