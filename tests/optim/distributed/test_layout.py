"""Layouts and assignment on larger meshes, without communication: each rank is played in turn."""

from __future__ import annotations

import math
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from helpers.optimizer_traffic import sent_bytes
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from lightning_mue.optim.distributed.assignment import assign, assign_matrices, cost
from lightning_mue.optim.distributed.layout import Layout, layout_of
from lightning_mue.optim.distributed.sharding import orthogonalize_sharded, reduce_sums

DENSE = [shape for _ in range(12) for shape in [(512, 512)] * 4 + [(1408, 512)] * 2 + [(512, 1408)]]


@contextmanager
def rank_of(rank, world):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def sharded(shape, mesh, placements):
    return distribute_tensor(torch.zeros(shape), mesh, placements, src_data_rank=None)


def replicated(shapes, workers, rank=0):
    return [
        Layout(s, s, s[-2:], tuple(range(s[0] if len(s) == 3 else 1)), replica_rank=rank, replicas=workers)
        for s in shapes
    ]


def buckets_of(layouts, bucket_bytes=1 << 40):
    return assign_matrices(tuple(layouts), (torch.float32,) * len(layouts), 4, bucket_bytes)


def loads_of(buckets, workers):
    loads = [0] * workers
    for bucket in buckets:
        for worker, assigned in enumerate(bucket.assignments):
            loads[worker] += sum(each.size * cost(each.shape.matrix) for each in assigned)
    return loads


@pytest.mark.parametrize("bucket_bytes", [1 << 40, 4 << 20, 1])
@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_work_is_shared_evenly(seed, workers, bucket_bytes):
    generator = torch.Generator().manual_seed(seed)
    shapes = [tuple(torch.randint(64, 1024, (2,), generator=generator).tolist()) for _ in range(30)]
    loads = loads_of(buckets_of(replicated(shapes, workers), bucket_bytes), workers)
    assert sum(loads) == sum(map(cost, shapes))
    assert max(loads) <= 1.34 * sum(loads) / workers


def test_negative_control_assigning_in_turn_is_not_even():
    worst = 0.0
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        shapes = [tuple(torch.randint(64, 1024, (2,), generator=generator).tolist()) for _ in range(30)]
        loads = [sum(map(cost, shapes[worker::4])) for worker in range(4)]
        worst = max(worst, 4 * max(loads) / sum(loads))
    assert worst > 1.34


def test_cost_follows_the_counted_flops():
    # docs/derivations/hypersphere.md: 20 r + 10 in units of n^3.
    assert cost((512, 1024)) / cost((512, 512)) == pytest.approx((20 * 2 + 10) / (20 + 10))
    assert cost((512, 1408)) == cost((1408, 512))
    assert cost((1024, 1024)) == 8 * cost((512, 512))


def test_items_go_to_the_least_loaded_and_loads_are_kept():
    loads = [5, 0, 0]
    assert assign([4, 4, 3, 3, 1], loads) == [1, 2, 1, 2, 0]
    assert loads == [6, 7, 7]


@pytest.mark.parametrize("bucket_bytes", [1 << 40, 8 << 20, 1])
def test_every_matrix_is_assigned_once_most_expensive_first_and_stacks_in_slices(bucket_bytes):
    shapes = [*DENSE, (64, 256, 512), (5, 256, 512), (0, 8, 8), (1, 7, 9)]
    workers = 4
    buckets = buckets_of(replicated(shapes, workers), bucket_bytes)
    seen = [
        (part.param, number)
        for bucket in buckets
        for assigned in bucket.assignments
        for each in assigned
        for part in each.ranges
        for number in range(part.start, part.stop)
    ]
    assert sorted(seen) == [(i, j) for i, s in enumerate(shapes) for j in range(s[0] if len(s) == 3 else 1)]
    in_order = [[each for assigned in bucket.assignments for each in assigned] for bucket in buckets]
    costs = [[cost(each.shape.matrix) for each in members] for members in in_order]
    assert all(min(one) >= max(other) for one, other in pairwise(costs))
    for bucket, members in zip(buckets, in_order, strict=True):
        matrices = [math.prod(each.shape.matrix) * 4 * each.size for each in members]
        number = sum(each.size for each in members)
        assert sum(matrices) <= max(bucket_bytes, 4 * 1408 * 512 * 4) or number == workers
        for assigned in bucket.assignments:
            assert len({each.shape for each in assigned}) == len(assigned)  # equal shapes are one batch
            for each in assigned:
                stack = [part for part in each.ranges if part.param == len(DENSE)]
                assert len(stack) <= 1  # of a stack, neighbors


