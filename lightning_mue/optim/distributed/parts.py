"""Parts of fused matrices, and second moments of their rows, where matrices are sharded or have replicas.

Shape legend:
    E  matrices (experts) of one parameter on this rank      out, in (o, i)  rows and columns
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from lightning_mue.optim.distributed.layout import Layout
from lightning_mue.optim.distributed.sharding import reduce_sums
from lightning_mue.optim.matrices import Matrix, as_matrices
from lightning_mue.optim.neuron import norm_ratio, row_squares, update_rows
from lightning_mue.optim.split import PartBounds, part_dim, part_views


def sharded_parts(item: Matrix, layout: Layout, cut: PartBounds | None) -> list[tuple[Matrix, Layout]]:
    """This rank's pieces of the parts of a parameter, and how each part lies over the ranks.

    Shards need not end where parts do: a rank may hold nothing of a part.
    """
    if cut is None:
        return [(item, layout)]
    mine = local_cut(layout, cut)
    return list(zip(part_views(item, mine), part_layouts(layout, cut), strict=True))


def local_cut(layout: Layout, cut: PartBounds) -> PartBounds:
    """Where the parts start and end in this rank's piece of the matrices."""
    if layout.split_dim != cut.side:
        return cut
    start = sum(layout.split_sizes[: layout.split_rank])
    stop = start + layout.split_sizes[layout.split_rank]
    inside = [(min(max(a, start), stop) - start, min(max(b, start), stop) - start) for a, b in cut.bounds]
    return PartBounds(cut.side, tuple(inside))


def part_layouts(layout: Layout, cut: PartBounds) -> list[Layout]:
    """How each part of a parameter lies over the ranks; not for what only DTensor can gather."""
    return [
        _part_layout(layout, cut, *bounds) for bounds in zip(cut.bounds, local_cut(layout, cut).bounds, strict=True)
    ]


def _part_layout(layout: Layout, cut: PartBounds, bounds: tuple[int, int], mine: tuple[int, int]) -> Layout:
    dim = part_dim(cut.side, len(layout.shape))
    start, stop = bounds
    sizes = layout.split_sizes
    if layout.split_dim == cut.side:
        ends = list(accumulate(sizes, initial=0))
        sizes = tuple(max(0, min(stop, b) - max(start, a)) for a, b in pairwise(ends))
    return replace(
        layout,
        shape=_with_size(layout.shape, dim, stop - start),
        local_shape=_with_size(layout.local_shape, dim, mine[1] - mine[0]),
        matrix=_with_size(layout.matrix, cut.side, stop - start),
        split_sizes=sizes,
    )


def _with_size(shape: tuple[int, ...], dim: int, size: int) -> Any:
    return (*shape[:dim], size, *shape[dim + 1 :])


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
    squares = _add([row_squares(u_Eoi) for u_Eoi in wide], where, side=1)
    sums, scales = [], []
    for index, square_Eo, layout in zip(chosen, squares, where, strict=True):
        held = rows[index]
        assert held is not None
        scale_Eo = update_rows([held if held.ndim == 2 else held.unsqueeze(0)], square_Eo / layout.matrix[1], decay)
        scales.append(scale_Eo)
        sums.append(torch.stack([square_Eo.sum(-1), (square_Eo * scale_Eo.square()).sum(-1)], dim=-1))
    for u_Eoi, scale_Eo, sum_E2 in zip(wide, scales, _add(sums, where, side=0), strict=True):
        u_Eoi.mul_((scale_Eo * norm_ratio(sum_E2[:, 0], sum_E2[:, 1])[:, None])[..., None])


def _add(sums: Sequence[Tensor], layouts: Sequence[Layout], *, side: int) -> list[Tensor]:
    """Add what the ranks hold that each have a piece along this side of the same matrices."""
    result = list(sums)
    sharded = [index for index, layout in enumerate(layouts) if layout.split_dim == side]
    added = reduce_sums([layouts[index] for index in sharded], [sums[index] for index in sharded])
    for index, total in zip(sharded, added, strict=True):
        result[index] = total
    return result
