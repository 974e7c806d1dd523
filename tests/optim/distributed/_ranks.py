"""What test_sharding.py runs on two and on four CPU processes: `_ranks.py report rank world_size folder`."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from helpers.optimizer_traffic import sent_bytes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_mue.optim.distributed.agreement import check_replicas
from lightning_mue.optim.distributed.layout import layout_of
from lightning_mue.optim.distributed.sharding import orthogonalize_sharded, reduce_sums
from lightning_mue.optim.orthogonal.newton_schulz import orthogonalize

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
R, S = Replicate(), Shard
ALONE, REPLICATED = "alone", "replicated"  # plain tensors: on this rank only, or the same on all
MATRICES = [(6, 8), (8, 6), (5, 7), (1, 9), (9, 1), (6, 8), (16, 4)]  # 5 rows on 2 ranks; 1 row: an empty shard
STACKS = [(4, 5, 6), (3, 6, 4), (1, 4, 4), (5, 1, 3)]
FILTERS = [(6, 4, 3, 3), (5, 3, 2, 2), (4, 2, 2, 2, 2), (1, 2, 3, 3)]


def each(shapes, *hows):
    return [(shape, how) for how in hows for shape in shapes]


MIXED = [
    *each(MATRICES, [S(0)], [S(1)], REPLICATED, ALONE),
    *each(STACKS, [S(0)], [S(1)], [S(2)], [R], REPLICATED, ALONE),
    *each(FILTERS, [S(0)], [S(1)], [S(2)], REPLICATED),
]

#: For each number of ranks: name -> (mesh, [(shape, placements or ALONE or REPLICATED)]).
CASES = {
    2: {
        "rows": ((2,), each(MATRICES, [S(0)])),
        "columns": ((2,), each(MATRICES, [S(1)])),
        "experts": ((2,), each(STACKS, [S(0)])),
        "stack rows": ((2,), each(STACKS, [S(1)])),
        "stack columns": ((2,), each(STACKS, [S(2)])),
        "filters": ((2,), each(FILTERS, [S(0)], [S(1)])),
        "filters gathered": ((2,), each(FILTERS, [S(2)], [S(3)])),
        "ddp": ((2,), each(MATRICES + STACKS + FILTERS, REPLICATED)),
        "replicate": ((2,), each(MATRICES + STACKS, [R])),
        "alone": ((2,), each(MATRICES + STACKS + FILTERS, ALONE)),
        "strided": ((2,), each(MATRICES + STACKS, [_StridedShard(0, split_factor=2)])),
        "mixed": ((2,), MIXED),
        "one each": ((2,), [((1, 9), [S(0)]), ((1, 4, 4), [S(0)]), ((3, 3), REPLICATED)]),
        "one": ((2,), [((4, 6), REPLICATED)]),
    },
    4: {
        "hsdp": ((2, 2), each(MATRICES + STACKS + FILTERS, [R, S(0)], [R, S(1)])),
        "hsdp turned": ((2, 2), each(MATRICES + STACKS, [S(0), R], [S(1), R])),
        "hsdp one": ((2, 2), [((3, 4), [R, S(0)])]),
        "two replicas": ((2, 2), each(MATRICES + STACKS, [R, R])),
        "fsdp x experts": ((2, 2), each(STACKS, [S(1), S(0)], [S(0), S(2)], [_StridedShard(0, split_factor=2), S(0)])),
        "fsdp x tensor": ((2, 2), each(MATRICES, [S(0), S(1)], [_StridedShard(0, split_factor=2), S(0)], [S(1), S(0)])),
        "stack x tensor": ((2, 2), each(STACKS, [S(1), S(2)])),
        "mesh of ones": ((1, 2, 2), each(MATRICES, [S(1), R, S(0)], [S(0), R, R])),
        "all": (
            (2, 2),
            [
                *each(MATRICES, [R, S(0)], [S(0), S(1)], REPLICATED, ALONE),
                *each(STACKS, [S(1), S(0)], [R, R], [R, S(1)], [S(1), S(2)]),
            ],
        ),
    },
}
if torch.__version__ < "2.12":  # whose DTensor cannot gather a strided shard that nothing else cuts
    del CASES[2]["strided"]


def one_by_one(batch):
    """Orthogonalize one matrix at a time, because products of other batch sizes may round differently."""
    return torch.stack([orthogonalize(x, dtype=torch.float32) for x in batch])


def wholes(pairs, dtype=torch.float32):
    """The directions in whole, the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape, _ in pairs]


