"""What test_split_ranks.py runs on CPU processes: `_split_ranks.py report rank world_size folder`."""

from __future__ import annotations

import sys

import torch
from helpers.hypersphere_steps import normal
from helpers.processes import main
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_mue.optim import HyperSphereOptimizer

R, S = Replicate(), Shard
#: Name -> (shape, split). Parts end where shards do, inside of them, and leave ranks without rows; `plain` is whole.
PARAMETERS = {
    "qkv": ((12, 8), 3),
    "grouped": ((11, 8), [7, 2, 2]),
    "turned": ((8, 12), {"columns": 3}),
    "experts": ((4, 10, 6), 2),
    "unequal": ((3, 10, 6), [7, 3]),
    "plain": ((9, 6), None),
}
#: Ranks -> name -> (mesh, placements of a parameter of two dimensions, of three); None for plain replicas.
LAYOUTS = {
    2: {
        "ddp": ((2,), None, None),
        "rows": ((2,), [S(0)], [S(0)]),
        "columns": ((2,), [S(1)], [S(2)]),
        "stack rows": ((2,), [R], [S(1)]),
    },
    4: {
        "rows": ((4,), [S(0)], [S(1)]),
        "hsdp": ((2, 2), [R, S(0)], [R, S(1)]),
        "fsdp x experts": ((2, 2), [S(1), R], [S(1), S(0)]),
    },
}
OPTIONS = {"sphere": {}, "neuron": {"normalize": "neuron"}, "muon": {"sphere": False, "normalize": "neuron"}}


def placed(whole, layout, mesh):
    placements = layout[len(whole.shape) - 1] if layout else None
    return whole.clone() if placements is None else distribute_tensor(whole, mesh, placements, src_data_rank=None)


def train(option, layout=None, mesh=None, group=None):
    """Weights, radii and second moments after four steps, whole."""
    params = {}
    for number, (name, (shape, split)) in enumerate(PARAMETERS.items()):
        if isinstance(split, dict) and "normalize" in OPTIONS[option]:
            continue
        params[name] = nn.Parameter(placed(normal(shape, number, torch.float64), layout, mesh))
        params[name].mue_split = split
    options = {"lr": 0.05, "compute_dtype": "float64", "split": "auto", "process_group": group, **OPTIONS[option]}
    optimizer = HyperSphereOptimizer(params.items(), **options)
    for step in range(4):
        for number, (name, param) in enumerate(params.items()):
            grad = normal(PARAMETERS[name][0], 100 * (step + 1) + number, torch.float64)
            param.grad = placed(grad, layout, mesh)
        optimizer.step()
    result = {}
    for name, param in params.items():
        found = {"weight": param.detach(), **optimizer.state[param]}
        result |= {f"{name} {key}": x.full_tensor() if isinstance(x, DTensor) else x for key, x in found.items()}
    # Radii and second moments of rows that are sharded are compared where they are whole.
    return {key: x.clone() for key, x in result.items()}


def refused(mesh):
    """What is said of matrices that are sharded over two dimensions of a mesh."""
    messages = []
    for options in ({"split": 2}, {"normalize": "neuron"}):
        param = nn.Parameter(distribute_tensor(normal((8, 8), 1), mesh, [S(0), S(1)], src_data_rank=None))
        optimizer = HyperSphereOptimizer([{"params": [("w", param)], "kind": "sphere"}], **options)
        param.grad = torch.ones_like(param)
        try:
            optimizer.step()
        except ValueError as error:
            messages.append(str(error))
    return messages


def report(rank, folder):
    world = torch.distributed.get_world_size()
    found = {}
    for name, (mesh_shape, *layout) in LAYOUTS[world].items():
        mesh = init_device_mesh("cpu", mesh_shape)
        group = torch.distributed.group.WORLD if layout[0] is None else None
        for option in OPTIONS:
            found[f"{name}, {option}"] = train(option, [None, *layout], mesh, group)
    if world == 4:
        found["refused"] = refused(init_device_mesh("cpu", (2, 2)))
    return found


if __name__ == "__main__":
    main({"report": report}, *sys.argv[1:])
