"""ScaledStep: the groups that an optimizer updates with, and what the user, schedulers and closures see."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mue.parameterizations import Init, ParameterPlan, ScaledStep, ScalingPlan
from lightning_mue.parameterizations.applying.families import family_of
from lightning_mue.parameterizations.applying.groups import scale_groups, split
from lightning_mue.parameterizations.applying.rate_tags import rate_tags

ROLES = {"embedding": 1.0, "hidden": 0.25, "head": 0.5}
KINDS = {"embedding": "embedding", "hidden": "hidden", "head": "unembedding"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in {"embedding": (6, 4), "hidden": (4, 4), "head": (6, 4)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator)))

    def forward(self):
        return (self.head @ self.hidden @ self.embedding.T).square().mean()


def make_plan(model, **changes):
    entries = {
        name: ParameterPlan(
            name, KINDS[name], tuple(p.shape), name, Init("normal", 1.0), ROLES[name], 1 / ROLES[name], 2.0, "adamw", ""
        )
        for name, p in model.named_parameters()
    }
    for name, change in changes.items():
        entries[name] = ParameterPlan(**{**vars(entries[name]), **change})
    return ScalingPlan("mup", "adam", 1.0, {}, {}, 1.0, tuple(entries.values()))


class Seeing(AdamW):
    """Notes the group of each parameter at the moment of its update."""

    def __init__(self, *args, **kwargs):
        self.seen = []
        super().__init__(*args, **kwargs)

    def _init_group(self, group, params_with_grad, *args, **kwargs):
        result = super()._init_group(group, params_with_grad, *args, **kwargs)
        self.seen += [(id(p), group["lr"], group["weight_decay"], group["eps"]) for p in params_with_grad]
        return result


def setup(make=Seeing, plan=None, **kwargs):
    model = Net()
    optimizer = make(model.parameters(), **{"lr": 0.01, "weight_decay": 0.1, **kwargs})
    return model, optimizer, ScaledStep(optimizer, plan or make_plan(model), model)


def closure_of(model, optimizer, before=lambda: None):
    def closure():
        before()
        optimizer.zero_grad()
        loss = model()
        loss.backward()
        return loss

    return closure


SCHEDULERS = {
    "LambdaLR": lambda o: LambdaLR(o, lambda s: 0.9**s),
    "MultiStepLR": lambda o: MultiStepLR(o, [10, 30]),
    "LinearLR": lambda o: LinearLR(o, 0.1, total_iters=20),
    "ExponentialLR": lambda o: ExponentialLR(o, 0.95),
    "PolynomialLR": lambda o: PolynomialLR(o, 40),
    "CosineAnnealingLR": lambda o: CosineAnnealingLR(o, 50, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda o: CosineAnnealingWarmRestarts(o, 7, eta_min=1e-3),
    "CyclicLR": lambda o: CyclicLR(o, 1e-3, 1e-1, step_size_up=6, cycle_momentum=False),
    "OneCycleLR": lambda o: OneCycleLR(o, 0.1, total_steps=60),
    "SequentialLR": lambda o: SequentialLR(o, [LinearLR(o, 0.1, total_iters=5), ExponentialLR(o, 0.9)], [5]),
    # torch steps an inner SequentialLR only where it comes first.
    "nested SequentialLR": lambda o: SequentialLR(
        o,
        [
            SequentialLR(o, [LinearLR(o, 0.1, total_iters=5), ExponentialLR(o, 0.9)], [5]),
            CosineAnnealingLR(o, 30, eta_min=1e-3),
        ],
        [20],
    ),
    "ReduceLROnPlateau": lambda o: ReduceLROnPlateau(o, factor=0.5, patience=1, min_lr=2e-3),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("with_closure", [True, False])
def test_ratios_hold_under_schedulers(name, with_closure):
    """Figure of the mechanics: 1e-12 over 50 steps, at the moment of the update."""
    model, optimizer, scaled = setup()
    plain = SGD([nn.Parameter(torch.zeros(1))], lr=0.01, momentum=0.9)
    schedulers = [SCHEDULERS[name](o) for o in (optimizer, plain)]
    names = {id(p): n for n, p in model.named_parameters()}
    rates = set()
    for _ in range(50):
        optimizer.seen.clear()
        closure = closure_of(model, optimizer)
        if with_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        plain.step()
        lr = plain.param_groups[0]["lr"]
        assert len(optimizer.seen) == 3
        for key, used, decay, eps in optimizer.seen:
            factor = ROLES[names[key]]
            assert used == pytest.approx(lr * factor, rel=1e-12)
            assert used * decay == pytest.approx(lr * 0.1, rel=1e-12)
            assert eps == pytest.approx(2e-8, rel=1e-12)
        expected = {role: pytest.approx(lr * ROLES[n], rel=1e-12) for n, role in KINDS.items()}
        assert scaled.effective_lr == expected
        rates.add(lr)
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(rates) > 2
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]


def test_splitting_the_groups_for_good_would_bend_the_schedule():
    """The control: why the groups are swapped and not split."""
    model = Net()
    groups = [{"params": [p], "lr": 0.01 * ROLES[n]} for n, p in model.named_parameters()]
    optimizer = AdamW(groups)
    scheduler = SCHEDULERS["CosineAnnealingLR"](optimizer)
    for _ in range(50):
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[1]["lr"] / optimizer.param_groups[0]["lr"] > 0.5


def test_what_a_closure_changes_counts():
    """In Lightning's automatic optimization training_step and hooks run in the closure."""
    model, optimizer, _ = setup()
    groups_seen = []

    def change():
        groups_seen.append(len(optimizer.param_groups))
        optimizer.param_groups[0]["lr"] = 0.03
        optimizer.param_groups[0]["weight_decay"] = 0.7

    optimizer.step(closure_of(model, optimizer, change))
    used = {lr: decay for _, lr, decay, _ in optimizer.seen}
    assert used == {0.03 * f: pytest.approx(0.7 / f) for f in ROLES.values()}
    assert groups_seen == [1]
    assert optimizer.param_groups[0]["lr"] == 0.03


