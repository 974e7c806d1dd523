"""Orthogonalizes matrices that are sharded or replicated over ranks: gathered whole, each on one rank only.

Newton-Schulz needs whole matrices: orthogonalized pieces are not the pieces of the orthogonalized matrix. So the pieces
of a matrix are sent to one rank, the results' pieces are sent back, and ranks that hold replicas share the work.

Shape legend: as in `transfer.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.optim.distributed.assignment import Bucket, assign_matrices, default_bucket_bytes
from lightning_mue.optim.distributed.layout import Layout
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
    """Orthogonalize the whole matrices that the directions are pieces of, and return this rank's pieces.

    The result is the same function of the whole directions in every layout. Matrices are assigned to ranks by cost:
    sharded ones to the ranks that hold the pieces and to the replicas of those, whole ones to their replicas. They are
    communicated in buckets, asynchronously, also while the caller uses results.

    All ranks must call it with the same parameters in the same order and dtypes, and exhaust the iterator. Parameters
    without a gradient may be left out, on all ranks or on none. Scratch is about four buckets, besides the results of
    a stack that is not complete yet.

    Args:
        layouts: How each parameter lies over the ranks.
        directions: What to orthogonalize: this rank's part of each, of shape `layout.local_shape`. Not changed.
        fn: Called with contiguous batches `[B, out, in]` of whole matrices, in the directions' dtype. It must not
            change a batch, which may share memory with a direction.
        dtype: Type of the results, in which they are sent.
        bucket_bytes: Bytes of this rank's pieces that are sent together; a bucket has at least one matrix for each rank
            that works on it. None: 32 MiB on CPU, 256 MiB elsewhere.

    Yields:
        Lists of `(index, result)`, each index once, not in order; results have `dtype` and the local shape, and may be
        views of one buffer. A parameter of which this rank holds nothing gets an empty tensor.

    Raises:
        ValueError: If a direction does not have its layout's local shape, or `fn` changes the shape.
    """
    directions = [direction.detach() for direction in directions]
    for index, (layout, direction) in enumerate(zip(layouts, directions, strict=True)):
        if tuple(direction.shape) != layout.local_shape:
            expected = f"that of this rank's part of the parameter, {list(layout.local_shape)}"
            do = "Pass the local tensor of a DTensor."
            raise value_error(f"directions[{index}]", found=f"shape {list(direction.shape)}", expected=expected, do=do)
    empty = [index for index, layout in enumerate(layouts) if not layout.count]
    if empty:
        yield [(index, directions[index].to(dtype)) for index in empty]
    if len(empty) == len(layouts):
        return
    limit = bucket_bytes or default_bucket_bytes(directions[0].device)
    buffers = tuple((direction.dtype, direction.device) for direction in directions)
    itemsize = max(direction.dtype.itemsize for direction in directions)
    parts = _pipeline(assign_matrices(tuple(layouts), buffers, itemsize, limit), directions, fn, dtype)
    yield from _joined(layouts, parts)


def _pipeline(
    buckets: Sequence[Bucket], directions: Sequence[Tensor], fn: Orthogonalizer, dtype: torch.dtype
) -> Iterator[list[Piece]]:
    """Keep four buckets under way: k + 1 arrives, k is orthogonalized, k - 1 goes back and to replicas, k - 2 is done.

    All ranks start the same collectives in this order, regardless of how long each of them works.
    """
    under_way: dict[int, Transfer] = {}
    for tick in range(len(buckets) + 3):
        if tick < len(buckets):
            transfer = GatheredTransfer if buckets[tick].layout.gather else Transfer
            under_way[tick] = transfer(buckets[tick], directions, fn, dtype)
            under_way[tick].collect()
        if tick - 1 in under_way:
            under_way[tick - 1].orthogonalize()
        if tick - 2 in under_way:
            under_way[tick - 2].exchange()
        if tick - 3 in under_way:
            yield list(under_way.pop(tick - 3).results())


def _joined(layouts: Sequence[Layout], parts: Iterable[list[Piece]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Join each parameter's pieces, and return it once the last one is here."""
    found: dict[int, list[Piece]] = defaultdict(list)
    for pieces in parts:
        done = []
        for which, piece in pieces:
            param = which.param
            found[param].append((which, piece))
            if sum(each.stop - each.start for each, _ in found[param]) == layouts[param].count:
                ordered = [part for _, part in sorted(found.pop(param), key=lambda item: item[0].start)]
                whole = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
                done.append((param, whole.reshape(layouts[param].local_shape)))
        if done:
            yield done


def reduce_sums(layouts: Sequence[Layout], sums: Sequence[Tensor]) -> list[Tensor]:
    """Add, for each matrix, the sums of the ranks that hold its pieces; each tensor is `[layout.count, ...]`.

    One all-reduce for each group, for all parameters together; none where no matrix is sharded. All ranks must pass the
    same parameters in the same order.

    Raises:
        ValueError: If a tensor does not have a row for each local matrix.
    """
    totals = list(sums)
    members: dict[ProcessGroup, list[int]] = {}
    for index, (layout, total) in enumerate(zip(layouts, totals, strict=True)):
        if len(total) != layout.count:
            expected = f"[{layout.count}, ...], a row for each matrix that this rank holds"
            raise value_error(f"sums[{index}]", found=f"shape {list(total.shape)}", expected=expected)
        for group in layout.sum_groups:
            members.setdefault(group, []).append(index)
    for group, indices in members.items():
        flat = torch.cat([totals[index].flatten() for index in indices])
        dist.all_reduce(flat, group=group)
        parts = flat.split([totals[index].numel() for index in indices])
        for index, part in zip(indices, parts, strict=True):
            totals[index] = part.view_as(totals[index])
    return totals
