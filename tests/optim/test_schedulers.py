"""Every scheduler of torch.optim.lr_scheduler, and SWALR, on HyperSphereOptimizer: rates, momentum, steps, resuming."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.optim.lr_scheduler as schedulers
from torch import nn
from torch.optim.swa_utils import SWALR

from lightning_mue.optim import HyperSphereOptimizer


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


def one_cycle(optimizer, **options):
    return schedulers.OneCycleLR(optimizer, rates(optimizer), total_steps=10, **options)


def cyclic(optimizer, **options):
    base = [lr / 4 for lr in rates(optimizer)]
    return schedulers.CyclicLR(optimizer, base, rates(optimizer), step_size_up=3, **options)


def sequential(optimizer):
    parts = [schedulers.LinearLR(optimizer, 0.2, total_iters=3), schedulers.CosineAnnealingLR(optimizer, 6)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[3])


def chained(optimizer):
    return schedulers.ChainedScheduler(
        [schedulers.ConstantLR(optimizer, 0.5, total_iters=3), schedulers.ExponentialLR(optimizer, 0.9)]
    )


SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    "LambdaLR by group": lambda o: schedulers.LambdaLR(
        o, [lambda step, i=i: 1 / (1 + i + step) for i in range(len(o.param_groups))]
    ),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5], 0.5),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.5, total_iters=3),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.2, total_iters=5),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.8),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=9, power=2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "CyclicLR": cyclic,
    "CyclicLR, rates only": lambda o: cyclic(o, cycle_momentum=False),
    "OneCycleLR": one_cycle,
    "OneCycleLR, rates only": lambda o: one_cycle(o, cycle_momentum=False),
    "SWALR": lambda o: SWALR(o, swa_lr=[lr / 10 for lr in rates(o)], anneal_epochs=4),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"embed": nn.Embedding(5, 6), "fc": nn.Linear(6, 8), "lm_head": nn.Linear(6, 5, bias=False)})


def optimizer_of(net: nn.Module) -> HyperSphereOptimizer:
    return HyperSphereOptimizer(net.named_parameters(), lr=0.04, adamw_lr=0.01)


def set_grads(net: nn.Module, step: int) -> None:
    for i, param in enumerate(net.parameters()):
        generator = torch.Generator().manual_seed(100 * step + i)
        param.grad = torch.randn(param.shape, generator=generator)


def advance(scheduler) -> None:
    if isinstance(scheduler, schedulers.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


def run(net, optimizer, scheduler, steps) -> list[list[float]]:
    seen = []
    for step in steps:
        set_grads(net, step)
        optimizer.step()
        seen.append(rates(optimizer))
        advance(scheduler)
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_rates_are_those_of_torchs_adamw_and_a_resumed_run_is_the_same_bit_for_bit(name):
    net = model()
    optimizer = optimizer_of(net)
    theirs = torch.optim.AdamW([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in rates(optimizer)])
    scheduler, reference = SCHEDULERS[name](optimizer), SCHEDULERS[name](theirs)
    seen = run(net, optimizer, scheduler, range(4))
    wanted = run(nn.Module(), theirs, reference, range(4))
    state = copy.deepcopy((net.state_dict(), optimizer.state_dict(), scheduler.state_dict()))
    assert seen + run(net, optimizer, scheduler, range(4, 8)) == wanted + run(
        nn.Module(), theirs, reference, range(4, 8)
    )
    assert len({tuple(row) for row in seen}) > 1, "the rates change"

    other = model()
    again = optimizer_of(other)
    resumed = SCHEDULERS[name](again)
    for part, saved in zip((other, again, resumed), state, strict=True):
        part.load_state_dict(saved)
    run(other, again, resumed, range(4, 8))
    assert rates(again) == rates(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), net.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["sphere", "muon"])
@pytest.mark.parametrize("name", ["CyclicLR", "OneCycleLR"])
def test_cycled_momentum_is_the_momentum_of_the_step(name, kind):
    """Against the momentum by hand, with the numbers that torch's SGD would get."""
    param, other = (nn.Parameter(torch.eye(4, 6)) for _ in range(2))
    optimizer = HyperSphereOptimizer([{"params": [param], "kind": kind}], lr=0.04)
    sgd = torch.optim.SGD([other], lr=0.04, momentum=0.5)
    scheduler, reference = SCHEDULERS[name](optimizer), SCHEDULERS[name](sgd)
    wanted, used = torch.zeros(4, 6), set()
    for step in range(6):
        param.grad = other.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        used.add(round(sgd.param_groups[0]["momentum"], 3))
        wanted = sgd.param_groups[0]["momentum"] * wanted + param.grad
        optimizer.step()
        sgd.step()
        assert torch.allclose(optimizer.state[param]["momentum"], wanted, rtol=1e-5, atol=1e-6)
        scheduler.step()
        reference.step()
    assert len(used) > 3, "it is cycled"


def test_rates_only_leaves_momentum_and_betas():
    net = model()
    optimizer = optimizer_of(net)
    before = [(group["momentum"], group["betas"]) for group in optimizer.param_groups]
    run(net, optimizer, one_cycle(optimizer, cycle_momentum=False), range(5))
    assert [(group["momentum"], group["betas"]) for group in optimizer.param_groups] == before