def expected(whole):
    stack = whole if whole.ndim == 3 else whole.reshape(1, len(whole), -1)
    return one_by_one(stack).reshape(whole.shape)


def place(whole, how, mesh):
    """A parameter as this rank has it, sharded by torch."""
    return nn.Parameter(
        whole.clone() if isinstance(how, str) else distribute_tensor(whole, mesh, how, src_data_rank=None)
    )


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Spy:
    """Counts bytes to other ranks, and notes the order of collectives and of `fn`."""

    def __init__(self):
        self.bytes, self.events, self.matrices = 0, [], 0

    def fn(self, batch):
        assert batch.is_contiguous()
        self.matrices += len(batch)
        self.events.append("fn")
        return one_by_one(batch)

    def __enter__(self):
        self.saved = dist.all_to_all_single, getattr(dist, GATHER)
        dist.all_to_all_single = self.swap
        setattr(dist, GATHER, self.gather)
        return self

    def __exit__(self, *error):
        dist.all_to_all_single = self.saved[0]
        setattr(dist, GATHER, self.saved[1])

    def swap(self, output, input, output_splits, input_splits, group, async_op):
        kept = input_splits[dist.get_rank(group)]
        self.bytes += (sum(input_splits) - kept) * input.itemsize
        self.events.append("swap" if async_op else "blocking")
        return self.saved[0](output, input, output_splits, input_splits, group=group, async_op=async_op)

    def gather(self, output, input, group, async_op):
        self.bytes += input.nbytes * (dist.get_world_size(group) - 1)
        self.events.append("gather" if async_op else "blocking")
        return self.saved[1](output, input, group=group, async_op=async_op)


def check(name, mesh_shape, pairs, dtype=torch.float32, result=torch.float32, bucket_bytes=None):
    """Orthogonalize a case; return which of this rank's pieces differ from torch's shards of the whole results, and more."""
    mesh = init_device_mesh("cpu", mesh_shape)
    whole = wholes(pairs, dtype)
    params = [place(w, how, mesh) for w, (_, how) in zip(whole, pairs, strict=True)]
    layouts = [
        layout_of(p, dist.group.WORLD if how == REPLICATED else None) for p, (_, how) in zip(params, pairs, strict=True)
    ]
    directions = [local(p).detach() for p in params]
    kept = [d.clone() for d in directions]
    with Spy() as spy:
        found = {}
        for done in orthogonalize_sharded(layouts, directions, spy.fn, dtype=result, bucket_bytes=bucket_bytes):
            for index, o in done:
                assert index not in found
                found[index] = o
    wrong = []
    for index, (w, (shape, how)) in enumerate(zip(whole, pairs, strict=True)):
        want, o = local(place(expected(w).to(result), how, mesh)), found[index]
        if not (o.dtype == result and o.shape == want.shape and torch.equal(o, want)):
            wrong.append(f"{shape} {how} {list(o.shape)} {o.dtype}")
    traffic = sent_bytes(layouts, dtype, result, bucket_bytes)
    return {
        "wrong": wrong + [f"changed {i}" for i, k in enumerate(kept) if not torch.equal(k, directions[i])],
        "count": len(found),
        "matrices": spy.matrices,
        "gathers": [bool(layout.gather) for layout in layouts],
        "bytes": spy.bytes,
        "predicted": traffic.total - traffic.gathered,
        "events": spy.events,
        "sums": sums_error(layouts, directions, whole, pairs, mesh),
    }


