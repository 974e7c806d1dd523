"""The feed-forward networks of all experts as one operator: `lightning_mue::grouped_ffn`.

    y_t = sum_k gate_tk * W_down_e a,    a = f(W_gate_e x_t + b_gate_e) * (W_up_e x_t + b_up_e)  (gated)
                                         a = f(W_up_e x_t + b_up_e)                              (not gated)
    e = expert of assignment (t, k)

An operator instead of plain autograd saves only its inputs and the pre-activations z, the least that a backward pass needs
(SonicMoE, arXiv:2512.14080), and reads tokens by index. Its output shapes are static: it compiles without a graph break, runs on
the meta device and counts its FLOPs. backends.py chooses among three implementations.

Shape legend: T tokens, K experts per token, S assignments (= rows, sorted by expert), d width, h expert hidden width, E
experts, G = 2 for gated activations (gate first), else 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_mue.checks import require_choice, type_error, value_error
from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.kernels.backends import implementation, resolve_backend
from lightning_mue.kernels.dispatch.op import DispatchPlan


class Problem(NamedTuple):
    """What an implementation is given.

    Attributes:
        x: [T, d].
        gates: [T, K], or [S] where `bags` is given; float32, or float64 if x is. Of assignments, not of rows.
        w_gate: [E, h, d], of x's dtype; None if not gated, or fused.
        w_up: [E, h, d], of x's dtype; fused, [E, 2h, d]: gate first. So is b_up then, [E, 2h].
        w_down: [E, d, h], of x's dtype.
        b_gate: [E, h], of x's dtype, or None.
        b_up: [E, h], of x's dtype, or None.
        order: int32 [S], as in `DispatchPlan`, as are the next four.
        inverse: int32, of gates' shape.
        tokens: int32 [S].
        offsets: int32 [E + 1].
        bags: int32 [T + 1] or None.
        activation: A key of `ACTIVATIONS`.
    """

    x: Tensor
    gates: Tensor
    w_gate: Tensor | None
    w_up: Tensor
    w_down: Tensor
    b_gate: Tensor | None
    b_up: Tensor | None
    order: Tensor
    inverse: Tensor
    tokens: Tensor
    offsets: Tensor
    bags: Tensor | None
    activation: str

    @property
    def plan(self) -> DispatchPlan:
        """The indices, together."""
        return DispatchPlan(self.order, self.inverse, self.tokens, self.offsets, self.bags)

    @property
    def fused(self) -> bool:
        """Whether `w_up` and `b_up` hold those of the gate too."""
        return self.w_gate is None and ACTIVATIONS[self.activation].gated

    def separated(self) -> Problem:
        """The same, with views of fused tensors as tensors of their own."""
        if not self.fused:
            return self
        (w_gate, w_up), biases = self.w_up.chunk(2, 1), (None, None) if self.b_up is None else self.b_up.chunk(2, 1)
        return self._replace(w_gate=w_gate, w_up=w_up, b_gate=biases[0], b_up=biases[1])

    @property
    def up(self) -> list[tuple[Tensor, Tensor | None]]:
        """The weights [E, h, d] that x is multiplied with, one for each of G planes, and their biases."""
        pairs = ((self.w_gate, self.b_gate), (self.w_up, self.b_up))
        return [(weight, bias) for weight, bias in pairs if weight is not None]

    @property
    def trained(self) -> list[Tensor]:
        """What has a gradient, in the order in which `backward` returns it."""
        given = (self.x, self.gates, self.w_gate, self.w_up, self.w_down, self.b_gate, self.b_up)
        return [t for t in given if t is not None]


def grouped_ffn(
    x: Tensor,
    gates: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    plan: DispatchPlan,
    *,
    w_gate: Tensor | None = None,
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    activation: str = "swiglu",
    backend: str = "auto",
) -> Tensor:
    """Compute the gate-weighted sum of the chosen experts of every token; differentiable in everything but the plan.

    GEMMs run in x's dtype with float32 sums (float64 for float64); the sum over experts is taken in float32. Rows of
    masked tokens (see `DispatchPlan.offsets`) count as zero. Arguments as in `Problem`.

    Args:
        x: [T, d].
        gates: [T, K] or [S].
        w_up: [E, h, d].
        w_down: [E, d, h].
        plan: From `plan_dispatch`.
        w_gate: [E, h, d]; for gated activations only. Without it, w_up is [E, 2h, d] there, and b_up [E, 2h]: gate first.
        b_gate: [E, h] or None.
        b_up: [E, h] or None.
        activation: A key of `ACTIVATIONS`.
        backend: One of `BACKENDS`.

    Returns:
        [T, d], of x's dtype.

    Raises:
        ValueError: The activation or backend is unknown, or a shape does not fit.
        TypeError: Types differ, or the gates are not float32 (float64 for float64).
    """
    weights = (w_gate, w_up, w_down, b_gate, b_up)
    indices = (plan.order, plan.inverse, plan.tokens, plan.offsets, plan.bags)
    problem = Problem(x.contiguous(), gates.contiguous(), *weights, *indices, activation)
    _check(problem)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in problem.trained)
    y: Tensor = grouped_ffn_op(*problem, resolve_backend(backend, x), keep)[0]
    return y


def _check(p: Problem) -> None:
    """Raise unless types and shapes match: otherwise a kernel would read outside its tensors."""
    require_choice("activation", p.activation, ACTIVATIONS)
    gated = ACTIVATIONS[p.activation].gated
    if (p.w_gate is not None and not gated) or (p.w_gate is None and p.b_gate is not None):
        found, expected = ("b_gate without w_gate", "both") if gated else ("w_gate or b_gate", "neither")
        expected, do = f"{expected} for {p.activation!r}", "Pass them for gated activations, and only for those."
        raise value_error("activation", found=found, expected=expected, do=do)
    if p.x.ndim != 2 or p.w_up.ndim != 3:
        found = f"shapes {list(p.x.shape)} and {list(p.w_up.shape)}"
        raise value_error("x and w_up", found=found, expected="[T, d] and [E, h, d]")
    if p.fused:
        if p.w_up.shape[1] % 2:
            expected = "an even number of rows, gate and up, where there is no w_gate"
            raise value_error("w_up", found=f"shape {list(p.w_up.shape)}", expected=expected, do="Pass w_gate too.")
        return _check(p.separated())
    (n_experts, hidden, _), (n_tokens, width) = p.w_up.shape, p.x.shape
    up, bias = (n_experts, hidden, width), (n_experts, hidden)
    places = (n_tokens, p.inverse.shape[-1]) if p.bags is None else p.order.shape
    shapes = {"w_gate": up, "w_up": up, "w_down": (n_experts, width, hidden), "b_gate": bias, "b_up": bias}
    shapes |= {"inverse": tuple(places), "gates": tuple(p.inverse.shape), "offsets": (n_experts + 1,)}
    shapes |= {} if p.bags is None else {"bags": (n_tokens + 1,)}
    for name, shape in shapes.items():
        found = getattr(p, name)
        if found is not None and found.shape != shape:
            expected = f"shape {list(shape)}, for x {list(p.x.shape)} and w_up {list(p.w_up.shape)}"
            do = "Check the weights, and that the plan was made for these tokens and experts."
            raise value_error(name, found=f"shape {list(found.shape)}", expected=expected, do=do)
    gates_dtype = torch.promote_types(p.x.dtype, torch.float32)
    for name in ("w_gate", "w_up", "w_down", "b_gate", "b_up", "gates"):
        found, dtype = getattr(p, name), gates_dtype if name == "gates" else p.x.dtype
        if found is not None and found.dtype != dtype:
            expected = f"{dtype}, for x is {p.x.dtype}"
            raise type_error(name, found=found.dtype, expected=expected, do="Convert it.")


def activation_memory(
    width: int, hidden_width: int, top_k: int, activation: str, dtype: torch.dtype
) -> dict[str, float]:
    """Bytes per token that `grouped_ffn` keeps for its backward pass, weights left out.

    Args:
        width: d.
        hidden_width: h.
        top_k: K, experts per token.
        activation: A key of `ACTIVATIONS`.
        dtype: Of x.

    Returns:
        "input" (x itself, by reference: 2d in bfloat16), "pre_activations" (4Kh if gated), "routing" (gates in float32 and
        three int32 indices an assignment), and their "total".
    """
    planes = 2 if ACTIVATIONS[activation].gated else 1
    parts = {
        "input": width * dtype.itemsize,
        "pre_activations": planes * top_k * hidden_width * dtype.itemsize,
        "routing": top_k * (max(dtype.itemsize, 4) + 3 * 4),
    }
    return {**parts, "total": sum(parts.values())}


@torch.library.custom_op("lightning_mue::grouped_ffn", mutates_args=())
def grouped_ffn_op(
    x: Tensor,
    gates: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    bags: Tensor | None,
    activation: str,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Return y [T, d] and the pre-activations [G, S, h] for the backward pass (without rows unless `keep`)."""
    problem = Problem(x, gates, w_gate, w_up, w_down, b_gate, b_up, order, inverse, tokens, offsets, bags, activation)
    y, z = implementation("grouped_ffn", backend).forward(problem.separated(), keep)
    return y, z


