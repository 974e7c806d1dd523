"""Which table an optimizer's factors stand in, by what its update does; and that the updates of each are scaled."""

from __future__ import annotations

import copy
import random

import pytest
import pytorch_optimizer as po
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

from lightning_mue.parameterizations import ScaledStep, plan
from lightning_mue.parameterizations.applying.families import family_of
from lightning_mue.parameterizations.applying.groups import scaled_group, split


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.stem, self.hidden, self.head = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.hidden(self.stem(x).relu()).relu())


ROLES = {"^stem": "embedding", "^hidden": "hidden", "^head": "unembedding"}


class SlowAdam(torch.optim.Adam):
    """Overrides the step, and scales by the weights' norm: its name and its ancestors say Adam."""

    def step(self, closure=None):
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        super().step()
        with torch.no_grad():
            for p, old in zip((p for group in self.param_groups for p in group["params"]), before, strict=True):
                p.copy_(old + (p - old) * 0.1 * old.norm())


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)


ACCEPTED = {
    "adam": {
        "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
        "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
        "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
        "Lion": lambda p: po.Lion(p, lr=0.01),
        "AdaBelief": lambda p: po.AdaBelief(p, lr=0.01),
        "Adan": lambda p: po.Adan(p, lr=0.01),
        "SignSGD": lambda p: po.SignSGD(p, lr=0.01),
        "SAM": lambda p: po.SAM(p, base_optimizer=torch.optim.AdamW, lr=0.01, weight_decay=0.0),
        "Lookahead": lambda p: po.Lookahead(adamw(p)),
        "ScheduleFreeWrapper": lambda p: po.ScheduleFreeWrapper(adamw(p)),
    },
    "sgd": {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
        "SGDP": lambda p: po.SGDP(p, lr=0.01),
        "Lookahead": lambda p: po.Lookahead(torch.optim.SGD(p, lr=0.01)),
    },
}


def updates(make, scaling):
    """The first update of each parameter, float64, with a scaled step or without."""
    torch.manual_seed(0)
    model = Net(32).double()
    optimizer = make(list(model.parameters()))
    before = copy.deepcopy(model.state_dict())
    step = None if scaling is None else ScaledStep(optimizer, scaling, model)
    getattr(optimizer, "train", lambda: None)()
    gradients = {name: torch.randn_like(p) for name, p in model.named_parameters()}

    def closure():
        for name, p in model.named_parameters():
            p.grad = gradients[name].clone()
        return torch.ones((), requires_grad=True)

    closure()
    optimizer.step(closure) if type(optimizer).__name__ == "SAM" else optimizer.step()
    assert step is None or step.own_groups is None
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, makes in ACCEPTED.items() for name in makes])
def test_updates_of_what_is_accepted_are_scaled(family, name):
    make = ACCEPTED[family][name]
    assert family_of(make(list(Net(8).parameters()))) == family
    scaling = plan(Net(32), base=Net(8), rule="mup", family=family, roles=ROLES)
    plain, scaled = updates(make, None), updates(make, scaling)
    factors = {entry.name: entry.lr for entry in scaling.parameters}
    assert factors["hidden.weight"] == (0.25 if family == "adam" else 1.0)
    assert len(set(factors.values())) > 1
    for entry, change in plain.items():
        # a gradient of 1e-4 feels an eps of 1e-8 by 1e-4, and the plan scales it
        torch.testing.assert_close(scaled[entry], factors[entry] * change, rtol=0.02, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda p: SlowAdam(p, lr=0.01), "size of the weights"),
        (lambda p: po.Lamb(p, lr=0.01), "size of the weights"),
        (lambda p: po.LARS(p, lr=0.01), "size of the weights"),
        (lambda p: torch.optim.Adafactor(p, lr=0.01), "size of the weights"),
        (lambda p: po.SOAP(p, lr=0.01), "size of the matrix"),
        (lambda p: po.Prodigy(p), "not proportional"),
        (lambda p: po.DAdaptAdam(p), "not proportional"),
        (lambda p: torch.optim.Adagrad(p, lr=0.01), "changes by itself"),
        (lambda p: torch.optim.LBFGS(p), "0 or not finite"),
        (lambda p: po.PAdam(p, lr=0.01), "neither linear"),
        (lambda p: po.SWATS(p, lr=0.01), "in the middle"),
        (lambda p: po.AdaDelta(p, lr=0.01), "depends on its eps"),
        (lambda p: po.AvaGrad(p, lr=0.01, eps=1e-8), "gradients of the others"),
        (lambda p: po.SRMM(p, lr=0.01), "size of the weights"),
        (lambda p: po.ScheduleFreeAdamW(p, lr=0.01), r"keeps '.*param_groups\(model, plan\)"),
        (lambda p: po.ScheduleFreeRAdam(p, lr=0.01), "keeps '"),
        (lambda p: po.Lookahead(po.Lamb(p, lr=0.01)), "around Lamb.*Return the Lamb alone"),
    ],
)
def test_an_update_of_another_kind_is_refused_whatever_its_name(make, why):
    optimizer = make(list(Net(8).parameters()))
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    with pytest.raises(ValueError, match=rf"optimizer: found (?s:.)*{why}"):
        family_of(optimizer)
    after = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(map(torch.equal, before, after))  # the trial touches neither weights nor state
    optimizer.mue_family = "adam"
    if "Lookahead" not in type(optimizer).__name__:
        assert family_of(optimizer) == "adam"


