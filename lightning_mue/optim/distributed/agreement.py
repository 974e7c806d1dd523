"""Checks that the ranks of a process group really hold replicas, before they rely on each other's results."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.optim.groups import label_in
from lightning_mue.parameterizations.rules.kinds import MUON_KINDS
from lightning_mue.sharded import is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

logger = logging.getLogger(__name__)

#: How far replicas may be apart, relative to the tensor's norm. Weights start from one broadcast or one seed; all-reduced
#: gradients are the same on all ranks up to rounding.
WEIGHT_TOLERANCE = 1e-6
GRADIENT_TOLERANCE = 1e-4
_CHUNK = 1 << 20  # numbers that are in float64 at a time

_Checksum = tuple[float, float]


class _Fingerprint(NamedTuple):
    """What a rank tells the others about one parameter."""

    label: str
    shape: tuple[int, ...]
    dtype: str
    group: int  # number of its param group among those with plain matrices: each is communicated by itself
    weight: _Checksum
    gradient: _Checksum | None


@torch.no_grad()
def check_replicas(groups: Iterable[Mapping[str, Any]], process_group: ProcessGroup) -> None:
    """Check that all ranks hold the same plain matrices, with the same weights and gradients up to rounding.

    One collective, which gathers a few numbers for each matrix of the optimizer's groups and does not hang if ranks list
    different ones.

    Raises:
        ValueError: On all ranks, naming the first parameter that differs, if they do not agree.
    """
    size = dist.get_world_size(process_group)
    if size <= 1:  # -1 where this rank is not in the group
        return
    shared = [
        [(param, label_in(group, index)) for index, param in enumerate(group["params"]) if not is_sharded(param)]
        for group in groups
        if group["kind"] in MUON_KINDS
    ]
    own = [_fingerprint(*each, number) for number, plain in enumerate(filter(None, shared)) for each in plain]
    ranks: list[Any] = [None] * size
    dist.all_gather_object(ranks, own, group=process_group)
    for index in range(max(map(len, ranks))):
        first, *others = (prints[index] if index < len(prints) else None for prints in ranks)
        for rank, other in enumerate(others, 1):
            if difference := _difference(first, other):
                expected, found = f"{difference[0]} as on its rank 0", f"{difference[1]} on rank {rank} of the group"
                do = (
                    "Pass a group of ranks that hold the same plain parameters in the same param groups and synchronize "
                    "gradients (DDP), or None. DDP synchronizes only what was trainable when it wrapped the model."
                )
                raise value_error("process_group", found=found, expected=expected, do=do)
    log = logger.info if dist.get_rank(process_group) == 0 else logger.debug
    log("HyperSphereOptimizer: %d ranks share the work on %d plain matrices.", size, len(own))


def _difference(first: _Fingerprint | None, other: _Fingerprint | None) -> tuple[str, str] | None:
    """Return what the two ranks have in words, or None if they agree."""
    if first is None or other is None:
        missing = "no further matrix"
        return first.label if first else missing, other.label if other else missing
    if (first.shape, first.dtype) != (other.shape, other.dtype):
        return f"{first.label} ({first.dtype})", f"{other.label} ({other.dtype})"
    if first.group != other.group:
        return f"{first.label} in matrix group {first.group}", f"{other.label} in matrix group {other.group}"
    if not _close(first.weight, other.weight, WEIGHT_TOLERANCE):
        return f"the weights of {first.label}", f"other weights of {other.label}"
    if (first.gradient is None) != (other.gradient is None):
        words = ("no gradient", "a gradient") if first.gradient is None else ("a gradient", "no gradient")
        return f"{words[0]} of {first.label}", f"{words[1]} of {other.label}"
    if first.gradient and other.gradient and not _close(first.gradient, other.gradient, GRADIENT_TOLERANCE):
        return f"the gradient of {first.label}", f"another gradient of {other.label}"
    return None


def _fingerprint(param: Tensor, label: str, group: int) -> _Fingerprint:
    gradient = None if param.grad is None or param.grad.is_sparse else _checksum(param.grad)
    return _Fingerprint(label, tuple(param.shape), str(param.dtype), group, _checksum(param), gradient)


def _checksum(x: Tensor) -> _Checksum:
    """Return the sum of squares, and a sum with a weight for each position, in float64."""
    weights = torch.arange(min(_CHUNK, x.numel()), device=x.device, dtype=torch.float64).mul_(1.3).add_(0.5).cos_()
    sums = torch.zeros(2, device=x.device, dtype=torch.float64)
    # In chunks, so that nothing as large as the parameter is converted; `flatten` copies only what has odd strides.
    for number, chunk in enumerate(x.detach().flatten().split(_CHUNK), 1):
        wide = chunk.double()
        sums += torch.stack([wide.square().sum(), wide @ weights[: len(wide)] * math.cos(number)])
    square, weighted = sums.tolist()
    return square, weighted


def _close(one: _Checksum, other: _Checksum, tolerance: float) -> bool:
    """Whether two checksums agree up to rounding; two with a NaN or an infinity agree."""
    if not all(map(math.isfinite, (*one, *other))):
        return not any(map(math.isfinite, (one[0], other[0])))
    square = max(one[0], other[0])
    return abs(one[0] - other[0]) <= tolerance * square and abs(one[1] - other[1]) <= tolerance * math.sqrt(square)
