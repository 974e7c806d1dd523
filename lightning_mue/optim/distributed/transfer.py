"""Sends one bucket of matrices to the ranks that orthogonalize it, and the results back.

Shape legend:
    B  matrices in a batch            E  matrices (experts) of one parameter on this rank
    out, in  rows and columns of a whole matrix;  o, i  of this rank's piece
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.optim.distributed.assignment import Assignment, Bucket, MatrixRange
from lightning_mue.optim.distributed.layout import by_expert

#: Orthogonalizes a batch `[B, out, in]` without changing it; the results may have any floating dtype.
Orthogonalizer = Callable[[Tensor], Tensor]
#: Which matrices, and this rank's part of them, `[B, o, i]`.
Piece = tuple[MatrixRange, Tensor]


def _apply(fn: Orthogonalizer, batch_Boi: Tensor, dtype: torch.dtype) -> Tensor:
    result_Boi = fn(batch_Boi)
    if result_Boi.shape != batch_Boi.shape:
        found, expected = f"a result of shape {list(result_Boi.shape)}", f"that of the batch, {list(batch_Boi.shape)}"
        raise value_error("fn", found=found, expected=expected)
    return result_Boi.to(dtype)


class Transfer:
    """The communication of one bucket, in four stages that are called in order.

    A stage waits for the collective that the previous one has started, so other buckets' stages may come in between.
    """

    def __init__(self, bucket: Bucket, directions: Sequence[Tensor], fn: Orthogonalizer, dtype: torch.dtype) -> None:
        self.bucket, self.directions, self.fn, self.dtype = bucket, directions, fn, dtype
        self.layout = bucket.layout
        self.me, self.replica = self.layout.split_rank, self.layout.replica_rank
        self.ranks = range(self.layout.splits)
        self.mine = bucket.assigned(self.replica, self.me)
        self.of_all = [each for owner in self.ranks for each in bucket.assigned(self.replica, owner)]
        #: How many numbers this rank holds of each owner's matrices, and each rank of this one's.
        self.to_owners = [bucket.numel(self.replica, owner, self.me) for owner in self.ranks]
        self.from_ranks = [bucket.numel(self.replica, self.me, rank) for rank in self.ranks]
        self.longest = bucket.longest
        self.work: Any = None  # the collective under way
        self.sent: Tensor | None = None  # its input, which must live until it is done
        self.arrived = torch.empty(0)  # pieces of this rank's matrices
        self.results_here = torch.empty(0)  # this rank's pieces of results
        self.done: list[Tensor] = []

    def collect(self) -> None:
        """Send the pieces to the ranks that orthogonalize the matrices."""
        if self.layout.split_group is None or not self.of_all:
            return
        sent = torch.cat([self._held(each).flatten() for each in self.of_all])
        self.arrived = sent.new_empty(sum(self.from_ranks))
        self._all_to_all(sent, self.arrived, self.to_owners, self.from_ranks)

    def orthogonalize(self) -> None:
        """Orthogonalize the matrices assigned to this rank, and send the results' pieces back."""
        self._wait()
        self.done = [_apply(self.fn, whole, self.dtype) for whole in self._whole()]
        if self.layout.split_group is None and self.layout.replica_group is None:
            return
        # As long as the longest replica's results: the all-gather needs equal lengths.
        like = next(self.directions[a.ranges[0].param] for of_one in self.bucket.assignments for a in of_one)
        self.results_here = like.new_empty(self.longest, dtype=self.dtype)
        results = self.results_here[: sum(self.to_owners)]
        if self.layout.split_group is not None and self.of_all:
            pieces = [piece for rank in self.ranks for piece in self._pieces_for(rank)]
            self._all_to_all(torch.cat(pieces) if pieces else results[:0], results, self.from_ranks, self.to_owners)
        elif self.done:
            torch.cat([done.flatten() for done in self.done], out=results)
        self.arrived, self.done = results[:0], []

    def exchange(self) -> None:
        """Gather the results of all replicas."""
        if self.layout.replica_group is None:
            return
        self._wait()
        mine, self.results_here = self.results_here, self.results_here.new_empty(self.longest * self.layout.replicas)
        self.sent = mine
        # torch 2.13 has a new name for all_gather_into_tensor, and warns of the old one.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self.work = gather(self.results_here, mine, group=self.layout.replica_group, async_op=True)

    def results(self) -> Iterator[Piece]:
        """Wait for what is under way, and return this rank's pieces."""
        self._wait()
        if self.layout.split_group is None and self.layout.replica_group is None:
            for each, done in zip(self.mine, self.done, strict=True):
                yield from _by_range(each, done)
            return
        for replica in range(self.layout.replicas):
            start = replica * self.longest
            for owner in self.ranks:
                for each in self.bucket.assigned(replica, owner):
                    shape = each.piece(self.me)
                    yield from _by_range(each, self.results_here[start : start + math.prod(shape)].view(shape))
                    start += math.prod(shape)

    def _all_to_all(self, sent: Tensor, received: Tensor, to: list[int], come_from: list[int]) -> None:
        self.sent = sent
        self.work = dist.all_to_all_single(received, sent, come_from, to, group=self.layout.split_group, async_op=True)

    def _wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        self.work = self.sent = None

    def _held(self, assignment: Assignment) -> Tensor:
        """Return this rank's pieces, `[B, o, i]`; a view where they are one range of one parameter."""
        shape = assignment.piece(self.me)[1:]
        stacks = (self.directions[each.param] for each in assignment.ranges)
        parts = [
            (stack if stack.ndim == 3 else stack.reshape(1, *shape))[each.start : each.stop]
            for each, stack in zip(assignment.ranges, stacks, strict=True)
        ]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

    def _whole(self) -> Iterator[Tensor]:
        """Return the matrices assigned to this rank, `[B, out, in]` each."""
        if self.layout.split_group is None:
            yield from map(self._held, self.mine)
            return
        starts = [sum(self.from_ranks[:rank]) for rank in self.ranks]
        for each in self.mine:
            pieces = []
            for rank in self.ranks:
                shape = each.piece(rank)
                pieces.append(self.arrived[starts[rank] : starts[rank] + math.prod(shape)].view(shape))
                starts[rank] += math.prod(shape)
            assert each.shape.split_dim is not None
            yield torch.cat(pieces, dim=1 + each.shape.split_dim)

    def _pieces_for(self, rank: int) -> list[Tensor]:
        """Return the pieces of the results that go to a rank, flat, one tensor for each assignment."""
        pieces = []
        for each, done in zip(self.mine, self.done, strict=True):
            assert each.shape.split_dim is not None
            start = sum(each.shape.split_sizes[:rank])
            pieces.append(done.narrow(1 + each.shape.split_dim, start, each.shape.split_sizes[rank]).flatten())
        return pieces


