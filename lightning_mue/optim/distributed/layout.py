"""How a parameter's matrices lie over the ranks: whole or sharded, on one rank or as replicas on several.

Shape legend:
    E  matrices (experts) in one stacked parameter      S  ranks that a matrix is sharded over
    out, in  rows and columns of a whole matrix         C  ranks that hold the same (replicas)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.parameterizations.rules.kinds import matrix_sides
from lightning_mue.sharded import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement


@dataclass(frozen=True)
class Layout:
    """Where the matrices of one parameter are.

    Two dimensions are one matrix, three a stack of matrices, more (a convolution) one matrix `[out, rest]`.

    Attributes:
        shape: Shape of the whole parameter.
        local_shape: Shape of this rank's part of it.
        matrix: `(out, in)` of a whole matrix.
        indices: Which matrices of the stack this rank holds, whole or in part; `(0,)` for a single matrix.
        split_dim: Side along which each matrix is sharded over `split_group`: 0 rows, 1 columns, None if it is whole here.
        split_group: The ranks that each hold a piece of the same matrices.
        split_rank: This rank's number among them.
        split_sizes: Size of the sharded side on each of them, in order; 0 is possible. `()` if matrices are whole.
        replica_group: The ranks that hold the same tensor as this one and step it by the same gradient; None if alone.
        replica_rank: This rank's number among them.
        replicas: How many they are.
        gather: `(mesh, placements)` if matrices are sharded in a way that only DTensor itself can undo.
        sum_groups: The groups whose ranks hold pieces of the same matrices, one for each mesh dimension that shards.
    """

    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    matrix: tuple[int, int]
    indices: tuple[int, ...]
    split_dim: int | None = None
    split_group: ProcessGroup | None = None
    split_rank: int = 0
    split_sizes: tuple[int, ...] = ()
    replica_group: ProcessGroup | None = None
    replica_rank: int = 0
    replicas: int = 1
    gather: tuple[DeviceMesh, tuple[Placement, ...]] | None = None
    sum_groups: tuple[ProcessGroup, ...] = ()

    @property
    def count(self) -> int:
        """How many matrices this rank holds, whole or in part."""
        return len(self.indices)

    @property
    def splits(self) -> int:
        """How many ranks a matrix is sharded over."""
        return max(1, len(self.split_sizes))

    @property
    def is_distributed(self) -> bool:
        """Whether other ranks hold the same matrices, or parts of them."""
        return bool(self.sum_groups or self.replica_group or self.gather)


def by_expert(placements: Sequence[Placement]) -> list[Placement]:
    """Return the placements of a stack that is sharded by expert as by these, and in no other way."""
    from torch.distributed.tensor import Replicate

    return [p if getattr(p, "dim", None) == 0 else Replicate() for p in placements]


def layout_of(param: Tensor, process_group: ProcessGroup | None = None) -> Layout:
    """Return how a parameter lies over the ranks.

    Every rank must ask for the same parameters in the same order: a mesh with more than one dimension of replicas needs
    a process group of its own, which is made here.

    Args:
        param: The parameter. A DTensor's mesh and placements say everything; mesh dimensions of one rank do not count.
        process_group: For a plain tensor: the ranks that hold replicas of it, with the same gradients, or None.

    Raises:
        ValueError: If the parameter is not a matrix, its placement is partial (a sum that is still to be done) or
            unknown, the mesh that shards it lists ranks out of order, or this rank's part is not the one that the
            placements say.
    """
    if param.ndim < 2:
        raise value_error("param", found=f"shape {list(param.shape)}", expected="at least two dimensions")
    if is_sharded(param):
        return _sharded(param)
    shape = tuple(param.shape)
    layout = Layout(shape, shape, matrix_sides(shape), tuple(range(_stacked(shape))))
    return layout if process_group is None else _with_replicas(layout, process_group)


def _stacked(shape: Sequence[int]) -> int:
    return shape[0] if len(shape) == 3 else 1


def _with_replicas(layout: Layout, group: ProcessGroup) -> Layout:
    size = dist.get_world_size(group)
    if size <= 1:  # -1 where this rank is not in the group
        return layout
    return replace(layout, replica_group=group, replica_rank=dist.get_rank(group), replicas=size)


def _sharded(param: Any) -> Layout:
    """Read a DTensor's layout from its mesh and placements."""
    mesh, placements, shape = param.device_mesh, tuple(param.placements), tuple(param.shape)
    local_shape = tuple(param._local_tensor.shape)  # to_local would record a node of the graph
    if mesh.get_coordinate() is None:
        return Layout(shape, local_shape, matrix_sides(shape), ())
    replicated, sharded = [], []
    for dim, placement in enumerate(placements):
        if mesh.size(dim) == 1:
            continue
        if placement.is_replicate():
            replicated.append(dim)
        elif placement.is_partial() or not hasattr(placement, "dim"):
            key, expected = f"parameter of shape {list(shape)}", "Shard or Replicate on every mesh dimension"
            do = "Redistribute it before it goes to the optimizer."
            raise value_error(key, found=f"placements {list(placements)}", expected=expected, do=do)
        elif len(shape) != 3 or placement.dim != 0:
            sharded.append(dim)
    layout = Layout(shape, local_shape, matrix_sides(shape), _indices(shape, mesh, placements))
    if sharded:
        layout = _with_shards(layout, mesh, placements, sharded)
    if replicated and not layout.gather:
        layout = _with_replicas(layout, _replica_group(mesh, tuple(replicated)))
    _check_local(layout, placements)
    return layout


