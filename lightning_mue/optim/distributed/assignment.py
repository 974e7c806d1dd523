"""Assigns matrices to ranks by estimated cost; pure bookkeeping, with the same result on all ranks that share matrices.

Shape legend:
    S  ranks that a matrix is sharded over       C  replicas of those ranks
    W  workers, S * C; number c * S + s          n, m  smaller and larger side of a matrix
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from lightning_mue.optim.distributed.layout import Layout, piece_shape


class MatrixRange(NamedTuple):
    """Neighboring matrices `start:stop`, as this rank counts them, of the parameter number `param`."""

    param: int
    start: int
    stop: int


class ShardedShape(NamedTuple):
    """Shape of a matrix and how it is sharded; the fields are as in `Layout`."""

    matrix: tuple[int, int]
    split_dim: int | None
    split_sizes: tuple[int, ...]

    def piece(self, rank: int) -> tuple[int, int]:
        """Shape of the piece that rank s of the split group holds."""
        return piece_shape(self.matrix, self.split_dim, self.split_sizes[rank] if self.split_sizes else 0)


class Assignment(NamedTuple):
    """Matrices of one shape that one worker orthogonalizes in one call."""

    shape: ShardedShape
    ranges: tuple[MatrixRange, ...]

    @property
    def size(self) -> int:
        """Number of matrices."""
        return sum(each.stop - each.start for each in self.ranges)

    def piece(self, rank: int) -> tuple[int, int, int]:
        """Shape of the pieces that rank s of the split group holds of them."""
        return (self.size, *self.shape.piece(rank))


#: Number of a parameter, and of a matrix in it.
_Place = tuple[int, int]


@dataclass(frozen=True)
class Bucket:
    """Matrices that are communicated together, with their assignment to the workers.

    Attributes:
        layout: The layout of one of its parameters; all have the same groups.
        assignments: For each worker, what it orthogonalizes.
    """

    layout: Layout
    assignments: tuple[tuple[Assignment, ...], ...]

    def assigned(self, replica: int, split: int) -> tuple[Assignment, ...]:
        """What the worker at rank `split` of the replica number `replica` orthogonalizes."""
        return self.assignments[replica * self.layout.splits + split]

    def numel(self, replica: int, owner: int, rank: int) -> int:
        """How many numbers `rank` of the split group holds of what `owner`, in this replica, orthogonalizes."""
        return sum(math.prod(each.piece(rank)) for each in self.assigned(replica, owner))

    @property
    def longest(self) -> int:
        """How many numbers of this rank's pieces a replica orthogonalizes; of all replicas, the most."""
        numbers = [
            [self.numel(c, s, self.layout.split_rank) for s in range(self.layout.splits)]
            for c in range(self.layout.replicas)
        ]
        return max(map(sum, numbers))


def cost(matrix: tuple[int, int]) -> int:
    """Return the cost of Newton-Schulz for a matrix, up to a factor: `n^2 (m + n/2)`, in half units.

    This is `20 r + 10` in units of n^3, with r = m / n: five steps of the standard form, three products each, of which
    two have a side m. Source: the table of docs/derivations/hypersphere.md, section "Orthogonalization".
    """
    n, m = sorted(matrix)
    return n * n * (2 * m + n)


def assign(costs: Sequence[int], loads: list[int]) -> list[int]:
    """Return the worker of each item: in the given order, the one with the smallest load so far; `loads` is updated.

    With falling costs this is the longest-processing-time rule, whose largest load is at most 4/3 of the optimum (Graham,
    SIAM J. Appl. Math. 17, 1969). Ties go to the first worker, so that all ranks assign alike.

    Example:
        >>> assign([3, 3, 2, 2, 2], loads=[0, 0])
        [0, 1, 0, 1, 0]
    """
    heap = [(load, worker) for worker, load in enumerate(loads)]
    heapq.heapify(heap)
    owners = []
    for item in costs:
        load, worker = heap[0]
        heapq.heapreplace(heap, (load + item, worker))
        loads[worker] = load + item
        owners.append(worker)
    return owners


