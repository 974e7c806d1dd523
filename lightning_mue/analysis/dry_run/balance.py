"""How evenly the optimizer's work is spread over the ranks.

Shape legend: S ranks that a matrix is sharded over, C replicas of those ranks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from lightning_mue.analysis.dry_run.world import Place, coordinate, local_shape
from lightning_mue.optim.distributed.assignment import Bucket, assign_matrices, cost, default_bucket_bytes
from lightning_mue.optim.distributed.layout import Layout, layout_of
from lightning_mue.optim.distributed.parts import part_layouts
from lightning_mue.optim.distributed.update import rounds
from lightning_mue.optim.hypersphere import HyperSphereOptimizer
from lightning_mue.optim.orthogonal.coefficients import PRESETS
from lightning_mue.optim.precision import math_dtype
from lightning_mue.optim.split import cut_of
from lightning_mue.parameterizations.rules.kinds import MUON_KINDS, parts_of
from lightning_mue.sharded import is_sharded


class Work(NamedTuple):
    """Work of an optimizer step, a number for each rank: ``what`` in ``unit``."""

    what: str
    unit: str
    by_rank: list[float]

    @property
    def mean(self) -> float:
        """Of all ranks."""
        return sum(self.by_rank) / len(self.by_rank)

    @property
    def imbalance(self) -> float:
        """The largest over the mean; 1 if there is no work."""
        return max(self.by_rank) / self.mean if any(self.by_rank) else 1.0


def optimizer_work(optimizers: Sequence[Optimizer], ranks: Sequence[Place]) -> list[Work]:
    """The numbers that each rank updates, and the FLOPs of orthogonalization in its share of the matrices."""
    params = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    elements = [float(sum(math.prod(local_shape(p, place)) for p in params)) for place in ranks]
    work = [Work("weights stepped", "numbers", elements)]
    own = [optimizer for optimizer in optimizers if isinstance(optimizer, HyperSphereOptimizer)]
    groups = [
        (o, group) for o in own for each in o.param_groups for group in parts_of(each) if group["kind"] in MUON_KINDS
    ]
    if groups:
        flops = [0.0] * len(ranks)
        for optimizer, group in groups:
            _add(flops, optimizer, group, ranks)
        work.append(Work("orthogonalization", "FLOP", flops))
    return work


def _add(flops: list[float], optimizer: HyperSphereOptimizer, group: Any, ranks: Sequence[Place]) -> None:
    """Adds the FLOPs of a param group: a multiplication is two, and each step of the schedule takes `cost` multiplications."""
    scale = 2.0 * len(PRESETS[group["preset"]].steps)
    layouts = {param: layout_of(param, optimizer.process_group) for param in group["params"] if param.requires_grad}
    alone = [param for param, layout in layouts.items() if not layout.is_distributed]
    shared = [param for param, layout in layouts.items() if layout.is_distributed]
    for members in (*([param] for param in alone), *rounds(shared)):
        parts = [part for param in members for part in _parts(param, layouts[param], group)]
        known: dict[tuple[int, ...], tuple[Bucket, ...]] = {}  # ranks with equally many matrices assign them alike
        for rank, place in enumerate(ranks):
            here = [_at(param, layout, rank, place) for param, layout in parts]
            counts = tuple(layout.count for layout in here)
            if counts not in known:
                buffers = (members[0].dtype,) * len(here)
                itemsize, limit = math_dtype(members[0].dtype).itemsize, default_bucket_bytes(members[0].device)
                known[counts] = assign_matrices(tuple(here), buffers, itemsize, limit)
            flops[rank] += scale * sum(_cost(bucket, here) for bucket in known[counts])


def _parts(param: Tensor, layout: Layout, group: Any) -> Iterator[tuple[Tensor, Layout]]:
    cut = cut_of(group.get("split"), param.shape)
    for each in [layout] if cut is None else part_layouts(layout, cut):
        yield param, each


def _at(param: Any, layout: Layout, rank: int, place: Place) -> Layout:
    """The layout as another rank sees it: how many matrices it holds, and its number among those that share them."""
    if not is_sharded(param):
        return replace(layout, replica_rank=rank) if layout.replicas > 1 else layout
    at, sizes, stacked = coordinate(param, place), param.device_mesh.shape, param.ndim == 3
    split = replica = 0
    for number, size, placement in zip(at, sizes, param.placements, strict=True):
        if placement.is_replicate():
            replica = replica * size + number
        elif not (stacked and placement.dim == 0):
            split = split * size + number
    return replace(
        layout,
        indices=tuple(range(local_shape(param, place)[0] if stacked else 1)),
        split_rank=split if layout.split_sizes else 0,
        replica_rank=replica if layout.replicas > 1 else 0,
    )


def _cost(bucket: Bucket, here: Sequence[Layout]) -> int:
    """Cost of what this rank orthogonalizes of a bucket, whose parameters are all on the same ranks."""
    param = next(each.ranges[0].param for of_one in bucket.assignments for each in of_one)
    mine = bucket.assigned(here[param].replica_rank, here[param].split_rank)
    return sum(each.size * cost(each.shape.matrix) for each in mine)