def test_closure_by_keyword_and_return_value():
    model, optimizer, _ = setup()
    loss = optimizer.step(closure=closure_of(model, optimizer))
    assert loss.item() == pytest.approx(Net()().item())
    assert {lr for _, lr, _, _ in optimizer.seen} == {0.01 * f for f in ROLES.values()}


def test_closure_called_twice_sees_the_users_groups_twice():
    class Twice(SGD):
        def step(self, closure=None):
            closure()
            return super().step(closure)

    model, optimizer, _ = setup(Twice)
    seen = []
    optimizer.step(closure_of(model, optimizer, lambda: seen.append(len(optimizer.param_groups))))
    assert seen == [1, 1]
    assert len(optimizer.param_groups) == 1


def test_groups_come_back_after_a_closure_or_an_update_that_raises():
    class Failing(AdamW):
        fails = True

        def _init_group(self, *args):
            if self.fails:
                raise RuntimeError("out of memory")
            return super()._init_group(*args)

    model, optimizer, scaled = setup(Failing)
    own = optimizer.param_groups

    def closure():
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        optimizer.step(closure)
    assert optimizer.param_groups is own
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure_of(model, optimizer))
    assert optimizer.param_groups is not own
    scaled.restore()
    assert optimizer.param_groups is own
    # The next step restores the groups first, if nothing else has.
    with pytest.raises(RuntimeError):
        optimizer.step(closure_of(model, optimizer))
    optimizer.fails = False
    optimizer.step(closure_of(model, optimizer))
    assert optimizer.param_groups is own


def test_remove_detaches():
    model, optimizer, scaled = setup()
    scaled.remove()
    optimizer.step(closure_of(model, optimizer))
    assert {lr for _, lr, _, _ in optimizer.seen} == {0.01}


