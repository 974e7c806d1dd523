from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_mue.parameterizations import Init, ParameterPlan
from lightning_mue.parameterizations.applying import drawing
from lightning_mue.parameterizations.applying.drawing import draw_, draw_all, generator_for, tied_name


def entry(shape, name="blocks.0.w", kind="normal", value=0.5, **kwargs):
    init = Init(kind, value)
    return ParameterPlan(name, "hidden", tuple(shape), None, init, 1.0, 1.0, 1.0, "adamw", "", **kwargs)


def drawn(shape, seed=3, dtype=torch.float32, **kwargs):
    tensor = torch.empty(shape, dtype=dtype)
    draw_(tensor, entry(shape, **kwargs), seed)
    return tensor


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 64 numbers, so that small tensors have many."""
    monkeypatch.setattr(drawing, "BLOCK", 64)


def test_one_block_is_torchs_own_draw():
    expected = torch.empty(20, 30).normal_(0.0, 0.5, generator=generator_for("blocks.0.w", 3))
    assert torch.equal(drawn((20, 30)), expected)
    expected = torch.empty(20, 30).uniform_(-0.5 * 3**0.5, 0.5 * 3**0.5, generator=generator_for("blocks.0.w", 3))
    assert torch.equal(drawn((20, 30), kind="uniform"), expected)


def test_blocks_are_independent_normal_draws(small_blocks):
    w = drawn((400, 30))
    # Five standard errors.
    assert w.std().item() == pytest.approx(0.5, rel=5 / math.sqrt(2 * w.numel()))
    rows = w.view(200, -1)  # two rows a block
    assert len(torch.unique(rows[:, 0])) == 200
    correlation = torch.corrcoef(rows)[~torch.eye(200, dtype=torch.bool)]
    # 60 numbers a block: correlations of independent draws have a standard deviation of 0.13; 0.7 is 5.4 of them.
    assert correlation.abs().max() < 0.7


@pytest.mark.parametrize("shape", [(), (5,), (70,), (7, 9), (3, 10, 11), (4, 3, 2, 5), (2, 200), (0, 4)])
def test_threads_strides_and_dtype_do_not_matter(small_blocks, shape):
    once = drawn(shape)
    for threads in (1, 2, 5):
        tensor = torch.empty(shape)
        draw_all([(tensor, entry(shape))], 3, threads=threads)
        assert torch.equal(tensor, once)
    strided = torch.empty(shape[::-1]).permute(tuple(range(len(shape)))[::-1])
    draw_(strided, entry(shape), 3)
    assert torch.equal(strided, once)
    assert torch.equal(drawn(shape, dtype=torch.bfloat16), once.bfloat16())
    assert torch.equal(drawn(shape, dtype=torch.float64), once.double())


def test_many_parameters_in_threads(small_blocks):
    shapes = {f"layers.{i}.w": (5 + i, 17) for i in range(20)}
    results = []
    for threads in (1, 4):
        tensors = {name: nn.Parameter(torch.empty(shape)) for name, shape in shapes.items()}
        draw_all([(t, entry(t.shape, name)) for name, t in tensors.items()], 0, threads=threads)
        results.append(tensors)
    assert all(torch.equal(results[0][name], results[1][name]) for name in shapes)
    assert not torch.equal(results[0]["layers.0.w"], results[0]["layers.1.w"][:5])


def test_errors_of_threads_are_raised():
    broken = entry((3, 4), value="not a number")
    with pytest.raises((TypeError, ValueError)):
        draw_all([(torch.empty(3, 4), broken)], 0, threads=3)


MESHES = [
    ((3,), [Shard(0)]),
    ((3,), [Shard(1)]),
    ((4,), [Replicate()]),
    ((2, 2), [Shard(0), Shard(1)]),
    ((2, 3), [Shard(0), Shard(0)]),
    ((2, 2), [Replicate(), Shard(0)]),
]


@pytest.mark.parametrize(("mesh_shape", "placements"), MESHES, ids=str)
def test_every_rank_draws_its_part_of_the_whole(small_blocks, mesh_shape, placements):
    """Uneven shards, columns, two-dimensional meshes; each rank is played in turn, without communication."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for rank in range(math.prod(mesh_shape)):
        dist.init_process_group("fake", rank=rank, world_size=math.prod(mesh_shape), store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", mesh_shape)
            for shape in [(7, 10), (5, 10, 13), (1, 30), (20,)]:
                if any(p.is_shard() and p.dim >= len(shape) for p in placements):
                    continue
                whole = drawn(shape)
                # The oracle: torch's own split of the whole.
                expected = distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()
                local = torch.full_like(expected, torch.nan)
                sharded = DTensor.from_local(
                    local, mesh, placements, shape=torch.Size(shape), stride=whole.stride(), run_check=False
                )
                draw_(sharded, entry(shape), 3)
                assert torch.equal(local, expected), (rank, shape)
        finally:
            dist.destroy_process_group()


def test_sharded_padding_row_and_constant(small_blocks):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for rank, holds in ((0, False), (1, True)):
        dist.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
        try:
            mesh = init_device_mesh("cpu", (2,))
            local = torch.ones(5, 4)
            sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
            draw_all([(sharded, entry((10, 4)))], 3, padding={"blocks.0.w": 7})
            zero_rows = [i for i, row in enumerate(local) if float(row.abs().max()) == 0.0]
            assert zero_rows == ([2] if holds else [])
            draw_(sharded, entry((10, 4), kind="constant", value=2.0), 3)
            assert bool((local == 2.0).all())
        finally:
            dist.destroy_process_group()


def test_a_rank_draws_only_the_blocks_of_its_shard(small_blocks, monkeypatch):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    seen = []
    original = drawing.generator_for
    monkeypatch.setattr(drawing, "generator_for", lambda name, seed: seen.append(name) or original(name, seed))
    drawn((64, 16))
    assert len(seen) == 16
    seen.clear()
    dist.init_process_group("fake", rank=2, world_size=4, store=FakeStore())
    try:
        sharded = DTensor.from_local(torch.empty(16, 16), init_device_mesh("cpu", (4,)), [Shard(0)], run_check=False)
        draw_(sharded, entry((64, 16)), 3)
    finally:
        dist.destroy_process_group()
    assert seen == [f"blocks.0.w#{block}" for block in range(8, 12)]


def test_tied_experts_start_equal(small_blocks):
    stack = drawn((4, 6, 7), name="blocks.0.experts.w_up", tied=True)
    assert all(torch.equal(stack[0], expert) for expert in stack)
    assert len(torch.unique(stack[0])) > 30
    free = drawn((4, 6, 7), name="blocks.0.experts.w_up")
    assert not torch.equal(free[0], free[1])
    listed = [drawn((6, 7), name=f"blocks.{i}.experts.{j}.fc.0.weight", tied=True) for i in (0, 1) for j in (0, 1)]
    assert torch.equal(listed[0], listed[1])  # two experts of a layer
    assert not torch.equal(listed[0], listed[2])  # of two layers
    assert tied_name(entry((6, 7), "mlp.3.w1")) == "mlp.*.w1"
    assert tied_name(entry((4, 6, 7), "mlp.3.w1")) == "mlp.3.w1"


def test_tied_experts_start_equal_in_shards(small_blocks):
    from torch.testing._internal.distributed.fake_pg import FakeStore

    whole = drawn((5, 6, 8), name="e.w", tied=True)
    for placement in (Shard(0), Shard(1), Shard(2)):
        for rank in (0, 1, 2):
            dist.init_process_group("fake", rank=rank, world_size=3, store=FakeStore())
            try:
                mesh = init_device_mesh("cpu", (3,))
                expected = distribute_tensor(whole, mesh, [placement], src_data_rank=None).to_local()
                local = torch.empty_like(expected)
                sharded = DTensor.from_local(
                    local, mesh, [placement], shape=whole.shape, stride=whole.stride(), run_check=False
                )
                draw_(sharded, entry((5, 6, 8), name="e.w", tied=True), 3)
                assert torch.equal(local, expected), (rank, placement)
            finally:
                dist.destroy_process_group()
