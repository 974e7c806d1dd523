"""HyperSphereOptimizer on real processes: in every layout the step of one process. See _ranks.py."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import hypersphere_models as models
from helpers.processes import launch
from optim.hypersphere import _ranks as ranks

#: Relative, after 20 steps (6 of some options). Given gradients agree to 2e-7 (sums over ranks add in another order), a
#: model's own to 2e-6: their round-off is enlarged by Newton-Schulz.
TOLERANCE = 1e-5
#: Bitwise here; kernels that round otherwise for another number of matrices: steps of 0.05, 2^-8, at random, 20 times.
LOOSE = {"bfloat16 products": 2e-3}


@pytest.fixture(scope="module")
def alone():
    """One process: option -> parameters and optimizer after all steps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {}
    for option, kwargs in ranks.OPTIONS.items():
        params, optimizer = ranks.build(**kwargs)
        ranks.train(params, optimizer, range(ranks.steps_of(option)))
        runs[option] = params, optimizer
    torch.set_num_threads(threads)
    return runs


@pytest.fixture(scope="module")
def model_alone():
    model = models.Model()
    optimizer = models.optimizer_of(model)
    with ranks.Spy() as spy:
        models.fit(model, optimizer, range(ranks.STEPS))
    weights = ranks.wholes(dict(model.named_parameters()))
    return {"weights": weights, "cost": spy.cost, "memory": optimizer.memory()}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(ranks.__file__, "two", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return launch(ranks.__file__, "four", 4, tmp_path_factory.mktemp("four"))


@pytest.fixture
def reports(request):
    """What so many ranks have reported; launched once, if asked for."""
    return lambda world: request.getfixturevalue({2: "two", 4: "four"}[world])


def on(world, *names):
    """Mark what needs four ranks as slow."""
    return pytest.param(world, *names, marks=[pytest.mark.slow] if world > 2 else [])


LAYOUTS = [on(world, layout) for world in (2, 4) for layout in ranks.LAYOUTS[world]]
MODELS = [on(2, "ddp"), on(2, "rows"), on(2, "columns"), on(4, "ddp"), on(4, "columns"), on(4, "hsdp")]
CASES = [
    on(world, layout, option)
    for world in (2, 4)
    for layout in ranks.LAYOUTS[world]
    for option in ranks.options_of(world, layout)
]


@pytest.mark.parametrize(("world", "layout", "option"), CASES)
def test_weights_and_radii_are_those_of_one_process(reports, alone, world, layout, option):
    params, optimizer = alone[option]
    wanted = ranks.wholes(params)
    for report in reports(world):
        found = report["agreement"][layout, option]
        assert max(ranks.distances(found["weights"], wanted).values()) < LOOSE.get(option, TOLERANCE)
        assert found["radii"].keys() == {name for name, p in params.items() if "radius" in optimizer.state[p]}
        for name, radius in found["radii"].items():
            assert torch.allclose(radius, optimizer.state[params[name]]["radius"], rtol=1e-6, atol=0), name
    start = ranks.weights()
    assert min(ranks.distances(wanted, start).values()) > 1e-2, "the steps went somewhere"


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_ranks_end_with_the_same_weights(reports, world, layout):
    first, *others = (report["agreement"][layout, "project"]["weights"] for report in reports(world))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("world", "layout"), LAYOUTS)
def test_without_gradients_no_bit_changes(reports, world, layout):
    """With lr 0, as a distributed restore steps, nothing at all; with an lr, nothing on a sphere."""
    for report in reports(world):
        assert report["agreement"][layout, "changed"] == []


@pytest.mark.parametrize(("world", "layout", "option"), CASES)
def test_bytes_sent_are_those_predicted(reports, world, layout, option):
    for report in reports(world):
        found = report["agreement"][layout, option]
        assert found["bytes"] == found["predicted"] > 0
        assert found["sums"] < 2000  # some numbers a matrix
        assert (found["sums"] > 0) is (layout not in ("ddp", "replicated"))