def sums_error(layouts, directions, whole, pairs, mesh):
    """Largest relative error of squared norms and sums that are added over ranks, against those of the wholes."""
    pieces = [
        d.double().reshape(layout.count, d.numel() // max(1, layout.count))
        for d, layout in zip(directions, layouts, strict=True)
    ]
    sums = reduce_sums(layouts, [torch.stack([p.square().sum(1), p.abs().sum(1)], dim=1) for p in pieces])
    error = 0.0
    for found, layout, w in zip(sums, layouts, whole, strict=True):
        rows = w.double().reshape(len(w) if w.ndim == 3 else 1, -1)[list(layout.indices)]
        want = torch.stack([rows.square().sum(1), rows.abs().sum(1)], dim=1)
        error = max([error, *((found - want).abs() / want).flatten().tolist()])
    return error


def check_fsdp():
    """A model sharded by fully_shard, with the gradients of a backward pass in place of directions."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 9, bias=False), nn.Linear(9, 1, bias=False)
    )
    torch.manual_seed(0)
    sharded = nn.Sequential(
        nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 9, bias=False), nn.Linear(9, 1, bias=False)
    )
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(sharded, mesh=mesh)
    x = torch.randn(4, 7)
    for model in (plain, sharded):
        model(x).square().sum().backward()
    layouts = [layout_of(p) for p in sharded.parameters()]
    grads = [local(p.grad) for p in sharded.parameters()]
    found = dict(
        pair for done in orthogonalize_sharded(layouts, grads, one_by_one, dtype=torch.float32) for pair in done
    )
    errors = []
    for index, p in enumerate(plain.parameters()):
        want = local(distribute_tensor(expected(p.grad), mesh, [S(0)], src_data_rank=None))
        errors.append(float((found[index] - want).abs().max()) if want.numel() else float(found[index].numel()))
    return {"errors": errors, "sizes": [layout.split_sizes for layout in layouts]}


def check_real_function():
    """The package's own batched function; and as a control each rank's piece by itself, which is other mathematics."""
    mesh = init_device_mesh("cpu", (2,))
    whole = [torch.randn(48, 64, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    params = [place(w, [S(0)], mesh) for w in whole]
    pieces = [local(p).detach() for p in params]
    errors, wrong = [], []
    done = orthogonalize_sharded([layout_of(p) for p in params], pieces, orthogonalize, dtype=torch.float32)
    for index, o in (pair for part in done for pair in part):
        want = local(place(orthogonalize(whole[index]), [S(0)], mesh)).detach()
        errors.append(float((o - want).abs().max()))
        wrong.append(float((orthogonalize(pieces[index]) - want).abs().max()))
    return {"errors": errors, "wrong": wrong}


def with_grad(weight, grad):
    param = nn.Parameter(weight)
    param.grad = grad
    return param


def message_of(groups, process_group=None):
    """The error of `check_replicas`, or None."""
    try:
        check_replicas(groups, process_group or dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return None


def check_agreement(rank):
    """`check_replicas` in all its cases, which begin with what is expected: the message on both ranks."""

    def draw(*shape, seed=0):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    def sphere(*params):
        return [{"params": list(params), "kind": "sphere", "param_names": [f"w{i}" for i in range(len(params))]}]

    w, g = draw(40, 50), draw(40, 50, seed=1)
    big = draw(1100, 1001, seed=2)  # more than one chunk
    swapped = g.clone()
    if rank:
        swapped[[0, 1]] = g[[1, 0]]  # the same sums: only the order tells
    late = big.clone()
    if rank:
        late[-1] = big[-1].flip(0)
    good = with_grad(w, g)
    one_more = [good, good][: 1 + rank]
    other_shape = with_grad(w.view(-1, 40 + 10 * rank), g.view(-1, 40 + 10 * rank))
    sharded = place(draw(40, 50, seed=rank), [S(0)], init_device_mesh("cpu", (dist.get_world_size(),)))
    cases = {
        "agree: replicas": sphere(good, good),
        "agree: rounding": sphere(with_grad(w, g * (1 + rank * 1e-6))),
        "agree: bfloat16": sphere(with_grad(w.bfloat16(), g.bfloat16())),
        "agree: big and strided": sphere(with_grad(big.mT, big.mT * 2)),
        "agree: stack": sphere(with_grad(draw(3, 4, 5), draw(3, 4, 5, seed=3))),
        "agree: no gradient": sphere(with_grad(w, None)),
        "agree: zero gradient": sphere(with_grad(w, torch.zeros_like(w))),
        "agree: NaN": sphere(with_grad(w, g * torch.nan)),
        "agree: empty": sphere(with_grad(torch.zeros(0, 3), torch.zeros(0, 3))),
        "agree: other vectors": [{"params": [with_grad(draw(5, seed=rank), None)], "kind": "adamw"}],
        "agree: other shards": sphere(sharded),
        "weights: experts of this rank": sphere(good, with_grad(draw(3, 4, 5, seed=rank), draw(3, 4, 5, seed=3))),
        "weights: a little apart": sphere(good, with_grad(w * (1 + rank * 1e-5), g)),
        "gradient: of this rank": sphere(good, with_grad(w, draw(40, 50, seed=10 + rank))),
        "gradient: a little apart": sphere(good, with_grad(w, g * (1 + rank * 1e-3))),
        "gradient: other order": sphere(good, with_grad(w, swapped)),
        "gradient: other order at the end": sphere(good, with_grad(w.new_ones(1100, 1001), late)),
        "gradient: on one rank": sphere(good, with_grad(w, g if rank else None)),
        "gradient: NaN on one rank": sphere(good, with_grad(w, g * torch.nan if rank else g)),
        "list: other lengths": sphere(*one_more),
        "list: other shapes": sphere(other_shape, good),
        "list: other dtypes": sphere(with_grad(w.to((torch.float32, torch.float64)[rank]), None)),
        "list: other groups": sphere(good, good) if rank else sphere(good) + sphere(good),
        "agree: other groups of shards": sphere(sharded) * rank + sphere(good),
        "agree: other groups of vectors": [{"params": [], "kind": "adamw"}] * rank + sphere(good),
        "list: empty on one rank": sphere(*([good, good] if rank else [])),
    }
    found = {name: message_of(groups) for name, groups in cases.items()}
    found["agree: group"] = message_of(sphere(good), dist.new_group([0, 1]))
    alone = [dist.new_group([number]) for number in (0, 1)][rank]
    found["agree: group of one"] = message_of(sphere(with_grad(draw(4, 5, seed=rank), None)), alone)
    return found


def report(rank, folder):
    """All cases of so many ranks."""
    world = dist.get_world_size()
    found = {name: check(name, *case) for name, case in CASES[world].items()}
    largest = "mixed" if world == 2 else "all"
    for name, kwargs in {
        "small buckets": {"bucket_bytes": 1},
        "bf16 results": {"result": torch.bfloat16, "bucket_bytes": 500},
        "bf16": {"dtype": torch.bfloat16, "result": torch.bfloat16},
    }.items():
        found[name] = check(name, *CASES[world][largest], **kwargs)
    if world == 2:
        found["many buckets"] = check("", (2,), [((8, 6), [S(0)])] * 12, bucket_bytes=8 * 6 * 4)
        found["many replicated"] = check("", (2,), [((8, 6), REPLICATED)] * 12, bucket_bytes=2 * 8 * 6 * 4)
        found |= {"fsdp": check_fsdp(), "real": check_real_function(), "replicas": check_agreement(rank)}
    return found


if __name__ == "__main__":
    from helpers.processes import main  # not above: what collects doctests imports this file from elsewhere

    main({"report": report}, *sys.argv[1:])