class TensorRate(torch.optim.AdamW):
    """Insists on a tensor, as eight-bit optimizers do, and draws random numbers (a stochastic rounding)."""

    def __init__(self, params, lr=1e-3, **settings):
        super().__init__(params, torch.tensor(lr), foreach=False, **settings)

    def step(self, closure=None):
        assert all(isinstance(group["lr"], torch.Tensor) for group in self.param_groups)
        random.random(), torch.rand(1)
        return super().step(closure)


class AsksForAClosure(torch.optim.AdamW):
    def step(self, closure):
        with torch.enable_grad():
            closure()
        return super().step()


class Own(torch.optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: TensorRate(p),
        lambda p: AsksForAClosure(p),
        lambda p: Own(p, amsgrad=True, maximize=True, weight_decay=0.5, lr=0.0),
        lambda p: Own(p, differentiable=True),
        lambda p: Own(p, fused=True),
        lambda p: Own([{"params": p}, {"params": [], "lr": 1.0}]),
        lambda p: Own([(f"p{i}", one) for i, one in enumerate(p)]),
        lambda p: Own([p[0].detach().bfloat16().requires_grad_()]),
        lambda p: Own([torch.empty(4, 4, device="meta", requires_grad=True)], capturable=True),
        lambda p: LightningOptimizer(adamw(p)),
    ],
    ids=["tensor", "closure", "options", "differentiable", "fused", "empty", "named", "bf16", "meta", "Lightning"],
)
def test_a_sound_subclass_is_accepted_and_left_alone(make):
    optimizer = make(list(Net(8).parameters()))
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"] if not p.is_meta]
    before = str(optimizer.state_dict()), str(optimizer.defaults), random.getstate(), torch.get_rng_state().tolist()
    assert family_of(optimizer) == "adam"
    assert before == (
        str(optimizer.state_dict()),
        str(optimizer.defaults),
        random.getstate(),
        torch.get_rng_state().tolist(),
    )
    held = [p for group in optimizer.param_groups for p in group["params"] if not p.is_meta]
    assert all(map(torch.equal, weights, held))
    assert all(p.grad is None for p in held)


def test_a_declared_wrapper_must_be_scaled_by_the_one_inside():
    class Deaf(torch.optim.Optimizer):
        """Steps with a rate of its own."""

        mue_family = "adam"

        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(0.01 * p.grad.sign())

    with pytest.raises(
        ValueError, match=r"Deaf around AdamW with mue_family = 'adam'.*not proportional.*Return the AdamW"
    ):
        family_of(Deaf(adamw(list(Net(8).parameters()))))
    right = po.Lookahead(adamw(list(Net(8).parameters())))
    right.mue_family = "adam"
    assert family_of(right) == "adam"


def test_a_trial_leaves_the_optimizer_and_the_random_numbers_alone():
    optimizer = po.Lookahead(adamw(list(Net(8).parameters())))
    state, random = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    family_of(optimizer)
    assert torch.equal(random, torch.get_rng_state())
    assert str(optimizer.state_dict()) == str(state)


def test_the_pair_of_adafactor_is_scaled_in_its_first():
    model = Net(32)
    scaling = plan(model, base=Net(8), rule="complete-p", roles=ROLES)
    groups = [{"params": list(model.parameters()), "lr": 1.0, "eps": (1e-30, 1e-3)}]
    for part in split(groups, scaling, {p: n for n, p in model.named_parameters()}, by_role=False):
        # It is added to the squares of gradients.
        assert scaled_group(groups[0], part, 1.0)["eps"] == pytest.approx((1e-30 * part.entry.eps**2, 1e-3), rel=1e-12)
    assert {entry.eps for entry in scaling.parameters} != {1.0}
