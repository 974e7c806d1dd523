"""One bucket of matrices on its way to the ranks that orthogonalize it, and back.

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

from lightning_mue.optim.distributed.assignment import Batch, Bucket, Run
from lightning_mue.optim.distributed.layout import by_expert

#: Orthogonalizes a batch `[B, out, in]` without changing it; the results may have any floating dtype.
Orthogonalizer = Callable[[Tensor], Tensor]
#: Which matrices, and this rank's part of them, `[B, o, i]`.
Piece = tuple[Run, Tensor]


def _apply(fn: Orthogonalizer, batch_Boi: Tensor, dtype: torch.dtype) -> Tensor:
    result_Boi = fn(batch_Boi)
    if result_Boi.shape != batch_Boi.shape:
        raise ValueError(
            f"fn was given a batch of shape {list(batch_Boi.shape)} and returned {list(result_Boi.shape)}; expected "
            "the same shape."
        )
    return result_Boi.to(dtype)


class Transfer:
    """The way of one bucket, in four stages that are called in order.

    A collective that a stage starts is waited for in the next one, so other buckets' stages may come in between.
    """

    def __init__(self, bucket: Bucket, directions: Sequence[Tensor], fn: Orthogonalizer, dtype: torch.dtype) -> None:
        self.bucket, self.directions, self.fn, self.dtype = bucket, directions, fn, dtype
        self.layout = bucket.layout
        self.me, self.copy, self.ranks = self.layout.split_rank, self.layout.copy_rank, range(bucket.splits)
        self.hand = bucket.hand(self.copy, self.me)
        self.hands = [batch for owner in self.ranks for batch in bucket.hand(self.copy, owner)]
        #: How many numbers this rank's pieces of each owner's matrices have, and each rank's pieces of this one's.
        self.ours = [bucket.numel(self.copy, owner, self.me) for owner in self.ranks]
        self.theirs = [bucket.numel(self.copy, self.me, rank) for rank in self.ranks]
        self.longest = max(bucket.share(copy) for copy in range(self.layout.copies))
        self.work: Any = None  # the collective under way
        self.kept: Tensor | None = None  # what it reads, which must live as long
        self.arrived = self.share = torch.empty(0)  # pieces of this rank's matrices; this rank's pieces of the results
        self.done: list[Tensor] = []

    def collect(self) -> None:
        """Send the pieces to those who orthogonalize the matrices."""
        if self.layout.split_group is None or not self.hands:
            return
        sent = torch.cat([self._held(batch).flatten() for batch in self.hands])
        self.arrived = sent.new_empty(sum(self.theirs))
        self._swap(sent, self.arrived, self.ours, self.theirs)

    def orthogonalize(self) -> None:
        """Orthogonalize this rank's hand, and send the results' pieces back."""
        self._wait()
        self.done = [_apply(self.fn, whole, self.dtype) for whole in self._whole()]
        if self.layout.split_group is None and self.layout.copy_group is None:
            return
        # Room for the longest copy's share: the exchange among copies wants equal lengths.
        like = next(self.directions[batch.runs[0].param] for hand in self.bucket.hands for batch in hand)
        self.share = like.new_empty(self.longest, dtype=self.dtype)
        share = self.share[: sum(self.ours)]
        if self.layout.split_group is not None and self.hands:
            pieces = [piece for rank in self.ranks for piece in self._cut(rank)]
            self._swap(torch.cat(pieces) if pieces else share[:0], share, self.theirs, self.ours)
        elif self.done:
            torch.cat([done.flatten() for done in self.done], out=share)
        self.arrived, self.done = share[:0], []

    def exchange(self) -> None:
        """Give the copies of this rank its share of the results."""
        if self.layout.copy_group is None:
            return
        self._wait()
        mine, self.share = self.share, self.share.new_empty(self.longest * self.layout.copies)
        self.kept = mine
        # torch 2.13 has a new name for all_gather_into_tensor, and warns of the old one.
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self.work = gather(self.share, mine, group=self.layout.copy_group, async_op=True)

    def results(self) -> Iterator[Piece]:
        """Wait for what is under way, and give out this rank's pieces."""
        self._wait()
        if self.layout.split_group is None and self.layout.copy_group is None:
            for batch, done in zip(self.hand, self.done, strict=True):
                yield from _by_run(batch, done)
            return
        for copy in range(self.layout.copies):
            start = copy * self.longest
            for owner in self.ranks:
                for batch in self.bucket.hand(copy, owner):
                    shape = batch.piece(self.me)
                    yield from _by_run(batch, self.share[start : start + math.prod(shape)].view(shape))
                    start += math.prod(shape)

    def _swap(self, sent: Tensor, received: Tensor, to: list[int], come_from: list[int]) -> None:
        self.kept = sent
        self.work = dist.all_to_all_single(received, sent, come_from, to, group=self.layout.split_group, async_op=True)

    def _wait(self) -> None:
        if self.work is not None:
            self.work.wait()
        self.work = self.kept = None

    def _held(self, batch: Batch) -> Tensor:
        """This rank's pieces of a batch, `[B, o, i]`; a view where they are one run of one parameter."""
        shape = batch.piece(self.me)[1:]
        stacks = (self.directions[run.param] for run in batch.runs)
        parts = [
            (stack if stack.ndim == 3 else stack.reshape(1, *shape))[run.start : run.stop]
            for run, stack in zip(batch.runs, stacks, strict=True)
        ]
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)

    def _whole(self) -> Iterator[Tensor]:
        """The batches of this rank's hand, `[B, out, in]`."""
        if self.layout.split_group is None:
            yield from map(self._held, self.hand)
            return
        starts = [sum(self.theirs[:rank]) for rank in self.ranks]
        for batch in self.hand:
            pieces = []
            for rank in self.ranks:
                shape = batch.piece(rank)
                pieces.append(self.arrived[starts[rank] : starts[rank] + math.prod(shape)].view(shape))
                starts[rank] += math.prod(shape)
            assert batch.kind.split_dim is not None
            yield torch.cat(pieces, dim=1 + batch.kind.split_dim)

    def _cut(self, rank: int) -> list[Tensor]:
        """The pieces of the results that go to a rank, flat, a batch each."""
        pieces = []
        for batch, done in zip(self.hand, self.done, strict=True):
            assert batch.kind.split_dim is not None
            start = sum(batch.kind.split_sizes[:rank])
            pieces.append(done.narrow(1 + batch.kind.split_dim, start, batch.kind.split_sizes[rank]).flatten())
        return pieces


