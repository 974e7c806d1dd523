"""Rows on their way between ranks: what of expert parallelism communicates.

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
from lightning_mue.moe.parallel.mesh import REMARKS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Splits(NamedTuple):
    """Who sends how much to whom.

    Attributes:
        send: Rows for each rank, P numbers.
        receive: Rows from each rank, P numbers.
        counts_Pe: int64 [P, e], rows from each rank for each expert of this one.
        remarks: What each rank has sent along, a list of numbers each.
    """

    send: list[int]
    receive: list[int]
    counts_Pe: Tensor
    remarks: list[list[float]]


def exchange_counts(counts_E: Tensor, remarks: Tensor | None, group: ProcessGroup) -> Splits:
    """Tell every rank how many rows its experts get: one small all-to-all, and the one host synchronization.

    Args:
        counts_E: This rank's assignments by expert, int [E].
        remarks: Numbers that every rank gets to see besides, [n].
        group: The ranks, in the order of their experts.
    """
    ranks = dist.get_world_size(group)
    counts_Pe = counts_E.double().view(ranks, -1)  # float64 holds whole numbers exactly up to 2^53
    said_Pn = counts_Pe[:, :0] if remarks is None else remarks.double().expand(ranks, -1)
    message = torch.cat([counts_Pe, said_Pn], 1)
    answer = torch.empty_like(message)
    dist.all_to_all_single(answer, message, group=group)
    received_Pe, heard = answer.split([counts_Pe.shape[1], said_Pn.shape[1]], 1)
    rows = torch.cat([counts_Pe.sum(1, keepdim=True), received_Pe.sum(1, keepdim=True), heard], 1).tolist()
    send, receive = [int(row[0]) for row in rows], [int(row[1]) for row in rows]
    return Splits(send, receive, received_Pe.long(), [row[2:] for row in rows])


class Flight:
    """An all-to-all of several tensors, there and, in the backward pass, back: started, and waited for later.

    What is computed between `start` and `land` runs while the rows travel. Autograd takes nodes in the reverse order of
    their making, so in the backward pass the gradients travel while the gradients of just that are computed.

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
        """Send rows `[sum(send), ...]` off, and return them for `land`."""
        started: tuple[Tensor, ...] = _Start.apply(self, *rows)
        return started

    def land(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """Wait for what the other ranks have sent, `[sum(receive), ...]`, given what `start` has returned."""
        landed: tuple[Tensor, ...] = _Land.apply(self, *rows)
        return landed

    def launch(self, rows: Sequence[Tensor], send: list[int], receive: list[int]) -> tuple[Tensor, ...]:
        """Start the exchange; what is returned holds nothing before `arrive`."""
        # Kept: a tensor must live until it has been sent.
        self._leaving = tuple(tensor.contiguous() for tensor in rows)
        self._arriving = tuple(t.new_empty(sum(receive), *t.shape[1:]) for t in self._leaving)
        for target, source in zip(self._arriving, self._leaving, strict=True):
            work = dist.all_to_all_single(target, source, receive, send, group=self.group, async_op=True)
            self._works.append(work)
        return self._arriving

    def arrive(self) -> tuple[Tensor, ...]:
        """Wait for the exchange."""
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
    """The tokens in the order of a plan's rows, [S, d]. The gradient is summed without atomics, in a fixed order."""
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
        saved = ctx.saved_tensors  # once: activation checkpointing gives them out a single time
        grad_Td = combine_rows(grad_Sd.contiguous(), DispatchPlan(*saved), backend=ctx.backend)
        return (grad_Td, *[None] * (1 + len(saved)))


class Slice(NamedTuple):
    """Which of the tokens that all ranks hold are this rank's.

    Attributes:
        total: T.
        size: c, the most that a rank has.
        start: The first of this rank's tokens.
        stop: The one after its last; ranks at the end may have fewer than c, or none.
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
    """Cut this rank's tokens out of tensors [T, ...] that all ranks hold alike.

    The gradient is gathered: afterwards every rank has that of all tokens, as if it had done all the work itself.
    """
    taken: tuple[Tensor, ...] = _TakeSlice.apply(part, *whole)
    return taken


def join_slices(part: Slice, y_cd: Tensor) -> Tensor:
    """Put the ranks' slices together, [T, d] on every rank.

    All ranks go on with the same tensor and so hold the same gradient of it: each takes its slice of that, and nothing is
    summed.
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
    padded = F.pad(rows, padding).contiguous()  # the collective wants equal parts
    joined = padded.new_empty(part.size * dist.get_world_size(part.group), *rows.shape[1:])
    # torch 2.13 has a new name for all_gather_into_tensor, and warns of the old one.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(joined, padded, group=part.group)
    return joined[: part.total]


class Traffic(NamedTuple):
    """Bytes that this rank sends to others in one layer's training step.

    Attributes:
        rows: Tokens to experts and outputs back, and the gradients of both.
        gates: One number a row to the experts, its gradient back.
        counts: Assignments by expert.
        slices: Replicated tokens: outputs to all ranks, and gradients of the tokens and gates.
    """

    rows: int
    gates: int
    counts: int
    slices: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def communication_bytes(
    sent: int,
    received: int,
    *,
    width: int,
    n_experts: int,
    ranks: int,
    dtype: torch.dtype,
    replicated: tuple[int, int] | None = None,
) -> Traffic:
    """Predict what `ExpertParallel` makes a rank send in a forward and a backward pass of one layer.

    A row goes out and its output comes back, and in the backward pass so do their gradients: ``2 (sent + received) d``
    numbers, where balanced routing has ``sent = received = T K (P - 1) / P``.

    Args:
        sent: Rows of this rank's tokens whose experts are elsewhere.
        received: Rows of others' tokens for this rank's experts.
        width: d.
        n_experts: E.
        ranks: P.
        dtype: In which the experts compute (x's, or autocast's), and x is.
        replicated: ``(T, K)`` if all ranks hold the same T tokens; None if each has its own.
    """
    gate_bytes = torch.promote_types(dtype, torch.float32).itemsize
    remarks = 0 if replicated is None else REMARKS
    slices = 0
    if replicated is not None:
        tokens, top_k = replicated
        slices = -(-tokens // ranks) * (ranks - 1) * (2 * width * dtype.itemsize + top_k * gate_bytes)
    return Traffic(
        rows=2 * (sent + received) * width * dtype.itemsize,
        gates=(sent + received) * gate_bytes,
        counts=8 * (ranks - 1) * (n_experts // ranks + remarks),
        slices=slices,
    )
