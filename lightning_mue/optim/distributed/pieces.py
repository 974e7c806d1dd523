"""A rank's part of a gradient, of norms and of radii, for plain and sharded parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_mue.optim.distributed.layout import Layout, by_expert
from lightning_mue.optim.distributed.sharding import reduce_sums
from lightning_mue.optim.matrices import as_matrices, sum_squares
from lightning_mue.optim.precision import math_dtype
from lightning_mue.sharded import is_sharded, local


def local_grad(param: Tensor) -> Tensor:
    """Return this rank's part of a parameter's gradient, with the parameter's placements."""
    grad = param.grad
    assert grad is not None
    if is_sharded(param) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return local(grad)


def total(layouts: Sequence[Layout], sums: Sequence[Tensor]) -> list[Tensor]:
    """Add each matrix's `[E]` sums over the ranks that hold parts of it; see `reduce_sums`."""
    if not any(layout.sum_groups for layout in layouts):
        return list(sums)
    return [x[:, 0] for x in reduce_sums(layouts, [x[:, None] for x in sums])]


def norms(params: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Tensor]:
    """Return the norms of the matrices that this rank holds, whole or in part, each `[E]` in the math type.

    All ranks must ask for the same parameters in the same order.
    """
    squares = []
    for param in params:
        x_Eoi = as_matrices(local(param))
        squares.append(sum_squares(x_Eoi.to(math_dtype(param.dtype))))
    sums = total(layouts, squares)
    return [square_E.sqrt().to(math_dtype(param.dtype)) for param, square_E in zip(params, sums, strict=True)]


def as_state(radius_E: Tensor, param: Tensor) -> Tensor:
    """Return norms in the form of the state: `[]` for a matrix, `[E]` for a stack, sharded as its experts are."""
    if param.ndim != 3:
        return radius_E.reshape(())
    if not is_sharded(param):
        return radius_E
    from torch.distributed.tensor import DTensor

    placed: Any = param
    placements = by_expert(placed.placements)
    mesh = placed.device_mesh
    return DTensor.from_local(radius_E, mesh, placements, run_check=False, shape=param.shape[:1], stride=(1,))
