"""Orthogonalize matrices that are cut or copied over ranks: whole, each once, wherever the parameters lie.

Newton-Schulz needs whole matrices: the pieces' orthogonalizations are not the pieces of the orthogonalization. So the
pieces of a matrix travel to one rank, the result's pieces travel back, and ranks that hold the same share out the work.

Shape legend: as in `transfers.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mue.optim.distributed.assignment import Bucket, default_bucket_bytes, plan
from lightning_mue.optim.distributed.layout import Layout, layout_of
from lightning_mue.optim.distributed.replicas import find_copies
from lightning_mue.optim.distributed.transfer import GatheredTransfer, Orthogonalizer, Piece, Transfer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def orthogonalize_sharded(
    layouts: Sequence[Layout],
    directions: Sequence[Tensor],
    fn: Orthogonalizer,
    *,
    dtype: torch.dtype,
    bucket_bytes: int | None = None,
) -> Iterator[list[tuple[int, Tensor]]]:
    """Orthogonalize the whole matrices that the directions are pieces of, and give back this rank's pieces.

    The result is the same function of the whole directions in every layout. Matrices are dealt out by cost: cut ones
    over the ranks that hold the pieces and over the copies of those, whole ones over their copies. They travel in
    buckets, asynchronously: while one is orthogonalized, the pieces of the next arrive and the results of the one
    before return, and so they do while the caller works on what it was given.

    All ranks must call it with the same parameters in the same order and dtypes, and run it to its end. Parameters
    without a gradient may be left out, on all ranks or on none. Scratch is about four buckets, besides the results of
    a stack that is under way.

    Args:
        layouts: How each parameter lies over the ranks.
        directions: What to orthogonalize: this rank's part of each, of shape `layout.local_shape`. Not changed.
        fn: Called with contiguous batches `[B, out, in]` of whole matrices, in the directions' dtype. It must not
            change a batch, which may share memory with a direction.
        dtype: Type of the results, in which they travel.
        bucket_bytes: Bytes of this rank's pieces that travel together; a bucket has at least one matrix for each rank
            that works on it. None: 32 MiB on CPU, 256 MiB elsewhere.

    Yields:
        Lists of `(index, result)`, each index once, not in order; results have `dtype` and the local shape, and may be
        views of one buffer. A parameter of which this rank holds nothing gets an empty tensor.

    Raises:
        ValueError: If a direction does not have its layout's local shape, or `fn` changes the shape.
    """
    directions = [direction.detach() for direction in directions]
    _check(layouts, directions)
    empty = [index for index, layout in enumerate(layouts) if not layout.count]
    if empty:
        yield [(index, directions[index].to(dtype)) for index in empty]
    if len(empty) == len(layouts):
        return
    limit = bucket_bytes or default_bucket_bytes(directions[0].device)
    kinds = tuple((direction.dtype, direction.device) for direction in directions)
    itemsize = max(direction.dtype.itemsize for direction in directions)
    parts = _pipeline(plan(tuple(layouts), kinds, itemsize, limit), directions, fn, dtype)
    yield from _joined(layouts, parts)


def _check(layouts: Sequence[Layout], directions: Sequence[Tensor]) -> None:
    for index, (layout, direction) in enumerate(zip(layouts, directions, strict=True)):
        if tuple(direction.shape) != layout.local_shape:
            raise ValueError(
                f"directions[{index}] must have the shape of this rank's part of the parameter, "
                f"{list(layout.local_shape)}; found {list(direction.shape)}. Pass the local tensor of a DTensor."
            )


def _pipeline(
    buckets: Sequence[Bucket], directions: Sequence[Tensor], fn: Orthogonalizer, dtype: torch.dtype
) -> Iterator[list[Piece]]:
    """Keep four buckets under way: k + 1 comes in, k is worked on, k - 1 goes back and on to copies, k - 2 is done.

    All ranks start the same collectives in this order, however long each of them works.
    """
    under_way: dict[int, Transfer] = {}
    for tick in range(len(buckets) + 3):
        if tick < len(buckets):
            kind = GatheredTransfer if buckets[tick].layout.gather else Transfer
            under_way[tick] = kind(buckets[tick], directions, fn, dtype)
            under_way[tick].collect()
        if tick - 1 in under_way:
            under_way[tick - 1].orthogonalize()
        if tick - 2 in under_way:
            under_way[tick - 2].exchange()
        if tick - 3 in under_way:
            yield list(under_way.pop(tick - 3).results())


def _joined(layouts: Sequence[Layout], parts: Iterable[list[Piece]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Put each parameter's pieces together, and give it out when the last one is here."""
    found: dict[int, list[Piece]] = defaultdict(list)
    for pieces in parts:
        done = []
        for run, piece in pieces:
            found[run.param].append((run, piece))
            if sum(each.stop - each.start for each, _ in found[run.param]) == layouts[run.param].count:
                ordered = [part for _, part in sorted(found.pop(run.param), key=lambda item: item[0].start)]
                whole = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
                done.append((run.param, whole.reshape(layouts[run.param].local_shape)))
        if done:
            yield done