def test_equal_work_in_several_buckets_that_each_keep_everyone_busy():
    buckets = buckets_of(replicated(DENSE, 4))
    assert len(buckets) >= 4  # though the limit is large: else nothing travels while something is worked on
    for bucket in buckets:
        loads = loads_of([bucket], 4)
        assert max(loads) <= 1.34 * sum(loads) / 4


def test_routes_among_the_same_ranks_share_the_work_together():
    layouts = replicated([(8, 8), (8, 8)], 2)
    buckets = assign_matrices(tuple(layouts), (torch.float32, torch.bfloat16), 4, 1 << 30)
    assert len(buckets) == 2  # they cannot share a buffer
    loads = loads_of(buckets, 2)
    assert loads[0] == loads[1]


@pytest.mark.parametrize("mesh_shape", [(8,), (2, 4), (4, 2), (2, 2, 2)])
def test_all_ranks_that_share_matrices_make_the_same_assignment(mesh_shape):
    """Assignments name workers by number, so they must be equal on all ranks, and their pieces must fill the matrices."""
    world = math.prod(mesh_shape)
    shapes = [(9, 16), (16, 9), (3, 5), (1, 4), (6, 5, 8)]
    plans, pieces = [], []
    for rank in range(world):
        with rank_of(rank, world):
            mesh = init_device_mesh("cpu", mesh_shape)
            placements = [Replicate()] * (len(mesh_shape) - 1)
            params = [sharded(s, mesh, [*placements, Shard(1 if len(s) == 3 else 0)]) for s in shapes]
            layouts = [layout_of(p) for p in params]
            assert all(layout.replicas * len(layout.split_sizes) == world for layout in layouts)
            plans.append([bucket.assignments for bucket in buckets_of(layouts)])
            pieces.append([(layout.replica_rank, layout.split_rank) for layout in layouts])
    assert all(other == plans[0] for other in plans)
    assert sorted(own[0] for own in pieces) == [
        (c, s) for c in range(world // mesh_shape[-1]) for s in range(mesh_shape[-1])
    ]
    assert all(len(set(own)) == 1 for own in pieces)


LAYOUTS = [
    ((8,), (10, 3), [Shard(0)], {"split_dim": 0, "split_sizes": (2, 2, 2, 2, 2, 0, 0, 0)}),
    ((8,), (3, 16), [Shard(1)], {"split_dim": 1, "split_sizes": (2,) * 8}),
    ((8,), (4, 3, 2, 2), [Shard(1)], {"split_dim": 1, "split_sizes": (4, 4, 4, 0, 0, 0, 0, 0)}),
    ((8,), (10, 4, 6), [Shard(0)], {"split_dim": None, "indices": (6, 7)}),
    ((8,), (10, 4, 6), [Shard(2)], {"split_dim": 1, "indices": tuple(range(10)), "split_sizes": (1,) * 6 + (0, 0)}),
    ((2, 4), (8, 6), [Replicate(), Shard(0)], {"split_dim": 0, "replicas": 2, "split_rank": 3, "replica_rank": 0}),
    ((2, 4), (8, 6), [Shard(0), Replicate()], {"split_dim": 0, "replicas": 4, "split_rank": 0, "replica_rank": 3}),
    ((2, 4), (8, 4, 6), [Shard(0), Shard(1)], {"split_dim": 0, "indices": (0, 1, 2, 3), "split_sizes": (1,) * 4}),
    ((2, 4), (8, 4, 6), [Shard(2), Shard(0)], {"split_dim": 1, "indices": (6, 7), "split_sizes": (3, 3)}),
    ((2, 4), (9, 4, 6), [_StridedShard(0, split_factor=4), Shard(0)], {"split_dim": None, "gather": None}),
    ((2, 4), (8, 6), [Replicate(), Replicate()], {"split_dim": None, "replicas": 8, "replica_rank": 3}),
    ((1, 8), (8, 6), [Shard(1), Shard(0)], {"split_dim": 0, "split_sizes": (1,) * 8, "replicas": 1}),
    (
        (2, 2, 2),
        (8, 6),
        [Replicate(), Shard(0), Replicate()],
        {"split_sizes": (4, 4), "replicas": 4, "replica_rank": 1},
    ),
]


@pytest.mark.parametrize(("mesh_shape", "shape", "placements", "expected"), LAYOUTS, ids=str)
def test_layouts_on_larger_meshes(mesh_shape, shape, placements, expected):
    with rank_of(3, 8):
        mesh = init_device_mesh("cpu", mesh_shape)
        layout = layout_of(sharded(shape, mesh, placements))
        assert {key: getattr(layout, key) for key in expected} == expected
        assert (layout.split_group is None) == (layout.split_dim is None)
        assert layout.gather is None


@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((8, 6), [Shard(0), Shard(1)]),
        ((8, 6), [Shard(0), Shard(0)]),
        ((8, 6), [_StridedShard(0, split_factor=4), Shard(0)]),
        ((3, 8, 6), [Shard(1), Shard(2)]),
        ((8, 6, 3, 3), [Replicate(), Shard(2)]),
    ],
    ids=str,
)
def test_what_only_dtensor_can_put_together_is_gathered(shape, placements):
    with rank_of(3, 8):
        mesh = init_device_mesh("cpu", (2, 4))
        layout = layout_of(sharded(shape, mesh, placements))
        assert layout.gather == (mesh, tuple(layout.gather[1]))
        assert (layout.split_group, layout.replica_group) == (None, None)
        assert len(layout.sum_groups) == sum(not p.is_replicate() for p in placements)