def _by_range(assignment: Assignment, pieces_Boi: Tensor) -> Iterator[Piece]:
    parts = pieces_Boi.split([each.stop - each.start for each in assignment.ranges])
    yield from zip(assignment.ranges, parts, strict=True)


class GatheredTransfer(Transfer):
    """A parameter whose matrices only DTensor can gather, as with FSDP and tensor parallelism: on every rank."""

    def collect(self) -> None:
        """Do nothing: DTensor's collectives are not asynchronous."""

    def orthogonalize(self) -> None:
        """Gather the matrices, orthogonalize all of them on this rank, and keep this rank's pieces."""
        from torch.distributed.tensor import DTensor, Replicate

        assert self.layout.gather is not None
        mesh, placements = self.layout.gather
        whole_shape = torch.Size(self.layout.shape)
        stride = torch.empty(whole_shape, device="meta").stride()
        # Stacks stay sharded by expert: only what shards a matrix is gathered.
        gathered = by_expert(placements) if len(whole_shape) == 3 else [Replicate()] * len(placements)

        def moved(local: Tensor, here: Sequence[Any], there: Sequence[Any]) -> Tensor:
            whole = DTensor.from_local(local, mesh, here, run_check=False, shape=whole_shape, stride=stride)
            return whole.redistribute(placements=there).to_local()

        (each,) = (each for assignment in self.mine for each in assignment.ranges)
        whole = moved(self.directions[each.param].contiguous(), placements, gathered)
        batch_Eoi = whole.reshape(self.layout.count, *self.layout.matrix)
        done = _apply(self.fn, batch_Eoi.contiguous(), self.dtype)
        self.done = [moved(done.reshape(whole.shape), gathered, placements).reshape(self.layout.count, -1)]