def test_changes_of_the_groups_are_followed():
    """Groups added, parameters moved, states loaded: the split that is kept between steps is computed again."""
    model, optimizer, _ = setup()
    optimizer.step(closure_of(model, optimizer))
    moved = optimizer.param_groups[0]["params"].pop()
    optimizer.add_param_group({"params": [moved], "lr": 0.5})
    optimizer.seen.clear()
    optimizer.step(closure_of(model, optimizer))
    used = {key: lr for key, lr, _, _ in optimizer.seen}
    assert used == {id(model.embedding): 0.01, id(model.hidden): 0.0025, id(model.head): 0.25}
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][1]["lr"] = 0.1
    optimizer.load_state_dict(state)
    optimizer.seen.clear()
    optimizer.step(closure_of(model, optimizer))
    assert {key: lr for key, lr, _, _ in optimizer.seen}[id(model.head)] == 0.05
    # In the same list, another parameter.
    first, second = (group["params"] for group in optimizer.param_groups)
    first[0], second[0] = second[0], first[0]
    optimizer.seen.clear()
    optimizer.step(closure_of(model, optimizer))
    assert {key: lr for key, lr, _, _ in optimizer.seen}[id(model.embedding)] == pytest.approx(0.1)


class Counting(torch.optim.Optimizer):
    """Keeps a count in its groups, as schedule-free and Prodigy-like optimizers do."""

    mue_family = "sgd"
    counts = staticmethod(lambda group: group.get("k", 0) + 1)

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def step(self, closure=None):
        closure()
        for group in self.param_groups:
            group["k"] = self.counts(group)


def test_what_an_optimizer_keeps_in_its_groups_lasts():
    model, optimizer, _ = setup(Counting)
    for _ in range(3):
        optimizer.step(closure_of(model, optimizer))
    assert optimizer.param_groups[0]["k"] == 3


def test_state_in_groups_that_cannot_be_shared_is_refused():
    class Weighing(Counting):
        counts = staticmethod(lambda group: group.get("k", 0) + group["lr"])

    model, optimizer, _ = setup(Weighing)
    with pytest.raises(ValueError, match=r"Weighing keeps 'k'.*param_groups\(model, plan\)"):
        optimizer.step(closure_of(model, optimizer))


class Syncs(TorchDispatchMode):
    """Counts what makes a device wait: reading a tensor's value."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_swap_reads_no_tensor(tensor_lr):
    lr = torch.tensor(0.01) if tensor_lr else 0.01
    model, optimizer, scaled = setup(lr=lr, foreach=False, capturable=False)
    closure = closure_of(model, optimizer)
    with Syncs() as syncs:
        for _ in range(3):
            scaled._before(optimizer, (optimizer,), {})
            scaled._after(optimizer, (optimizer,), {})
            _, kwargs = scaled._before(optimizer, (optimizer,), {"closure": closure})
            kwargs["closure"]()
            scaled._after(optimizer, (optimizer,), kwargs)
    assert syncs.count == 0
    with Syncs() as syncs:  # the control: it would be seen
        float(torch.tensor(0.01))
    assert syncs.count == 1


def test_equal_factors_share_a_group():
    """Fewer groups, fewer kernels; the roles' rates are still told apart."""
    model = Net()
    plan = make_plan(model, head={"lr": 0.25, "weight_decay": 4.0})
    optimizer = AdamW(model.parameters(), lr=0.01)
    assert [sorted(p.roles) for p in split(optimizer.param_groups, plan, names_of(model), by_role=False)] == [
        ["embedding"],
        ["hidden", "unembedding"],
    ]
    assert len(scale_groups(optimizer.param_groups, plan, names_of(model))) == 3
    assert ScaledStep(optimizer, plan, model).effective_lr == {
        "embedding": 0.01,
        "hidden": 0.0025,
        "unembedding": 0.0025,
    }


def names_of(model):
    return {p: n for n, p in model.named_parameters()}


def test_tags_of_a_role_with_several_rates():
    model = Net()
    plan = make_plan(model, head={"role": "hidden"})

    def tags(groups, plan):
        return {tag for tag, _ in rate_tags(split(groups, plan, names_of(model), by_role=False), groups)}

    together = [{"params": list(model.parameters()), "lr": 0.1}]
    apart = [{"params": [model.embedding, model.hidden], "lr": 0.1}, {"params": [model.head], "lr": 0.1, "name": "top"}]
    assert tags(together, make_plan(model)) == {"embedding", "hidden", "unembedding"}
    assert tags(together, plan) == {"embedding", "hidden/x0.25", "hidden/x0.5"}
    assert tags(apart, plan) == {"embedding", "hidden/group0/x0.25", "hidden/top/x0.5"}
    other_kind = make_plan(model, head={"role": "hidden", "kind": "sgd", "lr": 0.25, "weight_decay": 4.0})
    assert tags(together, other_kind) == {"embedding", "hidden/adamw", "hidden/sgd"}


