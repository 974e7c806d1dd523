"""The sum over each token's rows, weighted by gates, as one operator: `lightning_mue::combine_rows`.

Summed in float32, in the order of the assignments and without atomics, so that it is reproducible bit by bit. The backward
pass is written by hand: it reads dy by index, and keeps no copy of rows per assignment.

Shape legend: T tokens, K experts per token, S assignments (= rows, sorted by expert), d width, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.kernels.backends import implementation, resolve_backend
from lightning_mue.kernels.dispatch.op import DispatchPlan


def combine_rows(rows_Sd: Tensor, plan: DispatchPlan, gates: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Return ``y_t = sum over t's assignments j of gates_j * rows[inverse_j]``; differentiable in rows and gates.

    Args:
        rows_Sd: [S, d]. Rows from ``plan.offsets[E]`` on are padding and count as zero, whatever they hold.
        plan: Of these rows.
        gates: Of `plan.inverse`'s shape, float32 (float64 for float64 rows); None: all one.
        backend: One of `BACKENDS`.

    Returns:
        [T, d], of rows' dtype; summed in float32 (float64 for float64 rows).

    Raises:
        ValueError: A shape or type does not fit, or the backend is unknown or does not run here.
    """
    if rows_Sd.ndim != 2 or len(rows_Sd) != plan.order.numel():
        expected = f"[S, d] with the plan's S = {plan.order.numel()} rows"
        do = "Pass the plan that these rows were made with."
        raise value_error("rows_Sd", found=f"shape {list(rows_Sd.shape)}", expected=expected, do=do)
    if gates is not None and (gates.shape != plan.inverse.shape or gates.dtype != _sum_dtype(rows_Sd)):
        found = f"{gates.dtype} of shape {list(gates.shape)}"
        expected = f"{_sum_dtype(rows_Sd)} of shape {list(plan.inverse.shape)}, the shape of plan.inverse"
        do = "Cast or reshape them, or pass None for weights of one."
        raise value_error("gates", found=found, expected=expected, do=do)
    indices = (plan.order, plan.inverse, plan.tokens, plan.offsets, plan.bags)
    y: Tensor = combine_rows_op(rows_Sd, gates, *indices, resolve_backend(backend, rows_Sd))
    return y


@torch.library.custom_op("lightning_mue::combine_rows", mutates_args=())
def combine_rows_op(
    rows: Tensor,
    gates: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    bags: Tensor | None,
    backend: str,
) -> Tensor:
    """Return y [T, d]; see `combine_rows`."""
    out = rows.new_empty(_tokens(inverse, bags), rows.shape[1])
    if backend == "triton":
        given = [None if t is None else t.contiguous() for t in (rows, inverse, offsets, bags, gates)]
        with torch.cuda.device_of(rows):
            implementation("combine", backend).launch_combine(*given, out)
        return out
    return out.copy_(_combine(rows, gates, inverse, offsets, bags))


@torch.library.custom_op("lightning_mue::combine_rows_backward", mutates_args=())
def combine_rows_backward_op(
    dy: Tensor,
    rows: Tensor | None,
    gates: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    backend: str,
) -> list[Tensor]:
    """Return the gradients of rows [S, d] and, where `rows` is given, of the gates. Those of masked rows are zero."""
    if backend == "triton":
        given = [None if t is None else t.contiguous() for t in (dy, rows, gates, order, tokens, offsets)]
        with torch.cuda.device_of(dy):
            grads: list[Tensor] = implementation("combine", backend).launch_spread(*given)
        return grads
    dy_Sd = _without_masked(dy[tokens], offsets).to(_sum_dtype(dy))
    if gates is None:
        return [dy_Sd.to(dy.dtype)]
    weights_S1 = gates.masked_fill(inverse >= offsets[-1], 0).flatten()[order][:, None]
    drows = (dy_Sd * weights_S1).to(dy.dtype)
    if rows is None:
        return [drows]
    dgates_S = (_without_masked(rows, offsets).to(dy_Sd.dtype) * dy_Sd).sum(1)
    return [drows, dgates_S[inverse.flatten()].view_as(gates)]


@combine_rows_op.register_fake
def _(
    rows: Tensor, gates: Any, order: Tensor, inverse: Tensor, tokens: Any, offsets: Any, bags: Any, backend: str
) -> Tensor:
    return rows.new_empty(_tokens(inverse, bags), rows.shape[1])


@combine_rows_backward_op.register_fake
def _(dy: Tensor, rows: Tensor | None, gates: Tensor | None, order: Tensor, *args: Any) -> list[Tensor]:
    drows = dy.new_empty(order.shape[0], dy.shape[1])
    return [drows] if rows is None or gates is None else [drows, gates.new_empty(gates.shape)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, gates, order, inverse, tokens, offsets, _, ctx.backend = inputs
    # Rows are needed for the gates' gradient alone.
    kept = rows if gates is not None and ctx.needs_input_grad[1] else None
    ctx.save_for_backward(kept, gates, order, inverse, tokens, offsets)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    grads = combine_rows_backward_op(dy, *ctx.saved_tensors, ctx.backend)
    return (grads[0], grads[1] if len(grads) == 2 else None, *[None] * 6)


combine_rows_op.register_autograd(_backward, setup_context=_setup_context)


def _sum_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _tokens(inverse: Tensor, bags: Tensor | None) -> int:
    return inverse.shape[0] if bags is None else bags.shape[0] - 1


def _without_masked(rows_Sd: Tensor, offsets: Tensor) -> Tensor:
    """The rows, masked ones set to zero; on the CPU a copy only where there are any."""
    if not rows_Sd.is_cuda and int(offsets[-1]) == len(rows_Sd):
        return rows_Sd
    masked_S = torch.arange(len(rows_Sd), device=rows_Sd.device) >= offsets[-1]
    return rows_Sd.masked_fill(masked_S[:, None], 0)


def _combine(rows_Sd: Tensor, gates: Tensor | None, inverse: Tensor, offsets: Tensor, bags: Tensor | None) -> Tensor:
    """The sum in plain PyTorch, [T, d] of the dtype that is summed in."""
    values_Sd = _without_masked(rows_Sd, offsets).to(_sum_dtype(rows_Sd))
    if not values_Sd.numel():
        return values_Sd.new_zeros(_tokens(inverse, bags), rows_Sd.shape[1])
    weights = None if gates is None else gates.masked_fill(inverse >= offsets[-1], 0)
    return F.embedding_bag(
        inverse, values_Sd, bags, mode="sum", per_sample_weights=weights, include_last_offset=bags is not None
    )
