"""The experts as torch's grouped GEMMs over a sorted copy of the tokens. No host synchronization, no loop over experts.

Shape legend: T tokens, S rows sorted by expert, d width, h expert hidden width, E experts, G planes of pre-activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mue.kernels.combine.op import combine_rows
from lightning_mue.kernels.grouped_ffn.op import Problem
from lightning_mue.kernels.grouped_ffn.pytorch.elementwise import ELEMENTWISE


def forward(p: Problem, keep: bool) -> tuple[Tensor, Tensor]:
    """As `grouped_ffn_op`."""
    if not len(p.order):  # the grouped GEMM refuses the strides of empty tensors
        return torch.zeros_like(p.x), p.x.new_zeros(len(p.up), 0, p.w_up.shape[1])
    x_Sd = p.x[p.tokens]
    planes = [product(x_Sd, w.mT, p.offsets) for w, _ in p.up]
    planes = [z if b is None else z + of_rows(b, p.offsets, len(z)) for z, (_, b) in zip(planes, p.up, strict=True)]
    y_Sd = product(_activate(planes, p.activation)[1], p.w_down.mT, p.offsets)
    y_Td = combine_rows(y_Sd, p.plan, p.gates, backend="grouped_mm")
    return y_Td, torch.stack(planes) if keep else x_Sd.new_empty(len(planes), 0, p.w_up.shape[1])


def backward(p: Problem, dy: Tensor, z: Tensor, weights: bool) -> list[Tensor]:
    """As `grouped_ffn_backward_op`."""
    if not len(p.order):
        return [torch.zeros_like(t) for t in (p.trained if weights else p.trained[:2])]
    dy_Sd, (f_Sh, a_Sh) = dy[p.tokens], _activate(list(z), p.activation)
    da_Sh = product(dy_Sd, p.w_down, p.offsets)
    gates_S1 = p.gates.flatten()[p.order, None]
    masked_S1 = (torch.arange(len(p.order), device=p.x.device) >= p.offsets[-1])[:, None]
    dgates_S1 = (a_Sh * da_Sh).sum(1, keepdim=True, dtype=p.gates.dtype).masked_fill_(masked_S1, 0)
    da_Sh *= gates_S1.to(da_Sh.dtype)
    df_Sh = da_Sh * z[1] if len(z) == 2 else da_Sh
    dz = [ELEMENTWISE[p.activation].derivative(df_Sh, z[0], torch.empty_like(z[0]))]
    dz += [da_Sh * f_Sh] if len(z) == 2 else []
    up = p.up
    dx_Sd = product(dz[0], up[0][0], p.offsets)
    for dz_Sh, (weight, _) in zip(dz[1:], up[1:], strict=True):
        dx_Sd += product(dz_Sh, weight, p.offsets)
    grads = [combine_rows(dx_Sd, p.plan, backend="grouped_mm"), dgates_S1[p.inverse.flatten(), 0].view_as(p.gates)]
    if weights:
        x_Sd = p.x[p.tokens]
        grads += [product(dz_Sh.mT, x_Sd, p.offsets) for dz_Sh in dz]
        grads += [product(dy_Sd.mT, a_Sh.mul_(gates_S1.to(a_Sh.dtype)), p.offsets)]
        grads += [sums_by_expert(dz_Sh, p.offsets) for dz_Sh, (_, bias) in zip(dz, up, strict=True) if bias is not None]
    return [laid_out_as(t, grad) for t, grad in zip(p.trained, grads, strict=False)]


def product(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Rows by expert: [S, i] times [E, i, j], or [i, S] times [S, j] to [E, i, j]. Masked rows are not written."""
    return F.grouped_mm(_aligned(a), _aligned(b), offs=offsets[1:])


def _aligned(t: Tensor) -> Tensor:
    """The same values in rows (or columns) that begin at multiples of 16 bytes, as the grouped GEMM requires.

    A copy only if need be.
    """
    multiple = 16 // t.element_size()
    for step, inner in ((-2, -1), (-1, -2)):
        whole = not any(stride % multiple for dim, stride in enumerate(t.stride()) if dim != t.ndim + inner)
        if whole and t.stride(inner) == 1 and t.stride(step) >= t.shape[inner]:
            return t
    # Zeros: the padding is read, and a NaN that lay there would not be multiplied away.
    rows = t.new_zeros(*t.shape[:-1], -(-t.shape[-1] // multiple) * multiple)[..., : t.shape[-1]]
    return rows.copy_(t)


def laid_out_as(t: Tensor, grad: Tensor) -> Tensor:
    """The gradient with the strides that `empty_like` gives, which is what a compiler is told."""
    out = torch.empty_like(t)
    return grad if grad.stride() == out.stride() else out.copy_(grad)


def _activate(planes: list[Tensor], activation: str) -> tuple[Tensor, Tensor]:
    """The function of the first plane, and the hidden activation, which is a tensor of its own if gated."""
    z = planes[0].contiguous()
    f = ELEMENTWISE[activation].function(z, torch.empty_like(z))
    return f, f * planes[1] if len(planes) == 2 else f


def of_rows(bias_Eh: Tensor, offsets: Tensor, n_rows: int) -> Tensor:
    """The bias of each row's expert: [S, h]; masked rows get the last expert's."""
    rows_S = torch.arange(n_rows, device=bias_Eh.device, dtype=torch.int32)
    expert_S = torch.searchsorted(offsets[1:], rows_S, right=True, out_int32=True)
    return bias_Eh[expert_S.clamp_(max=len(bias_Eh) - 1)]


def sums_by_expert(dz_Sh: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each expert's rows, [E, h]: in float32 and in a fixed order, which index_add does not promise on CUDA."""
    ends = F.pad(offsets.long(), (0, 1), value=len(dz_Sh))  # one segment more: the masked rows
    sums = torch.segment_reduce(dz_Sh.float(), "sum", offsets=ends)
    return sums[:-1].to(dz_Sh.dtype)
