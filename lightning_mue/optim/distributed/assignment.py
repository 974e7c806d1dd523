"""Who orthogonalizes which matrix, in which order: pure bookkeeping, the same on all ranks that share matrices.

Shape legend:
    S  ranks that a matrix is cut over       C  copies of those ranks
    W  workers, S * C; number c * S + s      n, m  smaller and larger side of a matrix
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


class Run(NamedTuple):
    """Neighboring matrices `start:stop`, in this rank's count, of the parameter number `param`."""

    param: int
    start: int
    stop: int


class Kind(NamedTuple):
    """Shape of a matrix and how it is cut; the fields are as in `Layout`."""

    matrix: tuple[int, int]
    split_dim: int | None
    split_sizes: tuple[int, ...]

    def piece(self, rank: int) -> tuple[int, int]:
        """Shape of the piece that rank s of the split group holds."""
        return piece_shape(self.matrix, self.split_dim, self.split_sizes[rank] if self.split_sizes else 0)


class Batch(NamedTuple):
    """Matrices of one kind that one worker orthogonalizes in one call."""

    kind: Kind
    runs: tuple[Run, ...]

    @property
    def size(self) -> int:
        """How many matrices they are."""
        return sum(run.stop - run.start for run in self.runs)

    def piece(self, rank: int) -> tuple[int, int, int]:
        """Shape of the pieces that rank s of the split group holds of them."""
        return (self.size, *self.kind.piece(rank))


#: Number of a parameter, and of a matrix in it.
Place = tuple[int, int]


@dataclass(frozen=True)
class Bucket:
    """Matrices that travel together, dealt over the workers.

    Attributes:
        layout: The layout of one of its parameters: its groups are everyone's.
        hands: For each worker, what it orthogonalizes.
    """

    layout: Layout
    hands: tuple[tuple[Batch, ...], ...]

    @property
    def splits(self) -> int:
        """How many ranks a matrix is cut over."""
        return max(1, len(self.layout.split_sizes))

    def hand(self, copy: int, split: int) -> tuple[Batch, ...]:
        """What the worker at rank `split` of the copy number `copy` orthogonalizes."""
        return self.hands[copy * self.splits + split]

    def numel(self, copy: int, owner: int, rank: int) -> int:
        """How many numbers `rank` of the split group holds of what `owner` of it, in this copy, orthogonalizes."""
        return sum(math.prod(batch.piece(rank)) for batch in self.hand(copy, owner))

    def share(self, copy: int) -> int:
        """How many numbers of this rank's pieces come from a copy's work."""
        return sum(self.numel(copy, owner, self.layout.split_rank) for owner in range(self.splits))


def cost(matrix: tuple[int, int]) -> int:
    """Return what Newton-Schulz costs for a matrix, up to a factor: `n^2 (m + n/2)`, in half units.

    Source: three products a step, of which two have an `m` (performance.md section 3: 20r + 10 in units of n^3).
    """
    n, m = sorted(matrix)
    return n * n * (2 * m + n)


