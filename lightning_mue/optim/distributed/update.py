"""The step of matrices that several ranks hold, whole or in parts; all ranks take it together.

Shape legend:
    B  matrices in a batch            E  matrices (experts) of one parameter on this rank
    out, in (o, i)  rows and columns
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_mue.optim.distributed.layout import Layout
from lightning_mue.optim.distributed.parts import normalize_sharded_rows
from lightning_mue.optim.distributed.sharding import orthogonalize_sharded, reduce_sums
from lightning_mue.optim.matrices import Matrix, Pool, as_matrices, moving, write_back
from lightning_mue.optim.options import StepOptions, is_zero
from lightning_mue.optim.orthogonal.coefficients import PRESETS
from lightning_mue.optim.orthogonal.newton_schulz import orthogonalize_chunk
from lightning_mue.optim.precision import default_dtype, math_dtype
from lightning_mue.optim.retraction import MatrixBatch, apply_directions
from lightning_mue.optim.step import accumulate, direction

#: Bytes of whole matrices that are communicated and stepped together, which bounds the scratch memory.
_ROUND_BYTES = 1 << 30


def rounds(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Divide a list into rounds of one dtype and of at most `_ROUND_BYTES` in the math type, the same on all ranks.

    A parameter that is larger has a round of its own. The dtype determines the type of a round's products.
    """
    batch: list[Tensor] = []
    size = 0
    for param in params:
        more = param.numel() * math_dtype(param.dtype).itemsize  # of the whole parameter, on every rank
        if batch and (size + more > _ROUND_BYTES or param.dtype != batch[0].dtype):
            yield batch
            batch, size = [], 0
        batch.append(param)
        size += more
    if batch:
        yield batch


def muon_update_distributed(items: Sequence[Matrix], layouts: Sequence[Layout], step: StepOptions) -> int:
    """Take one step of Muon on matrices that other ranks hold too, or parts of; a collective.

    The items have one dtype, and all are on the sphere or all off it; `step` is without the factor of a shape.

    Returns:
        Bytes of scratch memory, without the buffers of the communication.
    """
    for item in items:
        accumulate([item.momentum], [item.grad], step)
    if is_zero(step.lr):
        return 0
    schedule = PRESETS[step.preset]
    dtype = step.dtype or default_dtype(items[0].weight)

    def orthogonalize(u_Boi: Tensor) -> Tensor:
        return orthogonalize_chunk(u_Boi, schedule, dtype, Pool(), compile=step.compile)

    wide = [torch.empty_like(item.weight, dtype=math_dtype(item.weight.dtype)) for item in items]
    for item, u in zip(items, wide, strict=True):
        direction(item.momentum, item.grad, step, out=u)
    for done in orthogonalize_sharded(layouts, wide, orthogonalize, dtype=dtype):
        for index, result in done:
            wide[index].copy_(result)  # all of it has been sent
    normalize_sharded_rows(wide, [item.rows for item in items], layouts, step.betas[1])
    if items[0].radius is not None:
        apply_to_parts(items, layouts, wide, step)
    else:
        for item, layout, u in zip(items, layouts, wide, strict=True):
            apply_to_parts([item], [layout], [u], step.for_matrix(layout.matrix))
    return sum(u.nbytes for u in wide)


def apply_to_parts(
    items: Sequence[Matrix], layouts: Sequence[Layout], directions: Sequence[Tensor], step: StepOptions
) -> None:
    """Step parameters, or this rank's parts of them, along directions that are overwritten."""
    weights = [as_matrices(item.weight) for item in items]
    moves = [
        moving([item], as_matrices(u), step.zero_gradient).to(torch.float64)
        for item, u in zip(items, directions, strict=True)
    ]
    counts = reduce_sums(layouts, moves)
    radii = [None if item.radius is None else item.radius.reshape(-1) for item in items]
    batches = [
        MatrixBatch([w_Eoi], as_matrices(u), radius_E, count_E > 0)
        for w_Eoi, u, radius_E, count_E in zip(weights, directions, radii, counts, strict=True)
    ]
    apply_directions(batches, step, lambda sums: reduce_sums(layouts, sums))
    write_back([item.weight for item in items], weights)
