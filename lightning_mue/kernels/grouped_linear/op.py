"""One linear layer of all experts as one operator: `lightning_mue::grouped_linear`.

    y_r = W_e x_r + b_e,    e = expert of row r

For experts that `grouped_ffn` has no activation for: any differentiable function of rows stands between two of these. It keeps
more for the backward pass than the fused operator: all that lies between the products.

Shape legend: T tokens, S rows sorted by expert, i and o input and output width, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_mue.checks import type_error, value_error
from lightning_mue.kernels.backends import implementation, resolve_backend
from lightning_mue.kernels.combine.op import combine_rows
from lightning_mue.kernels.dispatch.op import DispatchPlan


class LinearProblem(NamedTuple):
    """What an implementation is given.

    Attributes:
        x: [T, i] where `by_token`, else [S, i].
        weight: [E, o, i], of x's dtype.
        bias: [E, o], of x's dtype, or None.
        order: As in `DispatchPlan`, as are the next four.
        inverse: See there.
        tokens: int32 [S].
        offsets: int32 [E + 1].
        bags: See there.
        by_token: Whether row r reads ``x[tokens[r]]``, else ``x[r]``.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    order: Tensor
    inverse: Tensor
    tokens: Tensor
    offsets: Tensor
    bags: Tensor | None
    by_token: bool

    @property
    def plan(self) -> DispatchPlan:
        """The indices, together."""
        return DispatchPlan(self.order, self.inverse, self.tokens, self.offsets, self.bags)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    plan: DispatchPlan,
    *,
    bias: Tensor | None = None,
    by_token: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Multiply each row with the weights of its expert; differentiable in everything but the plan.

    GEMMs run in x's dtype with float32 sums (float64 for float64). There is no Triton kernel: where `BACKENDS` would take
    it, torch's grouped GEMM runs for bfloat16, else plain PyTorch.

    Args:
        x: [T, i] where `by_token`, else [S, i].
        weight: [E, o, i].
        plan: From `plan_dispatch`.
        bias: [E, o] or None.
        by_token: Whether x has tokens, which are read by index, or rows.
        backend: One of `BACKENDS`.

    Returns:
        [S, o], of x's dtype; zero in the rows of masked tokens (see `DispatchPlan.offsets`).

    Raises:
        ValueError: A shape does not fit, or the backend is unknown or does not run here.
        TypeError: Types differ.
    """
    indices = (plan.order, plan.inverse, plan.tokens, plan.offsets, plan.bags)
    problem = LinearProblem(x.contiguous(), weight, bias, *indices, by_token)
    _check(problem)
    chosen = resolve_backend(backend, x)
    if chosen == "triton":
        chosen = "grouped_mm" if x.dtype == torch.bfloat16 else "torch"
    y: Tensor = grouped_linear_op(*problem, chosen)
    return y


def _check(p: LinearProblem) -> None:
    """Raise unless types and shapes match: rows are read by index, without a check."""
    if p.weight.ndim != 3:
        raise value_error("weight", found=f"shape {list(p.weight.shape)}", expected="[E, o, i]")
    (n_experts, n_out, n_in), n_rows = p.weight.shape, p.order.numel()
    n_tokens = p.inverse.shape[0] if p.bags is None else len(p.bags) - 1
    shapes = {"x": (n_tokens if p.by_token else n_rows, n_in), "bias": (n_experts, n_out), "offsets": (n_experts + 1,)}
    for name, shape in shapes.items():
        found = getattr(p, name)
        if found is not None and found.shape != shape:
            expected = f"shape {list(shape)}, for weight {list(p.weight.shape)} and a plan of {n_rows} rows"
            do = "Check the weights, and that the plan was made for these tokens and experts."
            raise value_error(name, found=f"shape {list(found.shape)}", expected=expected, do=do)
    for name in ("weight", "bias"):
        found = getattr(p, name)
        if found is not None and found.dtype != p.x.dtype:
            raise type_error(name, found=found.dtype, expected=f"{p.x.dtype}, for x is", do="Convert it.")


@torch.library.custom_op("lightning_mue::grouped_linear", mutates_args=())
def grouped_linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    bags: Tensor | None,
    by_token: bool,
    backend: str,
) -> Tensor:
    """Return y [S, o]; see `grouped_linear`."""
    problem = LinearProblem(x, weight, bias, order, inverse, tokens, offsets, bags, by_token)
    if not len(order):
        return x.new_zeros(0, weight.shape[1])
    y: Tensor = implementation("grouped_linear", backend).forward(problem)
    return y


@torch.library.custom_op("lightning_mue::grouped_linear_backward", mutates_args=())
def grouped_linear_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    bags: Tensor | None,
    by_token: bool,
    backend: str,
    weights: bool,
) -> list[Tensor]:
    """Return the gradients of x and, if `weights`, of the weight and the bias. Those of an expert without rows are zero."""
    problem = LinearProblem(x, weight, bias, order, inverse, tokens, offsets, bags, by_token)
    if not len(order):
        return [torch.zeros_like(t) for t in _trained(problem, weights)]
    drows, *rest = implementation("grouped_linear", backend).backward(problem, dy.contiguous(), weights)
    return [combine_rows(drows, problem.plan, backend=backend) if by_token else drows, *rest]


def _trained(p: LinearProblem, weights: bool) -> list[Tensor]:
    return [t for t in ((p.x, p.weight, p.bias) if weights else (p.x,)) if t is not None]


@grouped_linear_op.register_fake
def _(*args: Any) -> Tensor:
    p = LinearProblem(*args[:9])
    return p.x.new_empty(p.order.shape[0], p.weight.shape[1])


@grouped_linear_backward_op.register_fake
def _(dy: Tensor, *args: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t in _trained(LinearProblem(*args[:9]), args[10])]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.settings = inputs[8:]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    weights = any(ctx.needs_input_grad[1:3])
    dx, *rest = grouped_linear_backward_op(dy, *tensors, *ctx.settings, weights)
    return (dx, *rest, *[None] * (9 - len(rest)))


grouped_linear_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.lightning_mue.grouped_linear)
def _forward_flops(x: Any, weight: Any, bias: Any, order: Any, *args: Any, **kwargs: Any) -> int:
    """Two FLOPs a multiply-add. The arguments of a FLOP formula are shapes."""
    return 2 * order[0] * weight[1] * weight[2]  # type: ignore[no-any-return]


@register_flop_formula(torch.ops.lightning_mue.grouped_linear_backward)
def _backward_flops(dy: Any, *args: Any, **kwargs: Any) -> int:
    """One product for the input and one for the weight, where that is wanted."""
    return _forward_flops(*args) * (2 if args[10] else 1)