@torch.library.custom_op("lightning_mue::grouped_ffn_backward", mutates_args=())
def grouped_ffn_backward_op(
    dy: Tensor,
    z: Tensor,
    x: Tensor,
    gates: Tensor,
    w_gate: Tensor | None,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    order: Tensor,
    inverse: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    bags: Tensor | None,
    activation: str,
    backend: str,
    weights: bool,
) -> list[Tensor]:
    """Return the gradients of `Problem.trained`, only of x and the gates unless `weights`.

    Those of an expert without rows are zero. A gate's gradient is <a, dy W_down>, so the experts' outputs need not be kept.
    """
    problem = Problem(x, gates, w_gate, w_up, w_down, b_gate, b_up, order, inverse, tokens, offsets, bags, activation)
    module = implementation("grouped_ffn", backend)
    if backend == "torch" or not problem.fused:
        return list(module.backward(problem, dy.contiguous(), z, weights))
    grads = list(module.backward(problem.separated(), dy.contiguous(), z, weights))  # which write no fused gradients
    if weights:  # joined with the strides of `empty_like`, which the fake implementation promises
        grads[2:4] = [torch.cat(grads[2:4], 1, out=torch.empty_like(w_up))]
        if b_up is not None:
            grads[4:6] = [torch.cat(grads[4:6], 1, out=torch.empty_like(b_up))]
    return grads


