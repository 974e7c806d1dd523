"""Which plain parameters are true copies: the same weights and the same gradients on all ranks of a group."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mue.sharded import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

#: How far copies may be apart, relative to the tensor's norm. Weights start from one broadcast or one seed; an
#: all-reduced gradient is the same on all ranks but for round-off at most.
WEIGHT_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-4
_ROW = 1 << 16  # numbers that share one sequence of cosines
_CHUNK = 1 << 20  # numbers that are in float64 at a time


@torch.no_grad()
def find_copies(params: Iterable[Tensor], process_group: ProcessGroup | None = None) -> list[bool]:
    """Decide for each parameter whether every rank holds it and steps it by the same gradient, as DDP has it.

    Only then may ranks share out its orthogonalization and take each other's results. Compared are shapes, dtypes and,
    of weight and gradient, the sum, the sum of squares and a weighted sum. To be called once, after a backward pass,
    by all ranks of the group; all get the same answer for the parameters that they share.

    No copies, so: experts held as different plain tensors on different ranks; gradients that are not synchronized
    (local SGD); a gradient that is missing anywhere; one that is zero everywhere, which proves nothing; NaN; sharded
    parameters (their placements tell); everything, if ranks hold different lists of parameters.

    Args:
        params: The parameters, in the same order on all ranks.
        process_group: The group; None means all ranks.

    Returns:
        A flag for each parameter. All are False without torch.distributed or in a group of one.
    """
    params = list(params)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(process_group) <= 1:
        return [False] * len(params)
    # Gathers the lengths first, so ranks with different lists do not hang.
    ranks: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(ranks, [_fingerprint(param) for param in params], group=process_group)
    if len({len(prints) for prints in ranks}) > 1 or any(_kinds(prints) != _kinds(ranks[0]) for prints in ranks):
        return [False] * len(params)
    return [all(_agree(prints[i], ranks[0][i]) for prints in ranks) for i in range(len(params))]


_Sums = tuple[float, float, float]
_Print = tuple[tuple[int, ...], str, _Sums, _Sums]


def _kinds(prints: Sequence[_Print]) -> list[tuple[Any, ...]]:
    return [prints_of[:2] for prints_of in prints]


def _fingerprint(param: Tensor) -> _Print:
    missing = (math.nan,) * 3
    if is_sharded(param):
        return tuple(param.shape), str(param.dtype), missing, missing
    grad = missing if param.grad is None or param.grad.is_sparse else _sums(param.grad)
    return tuple(param.shape), str(param.dtype), _sums(param), grad


def _sums(x: Tensor) -> _Sums:
    """Return the sum, the sum of squares and a sum that depends on the order, each in float64."""
    cosines = torch.arange(_ROW, device=x.device, dtype=torch.float64).mul_(1.3).add_(0.5).cos_()
    totals = torch.zeros(3, device=x.device, dtype=torch.float64)
    for number, chunk in enumerate(_chunks(x.detach())):
        rows = torch.nn.functional.pad(chunk, (0, -len(chunk) % _ROW)).view(-1, _ROW)
        places = torch.arange(len(rows), device=x.device, dtype=torch.float64).add_(number * _CHUNK // _ROW + 1)
        totals += torch.stack([rows.sum(), rows.square().sum(), (rows @ cosines) @ places.cos()])
    first, second, third = totals.tolist()
    return first, second, third


def _chunks(x: Tensor) -> Iterator[Tensor]:
    # Not `flatten().double()`: nothing as big as the parameter is made (an odd stride costs one copy in its dtype).
    return (part.double() for part in x.flatten().split(_CHUNK))


def _agree(one: _Print, other: _Print) -> bool:
    """Compare two ranks' prints of one parameter; NaN agrees with nothing."""
    if one[3][1] == 0:
        return False
    return _close(one[2], other[2], WEIGHT_TOLERANCE) and _close(one[3], other[3], GRADIENT_TOLERANCE)


def _close(one: _Sums, other: _Sums, tolerance: float) -> bool:
    square = max(one[1], other[1])
    limits = (tolerance * math.sqrt(square), tolerance * square, tolerance * math.sqrt(square))
    return all(abs(a - b) <= limit for a, b, limit in zip(one, other, limits, strict=True))
