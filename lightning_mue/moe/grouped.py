"""The grouped SwiGLU of all experts as one operator, `lightning_mue::grouped_swiglu`, in plain PyTorch.

    y_t = sum_k g_tk * (silu(x_t Wg_e^T) * (x_t Wu_e^T)) Wd_e^T,    e = expert of assignment (t, k)

Why an operator and not plain autograd: it saves only the two pre-activations (2 S h numbers), gathers rows into scratch
that is reused from expert to expert, writes each expert's weight gradient in place, and, having static output
shapes, it compiles without a graph break, runs on the meta device and counts its FLOPs.

Shape legend: T tokens, K experts per token, S = T * K assignments sorted by expert, n the rows of one expert, p = n
rounded up, d width, h expert hidden width, E experts. A trailing 1 is a column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from lightning_mue.moe._workers import run_over_experts

_ROW_MULTIPLE = 64  # oneDNN compiles a bfloat16 GEMM anew for each new shape (2-5 ms), and row counts change every step
_PARALLEL_FLOPS = 1e7  # below this, waking the workers costs more than they save


class _Scratch:
    """Work buffers of one thread, allocated on first use and reused from expert to expert.

    Each holds the rows of one expert, rounded up: `n` is how many are real.
    """

    def __init__(self, like: Tensor, counts: list[int]) -> None:
        self._like = like
        self._multiple = _ROW_MULTIPLE if like.device.type == "cpu" and like.dtype == torch.bfloat16 else 1
        self._max_rows = self._round_up(max(counts))
        self._buffers: dict[str, Tensor] = {}

    def _round_up(self, n: int) -> int:
        return -(-n // self._multiple) * self._multiple

    def get(self, name: str, n: int, columns: int) -> Tensor:
        """Undefined content, [p, columns]."""
        if name not in self._buffers:
            self._buffers[name] = self._like.new_empty(self._max_rows, columns)
        return self._buffers[name][: self._round_up(n)]

    def zero_tail(self, name: str, n: int, columns: int) -> tuple[Tensor, Tensor]:
        """[p, columns] whose rows from n on are zero, so that they add nothing to a sum over rows; its first n rows."""
        full = self.get(name, n, columns)
        if len(full) == n:
            return full, full
        full[n:].zero_()
        return full, full[:n]

    def gather(self, name: str, source: Tensor, index_n: Tensor) -> Tensor:
        """Rows of `source` at `index_n`, then zero rows: [p, columns]."""
        full, real = self.zero_tail(name, len(index_n), source.shape[1])
        torch.index_select(source, 0, index_n, out=real)
        return full

    def mm(self, name: str, a_pi: Tensor, b_ij: Tensor, out_nj: Tensor) -> Tensor:
        """Write the first n rows of the product to `out_nj`; return all p rows."""
        if len(out_nj) == len(a_pi):
            return torch.mm(a_pi, b_ij, out=out_nj)
        product_pj = torch.mm(a_pi, b_ij, out=self.get(name, len(a_pi), b_ij.shape[1]))
        out_nj.copy_(product_pj[: len(out_nj)])
        return product_pj


def _run(work: Callable[[Iterable[int]], None], counts: list[int], x: Tensor, w_gate: Tensor) -> None:
    flops = 6 * sum(counts) * w_gate.shape[1] * w_gate.shape[2]
    run_over_experts(work, counts, parallel=x.device.type == "cpu" and flops > _PARALLEL_FLOPS)


@torch.library.custom_op("lightning_mue::grouped_swiglu", mutates_args=())
def grouped_swiglu(
    x: Tensor,
    gates: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    order: Tensor,
    inverse: Tensor,
    counts: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gate-weighted sum of the chosen experts of every token.

    Args:
        x: [T, d].
        gates: [T, K], float32, or float64 if x is.
        w_gate: [E, h, d], of x's dtype.
        w_up: [E, h, d], of x's dtype.
        w_down: [E, d, h], of x's dtype.
        order: int64 [S], as `DispatchPlan.order`.
        inverse: int64 [T, K], as `DispatchPlan.inverse`.
        counts: int64 [E].

    Returns:
        y [T, d], and the pre-activations x Wg^T and x Wu^T [S, h] in sorted order, which the backward pass reads.
    """
    rows, hidden = counts.tolist(), w_gate.shape[1]  # the one host synchronization of this backend
    z_gate_Sh, z_up_Sh = x.new_empty(len(order), hidden), x.new_empty(len(order), hidden)
    y_Sd = x.new_empty(len(order), x.shape[1])
    tokens, z_gate, z_up, y = (torch.split(t, rows) for t in (order // inverse.shape[1], z_gate_Sh, z_up_Sh, y_Sd))

    def work(experts: Iterable[int]) -> None:
        scratch = _Scratch(x, rows)
        for e in experts:
            x_pd = scratch.gather("x", x, tokens[e])
            z_gate_ph = scratch.mm("z_gate", x_pd, w_gate[e].t(), out_nj=z_gate[e])
            z_up_ph = scratch.mm("z_up", x_pd, w_up[e].t(), out_nj=z_up[e])
            a_ph = torch.ops.aten.silu.out(z_gate_ph, out=scratch.get("a", rows[e], hidden)).mul_(z_up_ph)
            scratch.mm("y", a_ph, w_down[e].t(), out_nj=y[e])

    _run(work, rows, x, w_gate)
    y_Td = F.embedding_bag(inverse, y_Sd.to(gates.dtype), mode="sum", per_sample_weights=gates).to(x.dtype)
    return y_Td, z_gate_Sh, z_up_Sh


@torch.library.custom_op("lightning_mue::grouped_swiglu_backward", mutates_args=())
def grouped_swiglu_backward(
    dy: Tensor,
    x: Tensor,
    gates: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    order: Tensor,
    inverse: Tensor,
    counts: Tensor,
    z_gate: Tensor,
    z_up: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `grouped_swiglu` with respect to x, gates, w_gate, w_up and w_down; zero for an expert without rows.

    A gate's gradient is <silu(z_gate) * z_up, dy Wd>, so the experts' outputs need not be kept (SonicMoE,
    arXiv:2512.14080).
    """
    rows, hidden = counts.tolist(), w_gate.shape[1]
    dgates_S, dx_Sd = gates.new_empty(len(order)), x.new_empty(len(order), x.shape[1])
    dw_gate, dw_up, dw_down = torch.empty_like(w_gate), torch.empty_like(w_up), torch.empty_like(w_down)
    gates_S1 = gates.flatten()[order].to(x.dtype).unsqueeze(1)
    tokens, z_gates, z_ups, gate_columns = (
        torch.split(t, rows) for t in (order // inverse.shape[1], z_gate, z_up, gates_S1)
    )
    dgates, dx = torch.split(dgates_S, rows), torch.split(dx_Sd, rows)

    def work(experts: Iterable[int]) -> None:
        scratch = _Scratch(x, rows)
        for e in experts:
            n, gates_n1, z_gate_nh, z_up_nh = rows[e], gate_columns[e], z_gates[e], z_ups[e]
            x_pd, dy_pd = scratch.gather("x", x, tokens[e]), scratch.gather("dy", dy, tokens[e])
            a_ph, a_nh = scratch.zero_tail("a", n, hidden)
            dz_gate_ph, dz_gate_nh = scratch.zero_tail("dz_gate", n, hidden)
            dz_up_ph, dz_up_nh = scratch.zero_tail("dz_up", n, hidden)

            da_nh = torch.mm(dy_pd, w_down[e], out=scratch.get("da", n, hidden))[:n]
            silu_nh = torch.ops.aten.silu.out(z_gate_nh, out=scratch.get("silu", n, hidden)[:n])
            torch.mul(silu_nh, z_up_nh, out=a_nh)
            torch.sum(torch.mul(a_nh, da_nh, out=dz_gate_nh), 1, dtype=gates.dtype, out=dgates[e])
            a_nh.mul_(gates_n1)
            da_nh.mul_(gates_n1)
            torch.mm(dy_pd.t(), a_ph, out=dw_down[e])
            torch.mul(da_nh, silu_nh, out=dz_up_nh)
            torch.ops.aten.silu_backward.grad_input(da_nh.mul_(z_up_nh), z_gate_nh, grad_input=dz_gate_nh)
            torch.mm(dz_gate_ph.t(), x_pd, out=dw_gate[e])
            torch.mm(dz_up_ph.t(), x_pd, out=dw_up[e])
            dx_pd = torch.mm(dz_gate_ph, w_gate[e], out=x_pd).addmm_(dz_up_ph, w_up[e])
            dx[e].copy_(dx_pd[:n])

    for e, n in enumerate(rows):
        if n == 0:
            dw_gate[e], dw_up[e], dw_down[e] = 0, 0, 0
    _run(work, rows, x, w_gate)
    return F.embedding_bag(inverse, dx_Sd, mode="sum"), dgates_S[inverse], dw_gate, dw_up, dw_down


@grouped_swiglu.register_fake
def _(x: Tensor, gates: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, order: Tensor, *_: Tensor) -> Any:
    z_Sh = x.new_empty(order.shape[0], w_gate.shape[1])
    return torch.empty_like(x), z_Sh, torch.empty_like(z_Sh)


@grouped_swiglu_backward.register_fake
def _(dy: Tensor, x: Tensor, gates: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *_: Tensor) -> Any:
    return tuple(torch.empty_like(t) for t in (x, gates, w_gate, w_up, w_down))


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return (*grouped_swiglu_backward(dy, *ctx.saved_tensors), None, None, None)


grouped_swiglu.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.lightning_mue.grouped_swiglu)
def _forward_flops(x: Any, gates: Sequence[int], w_gate: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Three products of two FLOPs a multiply-add; `args` of a FLOP formula are shapes."""
    return 6 * gates[0] * gates[1] * w_gate[1] * w_gate[2]


@register_flop_formula(torch.ops.lightning_mue.grouped_swiglu_backward)
def _backward_flops(dy: Any, x: Any, gates: Sequence[int], w_gate: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Twice the forward pass: one product for the input and one for the weight."""
    return 12 * gates[0] * gates[1] * w_gate[1] * w_gate[2]
