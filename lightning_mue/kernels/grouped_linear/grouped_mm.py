"""The linear layer as torch's grouped GEMM. No host synchronization, no loop over experts.

Shape legend: S rows sorted by expert, i and o input and output width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mue.kernels.grouped_ffn.grouped_mm import laid_out_as, of_rows, product, sums_by_expert
from lightning_mue.kernels.grouped_linear.op import LinearProblem


def forward(p: LinearProblem) -> Tensor:
    """As `grouped_linear_op`, of one row or more."""
    y_So = product(_rows(p), p.weight.mT, p.offsets)
    if p.bias is not None:
        y_So += of_rows(p.bias, p.offsets, len(y_So))
    return _without_masked(y_So, p)


def backward(p: LinearProblem, dy: Tensor, weights: bool) -> list[Tensor]:
    """As `grouped_linear_backward_op`, but the gradient of x is that of its rows, [S, i]."""
    dx_Si = _without_masked(product(dy, p.weight, p.offsets), p)
    if not weights:
        return [dx_Si]
    grads = [laid_out_as(p.weight, product(dy.mT, _rows(p), p.offsets))]
    if p.bias is not None:
        grads.append(sums_by_expert(dy, p.offsets))
    return [dx_Si, *grads]


def _rows(p: LinearProblem) -> Tensor:
    return p.x[p.tokens] if p.by_token else p.x


def _without_masked(rows_S: Tensor, p: LinearProblem) -> Tensor:
    """Masked rows, which the grouped GEMM does not write, set to zero in place."""
    masked_S = torch.arange(len(rows_S), device=rows_S.device) >= p.offsets[-1]
    return rows_S.masked_fill_(masked_S[:, None], 0)
