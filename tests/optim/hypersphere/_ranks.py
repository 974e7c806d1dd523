"""HyperSphereOptimizer on CPU processes: `_ranks.py part rank world_size folder` runs one of `PARTS`.

The tests import this file too, and run the same trainings in one process.
"""

from __future__ import annotations

import contextlib
import sys

import torch
import torch.distributed as dist
from helpers.hypersphere_models import Model, fit, optimizer_of, shard
from helpers.optimizer_traffic import sent_bytes
from helpers.processes import main
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import lightning_mue.optim.distributed.update as distributed_update
import lightning_mue.optim.step as step_module
from lightning_mue.optim import HyperSphereOptimizer
from lightning_mue.optim.distributed.assignment import cost
from lightning_mue.optim.matrices import as_matrices
from lightning_mue.optim.options import COMPUTE_DTYPES

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
STEPS = 20
R, S = Replicate(), Shard

#: Matrices that do not divide by two ranks (5 and 1 rows), stacks of an even, an uneven and too small a number of
#: experts, a convolution, and one parameter for each of Adam's kinds.
SHAPES = {
    "a.weight": (12, 20),
    "b.weight": (20, 12),
    "rows.weight": (5, 9),
    "one.weight": (1, 9),
    "experts": (4, 8, 6),
    "uneven": (5, 8, 6),
    "few": (1, 8, 6),
    "conv.weight": (6, 4, 3, 3),
    "lm_head.weight": (11, 12),
    "embedding.weight": (11, 12),
    "norm.weight": (13,),
}

#: Ranks -> name -> (mesh, placements of a parameter with so many dimensions, None for plain replicas).
LAYOUTS = {
    2: {
        "ddp": ((2,), lambda ndim: None),
        "replicated": ((2,), lambda ndim: [R]),
        "rows": ((2,), lambda ndim: [S(0)]),  # experts over ranks, where they are stacked
        "columns": ((2,), lambda ndim: [S({1: 0, 3: 2}.get(ndim, 1))]),
        "stack rows": ((2,), lambda ndim: [S(1 if ndim == 3 else 0)]),
    },
    4: {
        "hsdp": ((2, 2), lambda ndim: [R, S(0)]),
        "hsdp columns": ((2, 2), lambda ndim: [R, S(0 if ndim == 1 else ndim - 1 if ndim == 3 else 1)]),
        "fsdp x experts": ((2, 2), lambda ndim: [S(1), S(0)] if ndim == 3 else [S(0), R]),
        "fsdp x tensor": ((2, 2), lambda ndim: [S(0), S(0 if ndim == 1 else 1)]),
        "rows": ((4,), lambda ndim: [S(0)]),
        "ddp": ((4,), lambda ndim: None),
    },
}

OPTIONS = {
    "project": {},
    "geodesic": {"retraction": "geodesic"},
    "muon": {"sphere": False, "weight_decay": 0.1, "adamw_lr": 0.01},
    "muon rms": {"sphere": False, "lr_convention": "rms"},
    "given radius": {"radius": 3.0, "weight_decay": 0.1},
    "heavy ball, maximize": {"nesterov": False, "maximize": True},
    "momentum without gradient": {"zero_gradient": "momentum", "weight_decay": 0.1},
    "bfloat16 state": {"state_dtype": "bfloat16"},
    "bfloat16 products": {"compute_dtype": "bfloat16"},
}


def options_of(world, layout):
    """All options where experts and rows lie on two ranks; elsewhere those with sums or factors of their own."""
    if (world, layout) == (2, "rows"):
        return list(OPTIONS)
    few = ((2, "ddp"), (2, "columns"), (4, "fsdp x experts"))
    return ["project", "geodesic", "muon"] if (world, layout) in few else ["project"]


def steps_of(option):
    """Collectives take their time where processes outnumber cores: fewer steps for what is a variant."""
    return STEPS if option in ("project", "geodesic", "muon") else 6