def _indices(shape: tuple[int, ...], mesh: DeviceMesh, placements: Sequence[Placement]) -> tuple[int, ...]:
    """Return which matrices of a stack are here, by torch's own split of their numbers (no communication)."""
    if len(shape) != 3:
        return (0,)
    from torch.distributed.tensor import distribute_tensor

    numbers_E = torch.arange(shape[0], device=mesh.device_type)
    placed_E = distribute_tensor(numbers_E, mesh, by_expert(placements), src_data_rank=None)
    return tuple(placed_E.to_local().tolist())


def _with_shards(layout: Layout, mesh: DeviceMesh, placements: tuple[Placement, ...], dims: list[int]) -> Layout:
    """Add how the matrices are sharded by the mesh dimensions `dims`."""
    from torch.distributed.tensor import Shard

    for dim in dims:
        ranks = _ranks_along(mesh, (dim,))
        if ranks != sorted(ranks):
            key, found = f"mesh of the parameter of shape {list(layout.shape)}", f"the ranks {ranks}"
            expected = "ascending order, as in their process group"
            do = (
                "torch's DTensor mixes up the pieces of such a tensor: make the mesh with init_device_mesh, or list its "
                "ranks in ascending order."
            )
            raise value_error(key, found=found, expected=expected, do=do)
    groups = tuple(mesh.get_group(dim) for dim in dims)
    group, placement = groups[0], placements[dims[0]]
    side: int = placement.dim - (len(layout.shape) == 3)  # type: ignore[attr-defined]
    if len(dims) > 1 or type(placement) is not Shard or side > 1:
        return replace(layout, gather=(mesh, placements), sum_groups=groups)
    rest = math.prod(layout.shape[2:]) if side == 1 and len(layout.shape) > 3 else 1
    sizes = tuple(size * rest for size in shard_sizes(layout.matrix[side] // rest, mesh.size(dims[0])))
    return replace(
        layout, split_dim=side, split_group=group, split_rank=dist.get_rank(group), split_sizes=sizes, sum_groups=groups
    )


def shard_sizes(size: int, ranks: int) -> tuple[int, ...]:
    """Return how many of `size` rows each rank gets from `Shard`: equal parts, rounded up, until none are left.

    Example:
        >>> shard_sizes(5, 2), shard_sizes(5, 4), shard_sizes(1, 2)
        ((3, 2), (2, 2, 1, 0), (1, 0))
    """
    part = -(-size // ranks)
    return tuple(max(0, min(part, size - rank * part)) for rank in range(ranks))


def piece_shape(matrix: tuple[int, int], split_dim: int | None, size: int) -> tuple[int, int]:
    """Return the shape of a piece with `size` of the sharded side; the matrix's own shape if it is not sharded."""
    return matrix if split_dim is None else (size, matrix[1]) if split_dim == 0 else (matrix[0], size)


def _check_local(layout: Layout, placements: Sequence[Placement]) -> None:
    if layout.gather:
        return
    size = layout.split_sizes[layout.split_rank] if layout.split_sizes else 0
    expected = (layout.count, *piece_shape(layout.matrix, layout.split_dim, size))
    local = (_stacked(layout.local_shape), *matrix_sides(layout.local_shape))
    if local != expected:
        raise value_error(
            f"this rank's part of the parameter of shape {list(layout.shape)}",
            found=f"shape {list(layout.local_shape)}",
            expected=f"{list(expected)} (matrices, rows, columns) from its placements {list(placements)}",
            do="Shard the parameter with fully_shard or distribute_tensor.",
        )


def _replica_group(mesh: DeviceMesh, dims: tuple[int, ...]) -> ProcessGroup:
    """Return the ranks that differ from this one only along the mesh dimensions `dims`."""
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    return _group_of(tuple(sorted(_ranks_along(mesh, dims))), dist.group.WORLD)


def _ranks_along(mesh: DeviceMesh, dims: tuple[int, ...]) -> list[int]:
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    return mesh.mesh[tuple(slice(None) if dim in dims else at for dim, at in enumerate(coordinate))].flatten().tolist()


@lru_cache(maxsize=16)
def _group_of(ranks: tuple[int, ...], world: ProcessGroup) -> ProcessGroup:
    """Make a group once; `world` is in the cache's key, so that a group of an earlier world is not used again."""
    return dist.new_group(list(ranks), use_local_synchronization=True)