@grouped_ffn_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    problem, keep = Problem(*args[:13]), args[14]
    rows = problem.order.shape[0] if keep else 0
    return torch.empty_like(problem.x), problem.x.new_empty(len(problem.separated().up), rows, problem.w_down.shape[2])


@grouped_ffn_backward_op.register_fake
def _(dy: Tensor, z: Tensor, *args: Any) -> list[Tensor]:
    trained = Problem(*args[:13]).trained
    return [torch.empty_like(t) for t in (trained if args[14] else trained[:2])]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[:12])
    ctx.settings = inputs[12:14]


def _backward(ctx: Any, dy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    z, *tensors = ctx.saved_tensors
    weights = any(ctx.needs_input_grad[2:7])
    grads = iter(grouped_ffn_backward_op(dy, z, *tensors, *ctx.settings, weights))
    trained = tensors[:7] if weights else tensors[:2]
    return (*(next(grads) if t is not None else None for t in trained), *[None] * (15 - len(trained)))


grouped_ffn_op.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.lightning_mue.grouped_ffn)
def _forward_flops(x: Any, gates: Any, w_gate: Any, w_up: Any, w_down: Any, *args: Any, **kwargs: Any) -> int:
    """One product more if gated; two FLOPs a multiply-add. The arguments of a FLOP formula are shapes."""
    rows = gates[0] * (gates[1] if len(gates) == 2 else 1)
    return 2 * rows * w_up[2] * (w_up[1] * (2 if w_gate is not None else 1) + w_down[2])


@register_flop_formula(torch.ops.lightning_mue.grouped_ffn_backward)
def _backward_flops(dy: Any, z: Any, *args: Any, **kwargs: Any) -> int:
    """Twice the forward pass: one product for the input and one for the weight, where that is wanted."""
    return _forward_flops(*args) * (2 if args[14] else 1)