def draw(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights():
    return {name: draw(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}


def gradients(step):
    """Expert 1 of `uneven` gets no token at every other step, and `few` at step 3."""
    grads = {name: draw(shape, 1000 * (step + 1) + i) for i, (name, shape) in enumerate(SHAPES.items())}
    if step % 2:
        grads["uneven"][1] = 0
    if step == 3:
        grads["few"].zero_()
    return grads


def place(whole, layout, mesh):
    """A tensor as this rank has it, sharded by torch."""
    placements = layout(whole.ndim) if mesh is not None else None
    return whole.clone() if placements is None else distribute_tensor(whole, mesh, placements, src_data_rank=None)


def build(layout=None, mesh=None, **options):
    params = {name: nn.Parameter(place(w, layout, mesh)) for name, w in weights().items()}
    group = dist.group.WORLD if mesh is not None and layout(2) is None else None
    options = {"lr": 0.05, "compute_dtype": "float32", "process_group": group, **options}
    return params, HyperSphereOptimizer(params.items(), **options)


def train(params, optimizer, steps, layout=None, mesh=None):
    for step in steps:
        for name, grad in gradients(step).items():
            params[name].grad = place(grad, layout, mesh)
        optimizer.step()


def whole(x):
    return (x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()).clone()


def wholes(params):
    return {name: whole(p) for name, p in params.items()}


def local(x):
    return x.to_local() if isinstance(x, DTensor) else x


def distances(found, wanted):
    """How far weights are apart, relative to their norms."""
    return {name: ((found[name] - w).norm() / w.norm()).item() for name, w in wanted.items()}


# --- What a step does -----------------------------------------------------------------------------------------------


class Spy:
    """Counts this rank's bytes to others, and what Newton-Schulz costs it."""

    def __init__(self):
        self.bytes, self.sums, self.cost, self.matrices = 0, 0, 0, 0

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        for owner, name, mine in (
            (dist, "all_to_all_single", self.swap),
            (dist, GATHER, self.gather),
            (dist, "all_reduce", self.reduce),
            (distributed_update, "orthogonalize_chunk", self.orthogonalize),
            (step_module, "orthogonalize_chunk", self.orthogonalize),
        ):
            real = getattr(owner, name)
            setattr(owner, name, lambda *args, real=real, mine=mine, **kwargs: mine(real, *args, **kwargs))
            self.stack.callback(setattr, owner, name, real)
        return self

    def __exit__(self, *error):
        self.stack.close()

    def swap(self, real, output, input, output_splits, input_splits, group, async_op):
        self.bytes += (sum(input_splits) - input_splits[dist.get_rank(group)]) * input.itemsize
        return real(output, input, output_splits, input_splits, group=group, async_op=async_op)

    def gather(self, real, output, input, group, async_op):
        self.bytes += input.nbytes * (dist.get_world_size(group) - 1)
        return real(output, input, group=group, async_op=async_op)

    def reduce(self, real, tensor, *args, **kwargs):
        self.sums += tensor.nbytes
        return real(tensor, *args, **kwargs)

    def orthogonalize(self, real, u_Boi, *args, **kwargs):
        self.matrices += len(u_Boi)
        self.cost += len(u_Boi) * cost(tuple(u_Boi.shape[1:]))
        return real(u_Boi, *args, **kwargs)


def predicted(optimizer):
    """What `sent_bytes` predicts for the groups that are orthogonalized."""
    groups = [group for group in optimizer.param_groups if group["kind"] in ("sphere", "muon")]
    members = [p for group in groups for p in group["params"]]
    layouts = [optimizer._layout(p) for p in members]
    dtype = COMPUTE_DTYPES[groups[0]["compute_dtype"]]
    traffic = sent_bytes(layouts, torch.float32, dtype)
    return traffic.total - traffic.gathered  # what DTensor gathers does not pass through the functions that Spy knows


def nothing_moves(layout, mesh):
    """Steps with zero gradients and lr 0, as restoring does: before there is state, and in the middle of a run.

    Returns the names of tensors that changed in any bit.
    """
    changed = []
    for steps in (0, 3):
        params, optimizer = build(layout, mesh)
        train(params, optimizer, range(steps), layout, mesh)
        before = {name: local(p).detach().clone() for name, p in params.items()}
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for p in params.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        changed += [f"{name} {steps}" for name, p in params.items() if not torch.equal(before[name], local(p))]
        for group in optimizer.param_groups:  # with an lr, what has no gradient stays on its sphere, too
            group["lr"] = 0.05
        optimizer.step()
        spheres = [n for n in SHAPES if n not in ("embedding.weight", "norm.weight")]
        changed += [f"{name} {steps} lr" for name in spheres if not torch.equal(before[name], local(params[name]))]
    return changed


def agreement(world):
    """Every layout and set of options, from given gradients; the first rank's weights, and all ranks' agreement."""
    report = {}
    for name, (mesh_shape, layout) in LAYOUTS[world].items():
        mesh = init_device_mesh("cpu", mesh_shape)
        for option in options_of(world, name):
            params, optimizer = build(layout, mesh, **OPTIONS[option])
            train(params, optimizer, range(1), layout, mesh)
            with Spy() as spy:
                train(params, optimizer, range(1, 2), layout, mesh)
            train(params, optimizer, range(2, steps_of(option)), layout, mesh)
            report[name, option] = {
                "weights": wholes(params),
                "radii": {
                    n: whole(optimizer.state[p]["radius"]) for n, p in params.items() if "radius" in optimizer.state[p]
                },
                "bytes": spy.bytes,
                "predicted": predicted(optimizer),
                "sums": spy.sums,
                "cost": spy.cost,
                "memory": optimizer.memory(),
            }
        report[name, "changed"] = nothing_moves(layout, mesh)
    return report


def without_communication():
    """A control with other mathematics: every rank orthogonalizes its own piece."""

    def pieces(layouts, directions, fn, **kwargs):
        for index, u in enumerate(directions):
            yield [(index, fn(as_matrices(u).contiguous()).reshape(u.shape) if u.numel() else u)]

    mesh, layout = init_device_mesh("cpu", (2,)), LAYOUTS[2]["rows"][1]
    real, distributed_update.orthogonalize_sharded = distributed_update.orthogonalize_sharded, pieces
    try:
        params, optimizer = build(layout, mesh)
        train(params, optimizer, range(STEPS), layout, mesh)
    finally:
        distributed_update.orthogonalize_sharded = real
    return wholes(params)


def own_experts(rank, process_group):
    """Expert parallelism by hand: plain tensors that hold other experts on each rank, beside true replicas."""
    parts = {"experts": (2, 2), "uneven": (3, 2), "few": (1, 0)}
    start = {name: weights()[name] for name in ("a.weight", "b.weight", *parts)}
    mine = {name: w.split(parts[name])[rank] if name in parts else w for name, w in start.items()}
    params = {name: nn.Parameter(w.clone()) for name, w in mine.items()}
    optimizer = HyperSphereOptimizer(params.items(), lr=0.05, compute_dtype="float32")
    optimizer.process_group = process_group
    for step in range(STEPS):
        for name, p in params.items():
            grad = gradients(step)[name]
            p.grad = grad.split(parts[name])[rank].clone() if name in parts else grad
        try:
            optimizer.step()
        except ValueError as error:
            return str(error)
    return {"weights": {name: p.detach().clone() for name, p in params.items()}, "parts": parts}


def changing_groups(rank):
    """Work that is shared from the third of six steps on, with a matrix that is added after the fourth."""
    params = {name: nn.Parameter(w) for name, w in weights().items()}
    late = params.pop("b.weight")
    optimizer = HyperSphereOptimizer(params.items(), lr=0.05, compute_dtype="float32")
    costs = []
    for step in range(6):
        if step == 2:
            optimizer.process_group = dist.group.WORLD
        if step == 4:
            optimizer.add_param_group({"params": [("b.weight", late)]})
            params["b.weight"] = late
        with Spy() as spy:
            for name, p in params.items():
                p.grad = gradients(step)[name]
            optimizer.step()
        costs.append(spy.cost)
    if rank:  # a parameter that only differs here is found when it is added
        optimizer.add_param_group({"params": [("other.weight", nn.Parameter(draw((4, 6), 1)))]})
    else:
        optimizer.add_param_group({"params": [("other.weight", nn.Parameter(draw((4, 6), 2)))]})
    try:
        optimizer.step()
        message = None
    except ValueError as error:
        message = str(error)
    return {"costs": costs, "weights": wholes(params), "message": message}


def models(rank, world, names):
    report = {}
    for name in names:
        plain = Model()
        model = DistributedDataParallel(plain) if name == "ddp" else shard(plain, name)
        optimizer = optimizer_of(plain, process_group=dist.group.WORLD if name == "ddp" else None)
        with Spy() as spy:
            fit(model, optimizer, range(STEPS), rank, world)
        report[name] = {
            "weights": wholes(dict(plain.named_parameters())),
            "cost": spy.cost,
            "shared": sum(optimizer._layout(p).replicas > 1 for p in plain.parameters() if p.ndim > 1),
            "memory": optimizer.memory(),
        }
    return report


def sharded_experts():
    """Experts sharded over two ranks, and each rank's experts by fully_shard over two more; given gradients."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "experts"))
    names = ("experts", "uneven")
    report = {}
    for side in (0, 1):
        module = nn.ParameterDict(
            {
                name: nn.Parameter(distribute_tensor(weights()[name], mesh["experts"], [S(0)], src_data_rank=None))
                for name in names
            }
        )
        fully_shard(module, mesh=mesh["data"], shard_placement_fn=lambda p, side=side: S(side))
        optimizer = HyperSphereOptimizer(module.named_parameters(), lr=0.05, compute_dtype="float32")
        for step in range(STEPS):
            for name, p in module.named_parameters():
                p.grad = distribute_tensor(gradients(step)[name], p.device_mesh, p.placements, src_data_rank=None)
            optimizer.step()
        report[side] = {
            "weights": wholes(dict(module.named_parameters())),
            "placements": [str(p.placements) for p in module.values()],
            "radii": [list(local(optimizer.state[p]["radius"]).shape) for p in module.values()],
        }
    return report


# --- Running --------------------------------------------------------------------------------------------------------


def two(rank, folder):
    return {
        "agreement": agreement(2),
        "models": models(rank, 2, ("ddp", "rows", "columns")),
        "without communication": without_communication(),
        "own experts": own_experts(rank, None),
        "own experts taken for replicas": own_experts(rank, dist.group.WORLD),
        "changing groups": changing_groups(rank),
    }


def four(rank, folder):
    return {
        "agreement": agreement(4),
        "models": models(rank, 4, ("ddp", "columns", "hsdp")),
        "sharded experts": sharded_experts(),
    }


PARTS = {"two": two, "four": four}


if __name__ == "__main__":
    main(PARTS, *sys.argv[1:])
