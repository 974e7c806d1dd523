"""Neuron-wise normalization of orthogonalized directions: each row by the root of its second moment (NorMuon).

Per matrix, with the orthogonalized direction O of `in` columns and decay b::

    v <- b v + (1 - b) mean over columns of O^2        N = O / sqrt(v)        N <- N ||O|| / ||N||

Adam's correction of the bias of v is one factor for all rows of a matrix, which the last step takes out again; so no count
of steps is kept, and no epsilon: a row whose second moment is zero is zero. Source: arXiv:2510.05491, algorithm 1, whose
rescaled norm 0.2 sqrt(out in) is that of the "rms" convention for an O that is exactly orthogonal.

Shape legend:
    B  matrices in a batch            E  matrices (experts) in one stacked parameter
    out, in (o, i)  rows (neurons) and columns
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.optim.precision import math_dtype
from lightning_mue.sharded import is_sharded, local


def row_shape(shape: torch.Size) -> torch.Size:
    """Return the shape of the second moments of a parameter's rows: `[out]`, or `[E, out]` for a stack."""
    return shape[: 2 if len(shape) == 3 else 1]


def zero_rows(param: Any) -> Tensor:
    """Return second moments of zero for a parameter's rows, in the math type, sharded as its rows are."""
    dtype, shape = math_dtype(param.dtype), row_shape(param.shape)
    held = torch.zeros(row_shape(local(param).shape), dtype=dtype, device=param.device)
    if not is_sharded(param):
        return held
    from torch.distributed.tensor import DTensor, Replicate

    placements = [p if getattr(p, "dim", len(shape)) < len(shape) else Replicate() for p in param.placements]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(held, param.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def check_rows(split: object) -> None:
    """Refuse matrices that are split by columns: they are `[in, out]`, so that their neurons are not rows.

    Raises:
        ValueError: If they are.
    """
    if isinstance(split, Mapping):
        do = "Leave `normalize` out in their group."
        raise value_error("normalize", found="'neuron' with matrices split by columns", expected="rows", do=do)


def normalize_rows(directions: Sequence[Tensor], rows: Sequence[Sequence[Tensor | None]], decay: float) -> None:
    """Update second moments and normalize the rows of whole matrices, in place.

    Args:
        directions: Each `[B, out, in]` in the math type.
        rows: For each, the second moments of its parameters, `[out]` or `[E, out]`; None where rows are not normalized.
        decay: Decay of the second moments.
    """
    for u_Boi, held in zip(directions, rows, strict=True):
        kept = [v if v.ndim == 2 else v.unsqueeze(0) for v in held if v is not None]
        if kept:
            square_Bo = row_squares(u_Boi)
            scale_Bo = update_rows(kept, square_Bo / u_Boi.shape[-1], decay)
            ratio_B = norm_ratio(square_Bo.sum(-1), (square_Bo * scale_Bo.square()).sum(-1))
            u_Boi.mul_((scale_Bo * ratio_B[:, None])[..., None])


def row_squares(u_Boi: Tensor) -> Tensor:
    """Return the sum of squares of each row, `[B, out]`."""
    return torch.linalg.vector_norm(u_Boi, dim=-1).square_()


def update_rows(held: Sequence[Tensor], mean_Bo: Tensor, decay: float) -> Tensor:
    """Update second moments and return what rows are to be multiplied by, `[B, out]`."""
    parts = mean_Bo.split([len(v_Eo) for v_Eo in held])
    for v_Eo, part_Eo in zip(held, parts, strict=True):
        v_Eo.lerp_(part_Eo.to(v_Eo.dtype), 1 - decay)
    v_Bo = torch.cat(list(held))
    return torch.where(v_Bo > 0, v_Bo.rsqrt(), torch.zeros_like(v_Bo))


def norm_ratio(before_B: Tensor, after_B: Tensor) -> Tensor:
    """Return what restores the norm, from sums of squares before and after; a zero matrix stays zero."""
    return torch.where(after_B > 0, before_B / after_B, torch.zeros_like(after_B)).sqrt()