def deal(costs: Sequence[int], loads: list[int]) -> list[int]:
    """Deal items over workers: in the order given, each to the worker with the least so far.

    With falling costs this is the longest-processing-time rule, whose fullest worker has at most 4/3 of the best
    possible (Graham, SIAM J. Appl. Math. 17, 1969). Ties go to the first worker, so that all ranks deal alike.

    Args:
        costs: Cost of each item.
        loads: What each worker has already, a number each; updated in place.

    Returns:
        The worker of each item.

    Example:
        >>> deal([3, 3, 2, 2, 2], loads=[0, 0])
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
def plan(
    layouts: tuple[Layout, ...], buffers: tuple[Hashable, ...], itemsize: int, bucket_bytes: int
) -> tuple[Bucket, ...]:
    """Deal the matrices of all parameters, and cut the work into buckets.

    Args:
        layouts: The parameters' layouts.
        buffers: For each parameter, what two must have in common to share a buffer (dtype, device).
        itemsize: Bytes a number.
        bucket_bytes: Bytes of pieces that this rank holds in a bucket, at most; but every worker gets a matrix.

    Returns:
        The buckets, in the order in which all ranks must take them.
    """
    routes: dict[tuple[Hashable, ...], list[int]] = defaultdict(list)
    for index, (layout, buffer) in enumerate(zip(layouts, buffers, strict=True)):
        # What only DTensor can put together goes alone.
        alone = index if layout.gather else None
        routes[layout.split_group, len(layout.split_sizes), layout.copy_group, layout.copies, buffer, alone].append(
            index
        )
    loads: dict[Hashable, list[int]] = {}  # what the workers have from earlier routes among the same ranks
    buckets: list[Bucket] = []
    for (*workers, _, _), members in routes.items():
        layout = layouts[members[0]]
        load = loads.setdefault(tuple(workers), [0] * (max(1, len(layout.split_sizes)) * layout.copies))
        buckets += _route(layouts, members, load, itemsize, bucket_bytes)
    return tuple(buckets)


def _route(
    layouts: Sequence[Layout], members: list[int], loads: list[int], itemsize: int, bucket_bytes: int
) -> Iterator[Bucket]:
    """Deal the parameters that go the same way, dearest matrices first and equal ones side by side."""
    layout = layouts[members[0]]
    places: dict[Kind, list[Place]] = defaultdict(list)
    for index in members:
        each = layouts[index]
        kind = Kind(each.matrix, each.split_dim, each.split_sizes)
        places[kind] += [(index, number) for number in range(each.count)]
    items = [(kind, at) for kind in sorted(places, key=lambda kind: -cost(kind.matrix)) for at in places[kind]]
    sizes = [itemsize * math.prod(kind.matrix) for kind, _ in items]
    splits = max(1, len(layout.split_sizes))
    limit = sum(sizes) if layout.gather else bucket_bytes * splits
    if len(loads) > 1:
        # Several buckets, if they are of some size: the first to arrive is worked on while the others travel.
        limit = min(limit, max(sum(sizes) // 4, splits << 20))
    for start, stop in _stretches(sizes, limit, len(loads)):
        yield Bucket(layout, _hands(items[start:stop], loads))


def _stretches(sizes: Sequence[int], limit: int, workers: int) -> Iterator[tuple[int, int]]:
    """Cut items into stretches `start:stop` of at most `limit` in sum, but of a multiple of `workers` items."""
    start, total = 0, 0
    for at in range(0, len(sizes), workers):
        more = sum(sizes[at : at + workers])
        if at > start and total + more > limit:
            yield start, at
            start, total = at, 0
        total += more
    if sizes:
        yield start, len(sizes)


def _hands(items: Sequence[tuple[Kind, Place]], loads: list[int]) -> tuple[tuple[Batch, ...], ...]:
    """Deal a bucket. Which of equal matrices a worker gets is free: neighbors, so that stacks are sliced, not picked."""
    counts: dict[Kind, list[int]] = {}
    places: dict[Kind, list[Place]] = defaultdict(list)
    for (kind, at), worker in zip(items, deal([cost(kind.matrix) for kind, _ in items], loads), strict=True):
        counts.setdefault(kind, [0] * len(loads))[worker] += 1
        places[kind].append(at)
    hands: list[list[Batch]] = [[] for _ in loads]
    for kind, numbers in counts.items():
        start = 0
        for hand, number in zip(hands, numbers, strict=True):
            if number:
                hand.append(Batch(kind, _runs(places[kind][start : start + number])))
            start += number
    return tuple(tuple(hand) for hand in hands)


def _runs(places: Sequence[Place]) -> tuple[Run, ...]:
    runs: list[Run] = []
    for param, number in places:
        if runs and runs[-1].param == param and runs[-1].stop == number:
            runs[-1] = runs[-1]._replace(stop=number + 1)
        else:
            runs.append(Run(param, number, number + 1))
    return tuple(runs)


def default_bucket_bytes(device: torch.device | str) -> int:
    """Return the scratch for one bucket: enough for whole batches of matrices, and little beside a model."""
    return 32 << 20 if torch.device(device).type == "cpu" else 256 << 20
