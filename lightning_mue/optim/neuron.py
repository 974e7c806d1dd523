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
from lightning_mue.optim.distributed.layout import Layout
from lightning_mue.optim.distributed.sharding import reduce_sums
from lightning_mue.optim.matrices import as_matrices
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
            square_Bo = _row_squares(u_Boi)
            scale_Bo = _update(kept, square_Bo / u_Boi.shape[-1], decay)
            ratio_B = _ratio(square_Bo.sum(-1), (square_Bo * scale_Bo.square()).sum(-1))
            u_Boi.mul_((scale_Bo * ratio_B[:, None])[..., None])


def normalize_sharded_rows(
    directions: Sequence[Tensor], rows: Sequence[Tensor | None], layouts: Sequence[Layout], decay: float
) -> None:
    """Update second moments and normalize the rows of this rank's pieces, in place; a collective where they are sharded."""
    chosen = [index for index, v in enumerate(rows) if v is not None]
    if not chosen:
        return
    where = [layouts[index] for index in chosen]
    wide = [as_matrices(directions[index]) for index in chosen]
    # Columns on other ranks belong to the same rows; rows on other ranks count in the norm of the whole only.
    squares = _add([_row_squares(u_Eoi) for u_Eoi in wide], where, side=1)
    sums, scales = [], []
    for index, square_Eo, layout in zip(chosen, squares, where, strict=True):
        held = rows[index]
        assert held is not None
        scale_Eo = _update([held if held.ndim == 2 else held.unsqueeze(0)], square_Eo / layout.matrix[1], decay)
        scales.append(scale_Eo)
        sums.append(torch.stack([square_Eo.sum(-1), (square_Eo * scale_Eo.square()).sum(-1)], dim=-1))
    for u_Eoi, scale_Eo, sum_E2 in zip(wide, scales, _add(sums, where, side=0), strict=True):
        u_Eoi.mul_((scale_Eo * _ratio(sum_E2[:, 0], sum_E2[:, 1])[:, None])[..., None])


def _row_squares(u_Boi: Tensor) -> Tensor:
    return torch.linalg.vector_norm(u_Boi, dim=-1).square_()


def _add(sums: Sequence[Tensor], layouts: Sequence[Layout], *, side: int) -> list[Tensor]:
    """Add what the ranks hold that each have a piece along this side of the same matrices."""
    result = list(sums)
    sharded = [index for index, layout in enumerate(layouts) if layout.split_dim == side]
    added = reduce_sums([layouts[index] for index in sharded], [sums[index] for index in sharded])
    for index, total in zip(sharded, added, strict=True):
        result[index] = total
    return result


def _update(held: Sequence[Tensor], mean_Bo: Tensor, decay: float) -> Tensor:
    """Update second moments and return what rows are to be multiplied by, `[B, out]`."""
    parts = mean_Bo.split([len(v_Eo) for v_Eo in held])
    for v_Eo, part_Eo in zip(held, parts, strict=True):
        v_Eo.lerp_(part_Eo.to(v_Eo.dtype), 1 - decay)
    v_Bo = torch.cat(list(held))
    return torch.where(v_Bo > 0, v_Bo.rsqrt(), torch.zeros_like(v_Bo))


def _ratio(before_B: Tensor, after_B: Tensor) -> Tensor:
    """Return what restores the norm, from sums of squares before and after; a zero matrix stays zero."""
    return torch.where(after_B > 0, before_B / after_B, torch.zeros_like(after_B)).sqrt()