def decay_of_a_step(model, optimizer):
    """What weight decay alone takes from a weight of 1."""
    optimizer.param_groups[0]["weight_decay"] = 0.5
    optimizer.state[model.weight]["momentum_buffer"].zero_()
    model.weight.grad = torch.zeros_like(model.weight)
    model.weight.data.fill_(1.0)
    optimizer.step()
    return 1.0 - float(model.weight.detach()[0, 0])


MUON_SHAPES = {"wide": ((4, 8), (8, 64)), "tall": ((8, 4), (64, 8)), "square": ((4, 4), (16, 16))}


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shapes", MUON_SHAPES.values(), ids=list(MUON_SHAPES))
def test_muons_update_scales_as_the_plan_says(adjust, shapes):
    """The spectral norm of the target's update over the base's, with the same `lr`, is the plan's factor."""
    norms, decays = [], []
    factor = 0.3
    # Muon's own coefficients leave singular values between 0.7 and 1.2; these converge to 1.
    converging = {"ns_coefficients": (1.5, -0.5, 0.0), "ns_steps": 40}
    for shape in shapes:
        model = nn.Linear(shape[1], shape[0], bias=False)
        entry = ParameterPlan(
            "weight", "hidden", shape, "weight", Init("normal", 1.0), factor, 1.0, 1.0, "muon", "", base_shape=shapes[0]
        )
        optimizer = torch.optim.Muon(model.parameters(), lr=0.01, weight_decay=0.0, adjust_lr_fn=adjust, **converging)
        if shape == shapes[1]:
            ScaledStep(optimizer, ScalingPlan("hyperp", "muon", 1.0, {}, {}, 1.0, (entry,)), model)
        before = model.weight.detach().clone()
        model.weight.grad = nn.init.orthogonal_(torch.empty(shape), generator=torch.Generator().manual_seed(0))
        optimizer.step()
        norms.append(float(torch.linalg.matrix_norm(model.weight.detach() - before, 2)))
        decays.append(decay_of_a_step(model, optimizer))
    # bfloat16 products in torch's Muon.
    assert norms[1] / norms[0] == pytest.approx(factor, rel=0.02)
    # lr * weight_decay follows the plan's product and not Muon's adjustment of the rate; float32.
    assert decays[1] / decays[0] == pytest.approx(factor, rel=1e-3)


def test_muon_refuses_what_is_not_its_own():
    model = Net()
    with pytest.raises(ValueError, match=r"optimizer: found embedding \(embedding\) in torch.optim.Muon.*'adamw'"):
        ScaledStep(torch.optim.Muon(model.parameters()), make_plan(model), model)


def test_families():
    parameters = [nn.Parameter(torch.zeros(1, 1))]
    assert family_of(torch.optim.Muon(parameters)) == "muon"
    assert family_of(AdamW(parameters)) == "adam"
    assert family_of(Seeing(parameters)) == "adam"  # by what it inherits from
    declared = torch.optim.Adagrad(parameters)
    declared.mue_family = "adam"
    assert family_of(declared) == "adam"


def test_only_torchs_muon_is_known_by_its_type():
    parameters = [nn.Parameter(torch.zeros(1, 1))]

    class Descendant(torch.optim.Muon):
        """Its factors of the shape are torch's."""

    class NorMuon(AdamW):
        """Somebody's own: it would pass for Adam by what it inherits from, and for torch's Muon by its name."""

    class Heir(NorMuon):
        """A name that says nothing."""

    assert family_of(Descendant(parameters)) == "muon"
    for make in (Heir, NorMuon):
        with pytest.raises(
            ValueError, match=r"optimizer: found (NorMuon|Heir), a Muon whose.*mue_family = 'muon'.*spectral norm"
        ):
            family_of(make(parameters))
        make.mue_family = "muon"
        assert family_of(make(parameters)) == "muon"
