"""How many bytes a rank sends in an optimizer step, predicted from the layouts."""

from __future__ import annotations

import math
from typing import NamedTuple

from lightning_mue.optim.distributed.assignment import assign_matrices, default_bucket_bytes


class SentBytes(NamedTuple):
    """Bytes that this rank sends to others in a step.

    Attributes:
        pieces: Pieces of directions, to the ranks that orthogonalize the matrices (all-to-all).
        results: Pieces of orthogonalized matrices, back (all-to-all).
        replicas: Results for the ranks that hold replicas (all-gather, with its padding).
        gathered: Whole tensors of the layouts that only DTensor can gather (all-gather, without padding).
    """

    pieces: int = 0
    results: int = 0
    replicas: int = 0
    gathered: int = 0

    @property
    def total(self):
        return sum(self)


def sent_bytes(layouts, direction_dtype, result_dtype, bucket_bytes=None):
    """What `orthogonalize_sharded` makes this rank send in a step on CPU; `reduce_sums` adds some bytes a matrix.

    An all-gather sends a rank's part to each of the others, as counted here, or passes it around a ring; the volume is
    the same.
    """
    limit = bucket_bytes or default_bucket_bytes("cpu")
    pieces = results = replicas = gathered = 0
    buffers = (direction_dtype,) * len(layouts)
    for bucket in assign_matrices(tuple(layouts), buffers, direction_dtype.itemsize, limit):
        layout = bucket.layout
        others = range(layout.splits)
        if layout.gather:
            whole, local = math.prod(layout.shape), math.prod(layout.local_shape)
            gathered += (whole - local) * direction_dtype.itemsize
            continue
        me, replica = layout.split_rank, layout.replica_rank
        pieces += sum(bucket.numel(replica, s, me) for s in others if s != me) * direction_dtype.itemsize
        results += sum(bucket.numel(replica, me, s) for s in others if s != me) * result_dtype.itemsize
        replicas += bucket.longest * (layout.replicas - 1) * result_dtype.itemsize
    return SentBytes(pieces, results, replicas, gathered)
