"""Expert parallelism: every rank holds some of the experts, and tokens are sent to the ranks of their experts.

    route -> sort by expert -> counts -> rows and gates to the experts' ranks -> grouped_ffn -> rows back -> sum per token

Shape legend: T tokens, K experts per token, S assignments, d width, E experts, P ranks of the expert mesh, e = E / P, R rows
that a rank receives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_mue.checks import require_choice, require_number, require_type, require_types, value_error
from lightning_mue.kernels.combine.op import combine_rows
from lightning_mue.kernels.dispatch.op import DispatchPlan, count_by_expert, plan_dispatch
from lightning_mue.moe import autocast
from lightning_mue.moe.experts import Experts
from lightning_mue.moe.parallel.exchange import (
    ExchangeCounts,
    Flight,
    Slice,
    exchange_counts,
    gather_rows,
    join_slices,
    take_slice,
)
from lightning_mue.moe.parallel.mesh import check_experts, check_mesh, shard
from lightning_mue.moe.parallel.replicas import check_replicas, fingerprint
from lightning_mue.moe.router import RoutingInfo
from lightning_mue.sharded import cutting_dims, local

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

TOKENS = ("replicated", "split")
Module = TypeVar("Module", bound=nn.Module)


def parallelize_experts(module: Module, mesh: DeviceMesh, *, tokens: str = "replicated") -> Module:
    """Shards the experts of every MoE layer over the ranks of a mesh, in place.

    Each expert weight [E, ...] becomes a DTensor, ``Shard(0)`` over `mesh`: rank r keeps experts ``r E/P`` to
    ``(r+1) E/P``, and optimizer state for these only. All other parameters stay as they are. Call it before `fully_shard`
    and before the optimizer is made; in Lightning in ``configure_model``, under `ModelParallelStrategy`::

        def configure_model(self):
            parallelize_experts(self, self.device_mesh["tensor_parallel"])
            if self.device_mesh["data_parallel"].size() > 1:
                fully_shard(self.transformer, mesh=self.device_mesh["data_parallel"])

    Parameters may be real (all ranks must have drawn the same values, from one seed) or on the meta device. No
    communication takes place. A second call with the same mesh and mode changes nothing.

    Args:
        module: A model, an `MoELayer` or an `Experts`. A dense model is left as it is (the base of a parameterization may be
            dense).
        mesh: One dimension, of P ranks. With P = 1 nothing is communicated.
        tokens: "replicated": all ranks of the mesh have the same tokens, as in Lightning's tensor-parallel dimension. Each
            sends its slice of the tokens to the experts, and the outputs are gathered. All values and gradients are on
            every rank those of one process.
            "split": each rank has tokens of its own; the mesh is (part of) the data-parallel ranks. Gradients of the
            experts are divided by P, so that they are a mean over ranks, as data parallelism makes all other gradients.

    Returns:
        `module`.

    Raises:
        RuntimeError: torch.distributed is not initialized.
        TypeError: `mesh` is not a DeviceMesh.
        ValueError: The mesh has several dimensions or leaves this rank out, P does not divide E, the experts are sharded
            already, or `tokens` is unknown.
    """
    require_type("module", module, nn.Module, "a torch.nn.Module")
    require_choice("tokens", tokens, TOKENS)
    check_mesh(mesh)
    found = {name: each for name, each in module.named_modules() if isinstance(each, Experts)}
    parallel = ExpertParallel(mesh, tokens)
    for name, experts in found.items():
        if experts.parallel != parallel:
            check_experts(name or "experts", experts, mesh)
    for experts in found.values():
        if experts.parallel is None:
            shard(experts, mesh)
            experts.parallel = parallel
    return module


@dataclass(frozen=True)
class ExpertParallel:
    """The dispatcher of experts that are sharded over a mesh: `Experts.parallel`.

    Attributes:
        mesh: The ranks over which the experts are sharded, in one dimension.
        tokens: "replicated" or "split", see `parallelize_experts`.
    """

    mesh: DeviceMesh
    tokens: str

    @property
    def n_ranks(self) -> int:
        """P."""
        return self.mesh.size()

    def forward(
        self, experts: Experts, x_Td: Tensor, routing: RoutingInfo, overlap: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """Does what `Experts.forward` does, on the ranks that hold the experts. All ranks of the mesh must call it together.

        It keeps for the backward pass, per assignment, the received row (2d bytes in bfloat16), the pre-activations (4h if
        gated) and indices: K d numbers a token in place of d. Each row is sent and its output returned, and so are gradients.

        `x_Td` are this rank's tokens; T may differ between ranks if tokens are split, and may be zero.

        Raises:
            ValueError: For expert choice with replicated tokens.
            RuntimeError: If `tokens` is "replicated", but the ranks hold different tokens.
        """
        if self.tokens == "split":
            return self._exchange(experts, x_Td, routing, overlap)
        if routing.token_ids is not None:
            expected = "'token': experts choose among all tokens, but each rank computes a slice of them only"
            do = "Use tokens='split' in parallelize_experts, or choice='token'."
            raise value_error("choice", found="'expert' with tokens='replicated'", expected=expected, do=do)
        # Every rank routes all tokens, so that loads and auxiliary losses are those of all tokens.
        part = Slice.of(len(x_Td), self.mesh.get_group())
        x_cd, gates_cK = take_slice(part, x_Td, routing.gates)
        ids_cK = routing.expert_ids[part.start : part.stop]
        counts_E = count_by_expert(ids_cK, experts.n_experts)[0]
        mine = replace(routing, expert_ids=ids_cK, gates=gates_cK, counts=counts_E, assigned=None)
        extra: list[Tensor] = []
        y_cd = self._exchange(
            experts, x_cd, mine, None if overlap is None else lambda: extra.append(overlap()), (x_Td, routing.logits)
        )
        y_Td = join_slices(part, y_cd)
        return (y_Td + extra[0]).to(x_Td.dtype) if extra else y_Td

    def _exchange(
        self,
        experts: Experts,
        x_Td: Tensor,
        routing: RoutingInfo,
        overlap: Callable[[], Any] | None,
        replicas: tuple[Tensor, ...] = (),
    ) -> Tensor:
        group, dtype = self.mesh.get_group(), autocast.compute_dtype(x_Td) or x_Td.dtype
        plan = routing.plan(experts.backend)
        gates_S = routing.assignment_gates(plan).flatten()[plan.order]
        rows_Sd = gather_rows(x_Td.to(dtype), plan, experts.backend)
        counts = exchange_counts(plan.offsets.diff(), fingerprint(*replicas) if replicas else None, group)
        if replicas:
            check_replicas(counts.attached)

        rows, sent = len(rows_Sd), sum(counts.send)
        if sent < rows:  # padding rows come last, and are not sent
            rows_Sd, gates_S = rows_Sd[:sent], gates_S[:sent]
        there = Flight(counts.send, counts.receive, group)
        in_flight = there.start(rows_Sd, gates_S)
        extra = None if overlap is None else overlap()
        rows_Rd, gates_R = there.land(*in_flight)
        y_Rd = experts.compute(rows_Rd, gates_R[:, None], _local_plan(counts, experts.backend))
        back = Flight(counts.receive, counts.send, group)
        (back_Sd,) = back.land(*back.start(y_Rd))
        if sent < rows:
            back_Sd = F.pad(back_Sd, (0, 0, 0, rows - sent))
        y_Td = combine_rows(back_Sd, plan, backend=experts.backend)
        return (y_Td if extra is None else y_Td + extra).to(x_Td.dtype)

    def local(self, weight: Tensor) -> Tensor:
        """This rank's experts of a weight, [e, ...]; its gradient is a mean over ranks if tokens are split."""
        mine = local(weight)
        if self.tokens == "split" and mine.requires_grad:
            mine.register_hook(lambda grad: grad / self.mesh.size())
        return mine

    def __deepcopy__(self, memo: Any) -> ExpertParallel:
        return self  # process groups cannot be copied


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scales gradients so that their joint 2-norm is at most `max_norm`, for plain tensors and DTensors of any meshes.

    `torch.nn.utils.clip_grad_norm_`, and with it Lightning's clipping by norm, raises for plain tensors together with
    DTensors, and for DTensors of different meshes, which expert parallelism makes. In a LightningModule::

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            if gradient_clip_algorithm == "value" and gradient_clip_val:
                nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val, foreach=False)
            else:
                clip_grad_norm(self.parameters(), gradient_clip_val)

    Args:
        parameters: Parameters in the same order on all ranks: DTensors, or plain tensors that are equal on all ranks.
        max_norm: The largest norm. None, and 0 or less, clip nothing, as in Lightning.

    Returns:
        The norm before, 0-dim, the same on all ranks.
    """
    require_types(clip_grad_norm, locals())
    if max_norm is not None and max_norm != math.inf:
        require_number("max_norm", max_norm)
    grads = [p.grad for p in parameters if p.grad is not None]
    squares: dict[tuple[Any, tuple[int, ...]], Tensor] = {}
    for grad in grads:
        where = cutting_dims(grad)
        norm = torch.linalg.vector_norm(local(grad), dtype=torch.promote_types(grad.dtype, torch.float32))
        squares[where] = squares.get(where, 0) + norm.square()
    total = torch.zeros(())
    for (mesh, dims), square in squares.items():
        for dim in dims:
            dist.all_reduce(square, group=mesh.get_group(dim))
        total = total.to(square) + square
    norm = total.sqrt()
    if max_norm is not None and max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for grad in grads:
            local(grad).mul_(factor.to(grad.dtype))
    return norm


def _local_plan(counts: ExchangeCounts, backend: str) -> DispatchPlan:
    """Received rows are ordered by rank, then by expert; the plan groups them by expert without moving them."""
    ranks, experts = counts.counts_Pe.shape
    ids_Pe = torch.arange(experts, device=counts.counts_Pe.device).repeat(ranks)
    ids_R = ids_Pe.repeat_interleave(counts.counts_Pe.flatten(), output_size=sum(counts.receive))
    return plan_dispatch(ids_R[:, None], counts.counts_Pe.sum(0), backend=backend)
