"""The communication of expert parallelism: counts and rows between ranks, slices of replicated tokens.

Shape legend: T tokens, K experts per token, S assignments, d width, P ranks of the expert mesh, e = E / P experts of one
rank, R rows that a rank receives, c = ceil(T / P) tokens of one rank's slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lightning_mue.kernels.combine.op import combine_rows
from lightning_mue.kernels.dispatch.op import DispatchPlan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ExchangeCounts(NamedTuple):
    """How many rows each rank sends to this one and gets from it.

    Attributes:
        send: Rows for each rank, P numbers.
        receive: Rows from each rank, P numbers.
        counts_Pe: int64 [P, e], rows from each rank for each expert of this one.
        attached: The numbers that each rank has attached, one list per rank.
    """

    send: list[int]
    receive: list[int]
    counts_Pe: Tensor
    attached: list[list[float]]


def exchange_counts(counts_E: Tensor, attached: Tensor | None, group: ProcessGroup) -> ExchangeCounts:
    """Tells every rank how many rows its experts get: one small all-to-all, and the only host synchronization.

    `attached` are further numbers for all ranks, [n]. The ranks of the group are in the order of their experts.
    """
    ranks = dist.get_world_size(group)
    counts_Pe = counts_E.double().view(ranks, -1)  # float64 holds whole numbers exactly up to 2^53
    attached_Pn = counts_Pe[:, :0] if attached is None else attached.double().expand(ranks, -1)
    message = torch.cat([counts_Pe, attached_Pn], 1)
    answer = torch.empty_like(message)
    dist.all_to_all_single(answer, message, group=group)
    received_Pe, received_Pn = answer.split([counts_Pe.shape[1], attached_Pn.shape[1]], 1)
    rows = torch.cat([counts_Pe.sum(1, keepdim=True), received_Pe.sum(1, keepdim=True), received_Pn], 1).tolist()
    send, receive = [int(row[0]) for row in rows], [int(row[1]) for row in rows]
    return ExchangeCounts(send, receive, received_Pe.long(), [row[2:] for row in rows])


class Flight:
    """An asynchronous all-to-all of several tensors; in the backward pass their gradients go the opposite way.

    Computation between `start` and `land` overlaps the communication. Autograd runs nodes in the reverse order of their
    creation, so the backward pass of that computation overlaps the communication of the gradients.

    Args:
        send: Rows for each rank.
        receive: Rows from each rank.
        group: The ranks.
    """

    def __init__(self, send: list[int], receive: list[int], group: ProcessGroup) -> None:
        self.send, self.receive, self.group = send, receive, group
        self._works: list[Any] = []
        self._arriving: tuple[Tensor, ...] = ()
        self._leaving: tuple[Tensor, ...] = ()

    def start(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Starts to send rows [sum(send), ...], and returns them for `land`."""
        started: tuple[Tensor, ...] = _Start.apply(self, *rows)
        return started

    def land(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Waits for the rows from the other ranks, [sum(receive), ...], given what `start` has returned."""
        landed: tuple[Tensor, ...] = _Land.apply(self, *rows)
        return landed

    def launch(self, rows: Sequence[Tensor], send: list[int], receive: list[int]) -> tuple[Tensor, ...]:
        """Starts the exchange; the returned tensors are filled by the time `arrive` returns."""
        # A reference is kept: a tensor must live until it has been sent.
        self._leaving = tuple(tensor.contiguous() for tensor in rows)
        self._arriving = tuple(t.new_empty(sum(receive), *t.shape[1:]) for t in self._leaving)
        for target, source in zip(self._arriving, self._leaving, strict=True):
            work = dist.all_to_all_single(target, source, receive, send, group=self.group, async_op=True)
            self._works.append(work)
        return self._arriving

    def arrive(self) -> tuple[Tensor, ...]:
        """Waits for the exchange."""
        for work in self._works:
            work.wait()
        arrived = self._arriving
        self._works, self._arriving, self._leaving = [], (), ()
        return arrived


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        flight.launch(rows, flight.send, flight.receive)
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.flight.arrive()
        return (None, *grads)


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flight: Flight, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.flight = flight
        return flight.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        flight = ctx.flight
        return (None, *flight.launch(grads, flight.receive, flight.send))


def gather_rows(x_Td: Tensor, plan: DispatchPlan, backend: str) -> Tensor:
    """Copies the tokens in the order of a plan's rows, [S, d]. The gradient is summed without atomics, in a fixed order."""
    rows: Tensor = _GatherRows.apply(x_Td, backend, *(getattr(plan, field.name) for field in fields(plan)))
    return rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_Td: Tensor, backend: str, *plan: Any) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(*plan)
        return x_Td.index_select(0, DispatchPlan(*plan).tokens)

    @staticmethod
    def backward(ctx: Any, grad_Sd: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing allows no second access
        grad_Td = combine_rows(grad_Sd.contiguous(), DispatchPlan(*saved), backend=ctx.backend)
        return (grad_Td, *[None] * (1 + len(saved)))


class Slice(NamedTuple):
    """This rank's slice of the tokens that all ranks hold.

    Attributes:
        total: T.
        size: c, the size of the largest slice.
        start: Index of the slice's first token.
        stop: Index after its last token; the last ranks may have fewer than c tokens, or none.
        group: The ranks.
    """

    total: int
    size: int
    start: int
    stop: int
    group: ProcessGroup

    @classmethod
    def of(cls, total: int, group: ProcessGroup) -> Slice:
        """This rank's slice of `total` tokens."""
        size = -(-total // dist.get_world_size(group))
        start = min(size * dist.get_rank(group), total)
        return cls(total, size, start, min(start + size, total), group)


def take_slice(part: Slice, *whole: Tensor) -> tuple[Tensor, ...]:
    """Takes this rank's tokens out of tensors [T, ...] that are equal on all ranks.

    The gradient is gathered, so that every rank has that of all tokens.
    """
    taken: tuple[Tensor, ...] = _TakeSlice.apply(part, *whole)
    return taken


def join_slices(part: Slice, y_cd: Tensor) -> Tensor:
    """Gathers the ranks' slices, [T, d] on every rank.

    All ranks use the same result and so have the same gradient of it: each takes its slice, and nothing is summed.
    """
    joined: Tensor = _JoinSlices.apply(part, y_cd)
    return joined


class _TakeSlice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Slice, *whole: Tensor) -> tuple[Tensor, ...]:
        ctx.part = part
        return tuple(tensor[part.start : part.stop] for tensor in whole)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *(_all_gather(ctx.part, grad) for grad in grads))


class _JoinSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Slice, y_cd: Tensor) -> Tensor:
        ctx.part = part
        return _all_gather(part, y_cd)

    @staticmethod
    def backward(ctx: Any, grad_Td: Tensor) -> tuple[None, Tensor]:
        return None, grad_Td[ctx.part.start : ctx.part.stop].contiguous()


def _all_gather(part: Slice, rows: Tensor) -> Tensor:
    padding = [0, 0] * (rows.ndim - 1) + [0, part.size - len(rows)]
    padded = F.pad(rows, padding).contiguous()  # the collective needs equal sizes
    joined = padded.new_empty(part.size * dist.get_world_size(part.group), *rows.shape[1:])
    # torch 2.13 has a new name for all_gather_into_tensor, and warns of the old one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(joined, padded, group=part.group)
    return joined[: part.total]