def test_a_mesh_in_another_order_than_its_group_is_refused():
    """torch 2.13's own full_tensor is wrong on it. Rank 0 is where it should be, but all ranks must do the same."""
    with rank_of(0, 4):
        assert layout_of(sharded((8, 6), DeviceMesh("cpu", [0, 1, 2, 3]), [Shard(0)])).gather is None
        mesh = DeviceMesh("cpu", [0, 2, 1, 3])
        with pytest.raises(ValueError, match=r"found the ranks \[0, 2, 1, 3\], expected ascending order"):
            layout_of(sharded((8, 6), mesh, [Shard(0)]))
        assert layout_of(sharded((8, 6), mesh, [Replicate()])).replicas == 4
        assert layout_of(sharded((8, 6, 4), mesh, [Shard(0)])).indices == (0, 1)


def test_plain_parameters_and_ranks_outside():
    assert layout_of(torch.zeros(4, 6)) == Layout((4, 6), (4, 6), (4, 6), (0,))
    assert layout_of(torch.zeros(3, 4, 6)).indices == (0, 1, 2)
    assert layout_of(torch.zeros(4, 6, 3, 3)).matrix == (4, 54)
    with rank_of(3, 4):
        assert layout_of(torch.zeros(4, 6), dist.group.WORLD).replicas == 4
        assert layout_of(torch.zeros(4, 6), dist.group.WORLD).replica_rank == 3
        mesh = DeviceMesh("cpu", [0, 1])
        outside = layout_of(sharded((4, 6), mesh, [Shard(0)]))
        assert outside.count == 0
        ((done,),) = orthogonalize_sharded([outside], [torch.zeros(0)], lambda x: x, dtype=torch.bfloat16)
        assert (done[0], list(done[1].shape), done[1].dtype) == (0, [0], torch.bfloat16)
    with rank_of(0, 1):
        assert layout_of(torch.zeros(4, 6), dist.group.WORLD).replica_group is None