def test_negative_control_pieces_orthogonalized_where_they_are(reports, alone):
    wanted = ranks.wholes(alone["project"][0])
    for report in reports(2):
        distance = ranks.distances(report["without communication"], wanted)
        assert min(distance[name] for name in ("a.weight", "b.weight", "rows.weight", "conv.weight")) > 1e-2
        assert distance["experts"] < TOLERANCE  # whole where they are


@pytest.mark.parametrize(("world", "how"), MODELS)
def test_a_model_trains_as_in_one_process(reports, model_alone, world, how):
    """DistributedDataParallel and fully_shard, with gradients of their own, of a batch that is divided."""
    for report in reports(world):
        distance = ranks.distances(report["models"][how]["weights"], model_alone["weights"])
        assert max(distance.values()) < TOLERANCE


@pytest.mark.parametrize(("world", "how"), [on(w, h) for w in (2, 4) for h in ("ddp", "columns")])
def test_ranks_share_the_work(reports, model_alone, world, how):
    """Every matrix is orthogonalized once, and no rank has much more than its share (all of it without sharing)."""
    costs = [report["models"][how]["cost"] for report in reports(world)]
    assert sum(costs) == model_alone["cost"]
    assert max(costs) < 1.2 * model_alone["cost"] / world
    shared = {report["models"][how]["shared"] for report in reports(world)}
    assert shared == ({6} if how == "ddp" else {0})  # narrow, widen, two stacks; embedding and head, which need no work


@pytest.mark.parametrize("world", [on(2), on(4)])
def test_momentum_is_sharded_where_weights_are(reports, model_alone, world):
    whole = model_alone["memory"]["momentum"]
    for how, each in (("ddp", whole), ("columns", whole // world)):
        assert all(report["models"][how]["memory"]["momentum"] == each for report in reports(world))
    if world == 2:
        rows = [report["models"]["rows"]["memory"]["momentum"] for report in reports(world)]
        assert sum(rows) == whole
        assert max(rows) < 0.6 * whole  # 3 of 5 rows and experts


def test_experts_of_each_rank_in_plain_tensors(reports, alone):
    wanted = ranks.wholes(alone["project"][0])
    for rank, report in enumerate(reports(2)):
        found = report["own experts"]
        for name, w in found["weights"].items():
            mine = wanted[name].split(found["parts"][name])[rank] if name in found["parts"] else wanted[name]
            assert (w - mine).norm() <= TOLERANCE * mine.norm(), name
    assert reports(2)[1]["own experts"]["weights"]["few"].shape == (0, 8, 6)


def test_experts_of_each_rank_are_refused_in_a_process_group(reports):
    """On all ranks, at the first step, and nothing hangs."""
    messages = [report["own experts taken for replicas"] for report in reports(2)]
    assert messages[0] == messages[1]
    assert re.search(
        r"process_group: found other weights of parameter 'experts' .* on rank 1 of the group", messages[0]
    )


def test_the_process_group_may_be_set_later_and_new_parameters_are_checked(reports):
    for report in reports(2):
        found = report["changing groups"]
        assert found["costs"][0] == found["costs"][1]
        assert all(cost < 0.7 * found["costs"][0] for cost in found["costs"][2:4])
        assert "other weights of parameter 'other.weight'" in found["message"]
    first, second = (report["changing groups"]["weights"] for report in reports(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    start = ranks.weights()
    assert all(not torch.equal(w, start[name]) for name, w in first.items())


@pytest.mark.slow
@pytest.mark.parametrize("side", [0, 1])
def test_experts_over_ranks_sharded_again_by_fully_shard(reports, alone, side):
    wanted = ranks.wholes(alone["project"][0])
    shapes = set()
    for report in reports(4):
        found = report["sharded experts"][side]
        distance = ranks.distances(found["weights"], {name: wanted[name] for name in found["weights"]})
        assert max(distance.values()) < TOLERANCE
        assert all(f"Shard(dim={side})" in placement for placement in found["placements"])
        shapes.add(tuple(shape for (shape,) in found["radii"]))
    # Of 4 and of 5 experts: a stack sharded by rows keeps all of its radii.
    assert all(even == 2 for even, _ in shapes) if side else all(even == 1 for even, _ in shapes)
