"""Initial weights: normal draws for plain and sharded parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_mue.sharded import is_sharded, local


@torch.no_grad()
def normal_(parameter: Tensor, std: float) -> None:
    """Draws a parameter from N(0, std^2), in place; a DTensor gets the values that one process would draw.

    On the CPU torch draws the same numbers for every rank's shard of a DTensor, so that all ranks would hold equal experts.
    There each rank draws the whole parameter and keeps its shard.
    """
    if not is_sharded(parameter) or local(parameter).device.type != "cpu":
        nn.init.normal_(parameter, std=std)
        return
    from torch.distributed.tensor import distribute_tensor

    placed: Any = parameter
    whole = nn.init.normal_(torch.empty(parameter.shape, dtype=parameter.dtype), std=std)
    local(parameter).copy_(local(distribute_tensor(whole, placed.device_mesh, placed.placements, src_data_rank=None)))