def test_one_process_needs_no_process_group():
    x, stack, filters = torch.randn(4, 6), torch.randn(3, 4, 6), torch.randn(4, 2, 3, 3)
    directions = [x, stack.mT, filters, x]
    layouts = [layout_of(d) for d in directions]
    found = {}
    for done in orthogonalize_sharded(layouts, directions, lambda batch: -batch, dtype=torch.bfloat16):
        found |= dict(done)
    assert all(torch.equal(found[i], -d.bfloat16()) for i, d in enumerate(directions))
    assert list(orthogonalize_sharded([], [], torch.neg, dtype=torch.float32)) == []
    sums = [torch.ones(1, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64)]
    assert all(torch.equal(a, b) for a, b in zip(reduce_sums(layouts[:2], sums), sums, strict=True))


def test_volume_of_the_dense_set():
    """What a step sends, per rank, against the ways without sharing."""
    numbers = sum(map(math.prod, DENSE))
    with rank_of(0, 2):
        world = dist.group.WORLD
        ddp = sent_bytes([layout_of(torch.zeros(s), world) for s in DENSE], torch.float32, torch.bfloat16)
        mesh = init_device_mesh("cpu", (2,))
        fsdp = sent_bytes([layout_of(sharded(s, mesh, [Shard(0)])) for s in DENSE], torch.float32, torch.bfloat16)
    # Replicas: half of the results, in bf16. 5 % for padding, which is what uneven shares cost.
    assert ddp.total == ddp.replicas
    assert numbers / 2 * 2 <= ddp.replicas <= 1.05 * numbers / 2 * 2
    # Pieces: of this rank's half, the half that the other one works on, and as much back; by cost, not by bytes.
    assert fsdp.total == fsdp.pieces + fsdp.results
    assert fsdp.pieces == pytest.approx(numbers / 4 * 4, rel=0.05)
    assert fsdp.results == pytest.approx(numbers / 4 * 2, rel=0.05)
    whole = numbers / 2 * 4  # an all-gather of all directions
    assert fsdp.total < 0.8 * whole


@pytest.mark.parametrize(("world", "ddp", "fsdp"), [(2, 36.8, 55.1), (8, 66.5, 24.2)])
def test_the_documented_volumes(world, ddp, fsdp):
    """The table of docs/optimizer.md, in MiB."""
    with rank_of(0, world):
        mesh = init_device_mesh("cpu", (world,))
        replicated = [layout_of(torch.zeros(s), dist.group.WORLD) for s in DENSE]
        fsdp_layouts = [layout_of(sharded(s, mesh, [Shard(0)])) for s in DENSE]
        for layouts, expected in ((replicated, ddp), (fsdp_layouts, fsdp)):
            sent = sent_bytes(layouts, torch.float32, torch.bfloat16).total
            assert sent / 2**20 == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: layout_of(torch.zeros(3)), r"param: found shape \[3\], expected at least two dimensions"),
        (
            lambda: next(
                orthogonalize_sharded(
                    [layout_of(torch.zeros(3, 4))], [torch.zeros(4, 3)], torch.neg, dtype=torch.float32
                )
            ),
            r"directions\[0\]: found shape \[4, 3\], expected .*\[3, 4\]",
        ),
        (
            lambda: next(
                orthogonalize_sharded(
                    [layout_of(torch.zeros(3, 4))], [torch.zeros(3, 4)], lambda x: x.mT, dtype=torch.float32
                )
            ),
            r"fn: found a result of shape \[1, 4, 3\], expected .*\[1, 3, 4\]",
        ),
        (
            lambda: reduce_sums([layout_of(torch.zeros(2, 3, 4))], [torch.zeros(1, 2)]),
            r"sums\[0\]: found shape \[1, 2\], expected \[2, \.\.\.\], a row for each matrix",
        ),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_placements_that_are_no_layout():
    with rank_of(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        with pytest.raises(ValueError, match=r"Partial.*Redistribute"):
            layout_of(DTensor.from_local(torch.zeros(4, 6), mesh, [Partial()], run_check=False))
        odd = DTensor.from_local(
            torch.zeros(3, 6), mesh, [Shard(0)], run_check=False, shape=torch.Size((4, 6)), stride=(6, 1)
        )
        with pytest.raises(ValueError, match=r"\[4, 6\]: found shape \[3, 6\], expected \[1, 2, 6\]"):
            layout_of(odd)
