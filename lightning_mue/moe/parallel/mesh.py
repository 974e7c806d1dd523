"""Shards experts over a device mesh, and checks that they can be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from lightning_mue.checks import listed, mismatch, type_error, value_error
from lightning_mue.moe.experts import Experts
from lightning_mue.sharded import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(experts: Experts, mesh: DeviceMesh) -> None:
    """Replaces the parameters by their shards, which keep the attributes noted on them (their roles)."""
    from torch.distributed.tensor import Shard, distribute_tensor

    for name, weight in experts.named_parameters(recurse=False):
        # src_data_rank=None: every rank takes its shard from the weights that it holds.
        placed = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
        parameter = nn.Parameter(placed, requires_grad=weight.requires_grad)
        parameter.__dict__.update(weight.__dict__)
        experts.register_parameter(name, parameter)


def check_mesh(mesh: Any) -> None:
    """Checks that experts can be sharded over a mesh: it has one dimension, and holds this rank."""
    if not (dist.is_available() and dist.is_initialized()):
        do = "Call it in configure_model under Lightning's ModelParallelStrategy, or after init_process_group."
        expected = "that torch.distributed is initialized"
        raise RuntimeError(mismatch("parallelize_experts", found="no process group", expected=expected, do=do))
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise type_error(
            "mesh",
            found=repr(mesh),
            expected="a DeviceMesh",
            do="Under ModelParallelStrategy take self.device_mesh['tensor_parallel']; elsewhere make one with "
            "init_device_mesh. Under DDP experts cannot be sharded: every rank holds all of them.",
        )
    if mesh.ndim != 1:
        found = f"the dimensions {mesh.mesh_dim_names or tuple(mesh.shape)}"
        do = "Take a part of it, such as mesh['tensor_parallel']."
        raise value_error("mesh", found=found, expected="one dimension", do=do)
    if mesh.get_coordinate() is None:
        expected = f"one that holds this rank, {dist.get_rank()}"
        do = "Take the part of the mesh with this rank."
        raise value_error("mesh", found=f"the ranks {mesh.mesh.tolist()}", expected=expected, do=do)


def check_experts(name: str, experts: Experts, mesh: DeviceMesh) -> None:
    """Checks that experts are whole, and that the ranks of a mesh can hold equally many; `name` is for the message."""
    if experts.parallel is not None:
        found = f"experts that are sharded already, by {experts.parallel}"
        do = "Make a new model to shard it differently."
        raise value_error(name, found=found, expected="whole experts", do=do)
    if experts.n_experts % mesh.size():
        divisors = [p for p in range(1, experts.n_experts + 1) if experts.n_experts % p == 0]
        expected = f"a multiple of the {mesh.size()} ranks of the mesh: every rank holds equally many experts"
        do = f"Change one of them; {experts.n_experts} experts can be on {listed(divisors)} ranks."
        raise value_error(f"{name}.n_experts", found=experts.n_experts, expected=expected, do=do)
    if any(is_sharded(weight) for weight in experts.parameters()):
        do = "Call parallelize_experts first, and fully_shard after it, over another mesh dimension."
        raise value_error(name, found="parameters that are sharded already", expected="whole parameters", do=do)