@lru_cache(maxsize=16)
def assign_matrices(
    layouts: tuple[Layout, ...], buffers: tuple[Hashable, ...], itemsize: int, bucket_bytes: int
) -> tuple[Bucket, ...]:
    """Assign the matrices of all parameters to workers, in buckets, which all ranks must take in this order.

    Args:
        layouts: The parameters' layouts.
        buffers: For each parameter, what two must have in common to share a buffer (dtype, device).
        itemsize: Bytes a number.
        bucket_bytes: Largest size in bytes of the pieces that this rank holds in a bucket; but every worker gets a
            matrix.
    """
    routes: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    for index, (layout, buffer) in enumerate(zip(layouts, buffers, strict=True)):
        alone = index if layout.gather else None  # what only DTensor can gather has a bucket of its own
        workers = (layout.split_group, len(layout.split_sizes), layout.replica_group, layout.replicas)
        route = (*workers, buffer, alone)
        routes[route].append(index)
    loads: dict[Hashable, list[int]] = {}  # of the workers, from earlier routes among the same ranks
    buckets: list[Bucket] = []
    for (*workers_of_route, _, _), members in routes.items():
        layout = layouts[members[0]]
        load = loads.setdefault(tuple(workers_of_route), [0] * (layout.splits * layout.replicas))
        buckets += _buckets_of_route(layouts, members, load, itemsize, bucket_bytes)
    return tuple(buckets)


def _buckets_of_route(
    layouts: Sequence[Layout], members: list[int], loads: list[int], itemsize: int, bucket_bytes: int
) -> Iterator[Bucket]:
    """Assign the parameters that share their groups: the most expensive matrices first, equal shapes side by side."""
    layout = layouts[members[0]]
    places: dict[ShardedShape, list[_Place]] = defaultdict(list)
    for index in members:
        each = layouts[index]
        shape = ShardedShape(each.matrix, each.split_dim, each.split_sizes)
        places[shape] += [(index, number) for number in range(each.count)]
    items = [(shape, at) for shape in sorted(places, key=lambda shape: -cost(shape.matrix)) for at in places[shape]]
    sizes = [itemsize * math.prod(shape.matrix) for shape, _ in items]
    limit = sum(sizes) if layout.gather else bucket_bytes * layout.splits
    if len(loads) > 1:
        # Several buckets unless they are small: the first is worked on while the others are communicated.
        limit = min(limit, max(sum(sizes) // 4, layout.splits << 20))
    for start, stop in _bucket_bounds(sizes, limit, len(loads)):
        yield Bucket(layout, _assign_bucket(items[start:stop], loads))


def _bucket_bounds(sizes: Sequence[int], limit: int, workers: int) -> Iterator[tuple[int, int]]:
    """Divide items into `start:stop` of at most `limit` in sum, but of a multiple of `workers` items."""
    start, total = 0, 0
    for at in range(0, len(sizes), workers):
        more = sum(sizes[at : at + workers])
        if at > start and total + more > limit:
            yield start, at
            start, total = at, 0
        total += more
    if sizes:
        yield start, len(sizes)


def _assign_bucket(
    items: Sequence[tuple[ShardedShape, _Place]], loads: list[int]
) -> tuple[tuple[Assignment, ...], ...]:
    """Assign a bucket. Of equal matrices a worker gets neighbors, so that stacks are sliced rather than indexed."""
    counts: dict[ShardedShape, list[int]] = {}
    places: dict[ShardedShape, list[_Place]] = defaultdict(list)
    for (shape, at), worker in zip(items, assign([cost(shape.matrix) for shape, _ in items], loads), strict=True):
        counts.setdefault(shape, [0] * len(loads))[worker] += 1
        places[shape].append(at)
    assignments: list[list[Assignment]] = [[] for _ in loads]
    for shape, numbers in counts.items():
        start = 0
        for assigned, number in zip(assignments, numbers, strict=True):
            if number:
                assigned.append(Assignment(shape, _ranges(places[shape][start : start + number])))
            start += number
    return tuple(tuple(assigned) for assigned in assignments)


def _ranges(places: Sequence[_Place]) -> tuple[MatrixRange, ...]:
    ranges: list[MatrixRange] = []
    for param, number in places:
        if ranges and ranges[-1].param == param and ranges[-1].stop == number:
            ranges[-1] = ranges[-1]._replace(stop=number + 1)
        else:
            ranges.append(MatrixRange(param, number, number + 1))
    return tuple(ranges)


def default_bucket_bytes(device: torch.device | str) -> int:
    """Return the scratch for one bucket: enough for whole batches of matrices, and little compared to a model."""
    return 32 << 20 if torch.device(device).type == "cpu" else 256 << 20