def _by_run(batch: Batch, pieces_Boi: Tensor) -> Iterator[Piece]:
    parts = pieces_Boi.split([run.stop - run.start for run in batch.runs])
    yield from zip(batch.runs, parts, strict=True)


class GatheredTransfer(Transfer):
    """A parameter whose matrices only DTensor can put together, as with FSDP and tensor parallelism: on every rank."""

    def collect(self) -> None:
        """Nothing can be sent ahead: DTensor waits for its collectives."""

    def orthogonalize(self) -> None:
        """Put the matrices together, orthogonalize all of them here, and cut this rank's pieces out again."""
        from torch.distributed.tensor import DTensor, Replicate

        assert self.layout.gather is not None
        mesh, placements = self.layout.gather
        whole_shape = torch.Size(self.layout.shape)
        stride = torch.empty(whole_shape, device="meta").stride()
        # Stacks stay cut by expert: only what cuts a matrix is undone.
        uncut = by_expert(placements) if len(whole_shape) == 3 else [Replicate()] * len(placements)

        def moved(local: Tensor, here: Sequence[Any], there: Sequence[Any]) -> Tensor:
            whole = DTensor.from_local(local, mesh, here, run_check=False, shape=whole_shape, stride=stride)
            return whole.redistribute(placements=there).to_local()

        (run,) = (run for batch in self.hand for run in batch.runs)
        whole = moved(self.directions[run.param].contiguous(), placements, uncut)
        batch_Eoi = whole.reshape(self.layout.count, *self.layout.matrix)
        done = _apply(self.fn, batch_Eoi.contiguous(), self.dtype)
        self.done = [moved(done.reshape(whole.shape), uncut, placements)]

    def results(self) -> Iterator[Piece]:
        """Give out this rank's pieces."""
        (run,) = (run for batch in self.hand for run in batch.runs)
        yield run, self.done[0]