def reduce_sums(layouts: Sequence[Layout], sums: Sequence[Tensor]) -> list[Tensor]:
    """Add up, for each matrix, what the ranks that hold its pieces have summed over theirs.

    One all-reduce a group, for all parameters together; none where no matrix is cut. All ranks must pass the same
    parameters in the same order.

    Args:
        layouts: The parameters' layouts.
        sums: For each parameter, sums over the local pieces, float64 `[layout.count, k]`, on the parameter's device.

    Returns:
        The sums over whole matrices, in the same shapes, the same on all ranks that share a matrix.

    Raises:
        ValueError: If a tensor does not have a row for each local matrix.
    """
    totals = list(sums)
    members: dict[ProcessGroup, list[int]] = {}
    for index, (layout, total) in enumerate(zip(layouts, totals, strict=True)):
        if total.ndim != 2 or len(total) != layout.count:
            raise ValueError(
                f"sums[{index}] must have shape [{layout.count}, k], a row for each matrix that this rank holds; "
                f"found {list(total.shape)}."
            )
        for group in layout.sum_groups:
            members.setdefault(group, []).append(index)
    for group, indices in members.items():
        flat = torch.cat([totals[index].flatten() for index in indices])
        dist.all_reduce(flat, group=group)
        parts = flat.split([totals[index].numel() for index in indices])
        for index, part in zip(indices, parts, strict=True):
            totals[index] = part.view_as(totals[index])
    return totals


class Traffic(NamedTuple):
    """Bytes that this rank sends to others in a step.

    Attributes:
        pieces: Pieces of directions, to the ranks that put the matrices together (all-to-all).
        results: Pieces of orthogonalized matrices, back (all-to-all).
        copies: Results for the ranks that hold the same (all-gather, with its padding).
        gathered: Whole tensors of the layouts that only DTensor can put together (all-gather, without padding).
    """

    pieces: int = 0
    results: int = 0
    copies: int = 0
    gathered: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def communication_bytes(
    layouts: Sequence[Layout],
    direction_dtype: torch.dtype,
    result_dtype: torch.dtype,
    bucket_bytes: int | None = None,
    device: torch.device | str = "cpu",
) -> Traffic:
    """Predict what `orthogonalize_sharded` makes this rank send in a step; `reduce_sums` adds some bytes a matrix.

    An all-gather sends a rank's part to each of the others, as counted here, or passes it around a ring; the volume
    is the same.

    Args:
        layouts: The parameters' layouts.
        direction_dtype: Type of the directions.
        result_dtype: Type of the results.
        bucket_bytes: As given to `orthogonalize_sharded`.
        device: Where the parameters are; decides on the default of `bucket_bytes`.
    """
    limit = bucket_bytes or default_bucket_bytes(device)
    pieces = results = copies = gathered = 0
    for bucket in plan(tuple(layouts), (direction_dtype,) * len(layouts), direction_dtype.itemsize, limit):
        layout, others = bucket.layout, range(bucket.splits)
        if layout.gather:
            whole, local = math.prod(layout.shape), math.prod(layout.local_shape)
            gathered += (whole - local) * direction_dtype.itemsize
            continue
        me, copy = layout.split_rank, layout.copy_rank
        pieces += sum(bucket.numel(copy, s, me) for s in others if s != me) * direction_dtype.itemsize
        results += sum(bucket.numel(copy, me, s) for s in others if s != me) * result_dtype.itemsize
        longest = max(bucket.share(c) for c in range(layout.copies))
        copies += longest * (layout.copies - 1) * result_dtype.itemsize
    return Traffic(pieces, results, copies, gathered)


__all__ = [
    "Layout",
    "Traffic",
    "communication_bytes",
    "find_copies",
    "layout_of",
    "orthogonalize_sharded",
    "reduce_sums",
]
