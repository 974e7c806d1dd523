"""Experts on a device mesh: what may be shared out, how their parameters are cut, and how they are drawn anew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lightning_mue.moe.experts import Experts


def shard(experts: Experts, mesh: DeviceMesh) -> None:
    """Replace the parameters by their shards, which keep what was noted on them (their roles)."""
    from torch.distributed.tensor import Shard, distribute_tensor

    for name, weight in experts.named_parameters(recurse=False):
        # src_data_rank: every rank cuts its part out of what it holds.
        placed = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        parameter = nn.Parameter(placed, requires_grad=weight.requires_grad)
        parameter.__dict__.update(weight.__dict__)
        experts.register_parameter(name, parameter)


@torch.no_grad()
def normal_(parameter: Tensor, std: float) -> None:
    """Draw from N(0, std^2) what one process draws, wherever the parameter lies.

    On CPU, torch draws the same numbers for every rank's shard of a DTensor: the ranks would hold copies of the same experts.
    So each draws the whole parameter there and keeps its part.
    """
    if not is_sharded(parameter) or local(parameter).device.type != "cpu":
        nn.init.normal_(parameter, std=std)
        return
    from torch.distributed.tensor import distribute_tensor

    placed: Any = parameter
    whole = nn.init.normal_(torch.empty(parameter.shape, dtype=parameter.dtype), std=std)
    local(parameter).copy_(local(distribute_tensor(whole, placed.device_mesh, placed.placements, src_data_rank=None)))


def check_mesh(mesh: Any) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "parallelize_experts needs a process group, and torch.distributed is not initialized. Call it in "
            "configure_model under Lightning's ModelParallelStrategy, or after torch.distributed.init_process_group."
        )
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh is {mesh!r}, but it must be a DeviceMesh. Under ModelParallelStrategy take "
            "self.device_mesh['tensor_parallel']; elsewhere make one with init_device_mesh. Under DDP every rank holds all "
            "experts, and averages their gradients with the others': it cannot share them out."
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh has the dimensions {mesh.mesh_dim_names or tuple(mesh.shape)}, but experts are shared out over one. Take a "
            "part of it, such as mesh['tensor_parallel']."
        )
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"mesh holds the ranks {mesh.mesh.tolist()}, but this is rank {dist.get_rank()}. Take the part with it."
        )


def check_experts(name: str, experts: Experts, mesh: DeviceMesh) -> None:
    if experts.parallel is not None:
        raise ValueError(
            f"{name} is shared out already, over {experts.parallel.mesh} with tokens={experts.parallel.tokens!r}. Make a new "
            "model to share it out in another way."
        )
    if experts.n_experts % mesh.size():
        divisors = [p for p in range(1, experts.n_experts + 1) if experts.n_experts % p == 0]
        raise ValueError(
            f"{name} has n_experts={experts.n_experts}, but the mesh has {mesh.size()} ranks, and every rank must hold as many "
            f"experts as the others. Change one of them; {experts.n_experts} experts go on {', '.join(map(str, divisors))} ranks."
        )
    if any(is_sharded(weight) for weight in experts.parameters()):
        raise ValueError(
            f"{name} holds parameters that are sharded already. Call parallelize_experts first, and fully_shard after it, over "
            "another mesh dimension."
        )


def is_sharded(x: Tensor) -> bool:
    return hasattr(x, "device_mesh") and hasattr(x, "placements")


def local(x: Tensor) -> Tensor:
    """This rank's part, sharing its memory."""
    return x.to_local() if is_sharded(x) else x  # type: ignore[attr-defined]


def cutting_dims(x: Any) -> tuple[Any, tuple[int, ...]]:
    """The mesh of a DTensor and those of its dimensions over which it is cut."""
    if not is_sharded(x):
        return None, ()
    return x.device_mesh, tuple(i for i, placement in enumerate(x.placements) if hasattr(placement, "dim"))
