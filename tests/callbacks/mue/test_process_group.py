"""Which optimizers MuECallback tells that the ranks are replicas; on two processes: test_distributed.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_mue.callbacks.mue.companions import set_process_groups
from lightning_mue.optim import HyperSphereOptimizer


class Foreign(torch.optim.AdamW):
    process_group = None


@pytest.fixture
def world(monkeypatch):
    """A group of one process that says it has two."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    make = DistributedDataParallel(nn.Linear(4, 4))  # the real one, before anybody lies about the size
    sizes = {"size": 2}
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: sizes["size"])
    yield SimpleNamespace(ddp=make, sizes=sizes)
    monkeypatch.undo()
    torch.distributed.destroy_process_group()


def trainer(model, optimizers, **strategy):
    return SimpleNamespace(strategy=SimpleNamespace(model=model, **strategy), optimizers=optimizers)


def params():
    return [("hidden", nn.Parameter(torch.randn(4, 4)))]


def test_only_sphere_optimizers_without_a_group_get_one(world):
    given, mine, foreign = HyperSphereOptimizer(params()), HyperSphereOptimizer(params()), Foreign(params())
    mine.process_group = own = torch.distributed.new_group([0])
    set_process_groups(trainer(world.ddp, [given, mine, foreign], _model_averager=None))
    assert given.process_group is torch.distributed.group.WORLD
    assert (mine.process_group, foreign.process_group) == (own, None)


@pytest.mark.parametrize("case", ["no DDP", "one process", "ignored", "post-local SGD"])
def test_none_where_the_ranks_are_no_replicas(world, case):
    optimizer, averager = HyperSphereOptimizer(params()), object() if case == "post-local SGD" else None
    if case == "one process":
        world.sizes["size"] = 1
    if case == "ignored":
        world.ddp.parameters_to_ignore.add("weight")
    model = world.ddp.module if case == "no DDP" else world.ddp
    set_process_groups(trainer(model, [optimizer], _model_averager=averager))
    assert optimizer.process_group is None


def test_ignored_buffers_do_not_count(world):
    optimizer = HyperSphereOptimizer(params())
    world.ddp.parameters_to_ignore.add("a_buffer")
    set_process_groups(trainer(world.ddp, [optimizer]))
    assert optimizer.process_group is torch.distributed.group.WORLD


def test_one_device_has_no_group(toy):
    from lightning_mue import MuECallback

    class Model(toy.ToyModel):
        def configure_optimizers(self):
            return HyperSphereOptimizer(self.named_parameters(), lr=0.01)

    trainer = toy.make_trainer([MuECallback(rule="hyperp", roles={"": "hidden"}, verbose=False)], False, max_steps=1)
    trainer.fit(toy.make_model(cls=Model), toy.tokens(1))
    assert trainer.optimizers[0].process_group is None
