"""The plan of ``mup`` against the package ``mup`` (microsoft/mup), on an MLP and a transformer that declare nothing.

The package gives the readout the forward multiplier 1/width_mult; our plan folds it into the weights (docs/theory.md section 2).
So the FUNCTION is compared: init and lr with the multiplier folded in, and the losses of whole training runs. It differs by
design in Adam's epsilon, which the package does not scale: the training runs set it to (almost) zero.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_mue.parameterizations import initialize, param_groups, plan

mup = pytest.importorskip("mup")

CLASSES, INPUTS, VOCABULARY = 5, 12, 11
BASE, DELTA, TARGET = 16, 24, 96
RATIO = TARGET / BASE


def mlp(width, readout=nn.Linear):
    return nn.Sequential(
        nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, 2 * width), nn.Tanh(), readout(2 * width, CLASSES)
    )


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.ffn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        heads = (p(self.norm(x)).unflatten(-1, (-1, 8)).transpose(1, 2) for p in (self.query, self.key, self.value))
        # Heads of 8: the size of a head does not grow, so neither side scales the logits further.
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True, scale=1 / 8)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class TransformerLM(nn.Module):
    def __init__(self, width, readout=nn.Linear):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.final_norm = nn.LayerNorm(width)
        self.readout = readout(width, VOCABULARY)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.readout(self.final_norm(x))


MODELS = {"mlp": mlp, "transformer": TransformerLM}


@pytest.fixture(params=MODELS)
def make(request):
    torch.manual_seed(0)
    return MODELS[request.param]


def of_mup(make, rescale=False):
    """The package's target, with base shapes set."""
    target = make(TARGET, mup.MuReadout)
    return mup.set_base_shapes(
        target, make(BASE, mup.MuReadout), delta=make(DELTA, mup.MuReadout), rescale_params=rescale
    )


def ours(make, family="adam", rule="mup"):
    target, base = make(TARGET), make(BASE)
    return target, base, plan(target, base=base, rule=rule, family=family)


def folds(model):
    """Name -> forward multiplier of that weight in the package's model."""
    readouts = {name: m for name, m in model.named_modules() if isinstance(m, mup.MuReadout)}
    return {f"{name}.weight": 1 / m.width_mult() for name, m in readouts.items()}


def factors(optimizer, model, key, base_value):
    groups = {p: group[key] / base_value for group in optimizer.param_groups for p in group["params"]}
    return {name: groups[p] for name, p in model.named_parameters()}


def weights(model):
    return {name: p for name, p in model.named_parameters() if p.dim() == 2}


def test_init_std_ratio(make):
    """The package's sampler draws, on one seed, the plain sampler's numbers times its factor."""
    model, base = of_mup(make), make(BASE)
    planned = plan(make(TARGET), base=lambda: make(BASE), rule="mup")
    # torch's own: uniform in +-fan_in^-1/2 for a linear layer, normal for an embedding.
    base_std = {n: 1.0 if "embedding" in n else (3 * p.shape[1]) ** -0.5 for n, p in weights(base).items()}
    for name, parameter in weights(model).items():
        plain = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        torch.manual_seed(3)
        mup.normal_(parameter, std=1.0)
        factor = (parameter / plain).detach().double().mean().item() * folds(model).get(name, 1.0)
        assert planned[name].init.value / base_std[name] == pytest.approx(factor, rel=1e-6), name
    assert sum(factor != 1.0 for factor in folds(model).values()) == 1


def test_absolute_init_std_from_pytorchs_own_initialization(make):
    """``set_base_shapes`` rescales PyTorch's default draw; ours measures the base and draws from the plan."""
    model, (target, base, planned) = of_mup(make, rescale=True), ours(make)
    initialize(target, planned, seed=1)
    drawn, measured = dict(target.named_parameters()), dict(base.named_parameters())
    for name, parameter in weights(model).items():
        expected = parameter.std().item() * folds(model).get(name, 1.0)
        # Four standard errors of the noisiest of the three stds, that of the base, which has the fewest entries.
        tolerance = 4 * (1 / (2 * measured[name].numel())) ** 0.5
        assert drawn[name].std().item() == pytest.approx(expected, rel=tolerance), name
        if "embedding" not in name and name != "0.weight":  # the rest would not pass with the base's own std
            assert measured[name].std().item() != pytest.approx(expected, rel=tolerance), name


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
@pytest.mark.parametrize("family", ["adam", "sgd"])
def test_factors_of_lr_and_weight_decay(make, family, key):
    model, (_, _, planned) = of_mup(make), ours(make, family)
    build = mup.MuAdamW if family == "adam" else mup.MuSGD
    found = factors(build(model.parameters(), lr=0.1, weight_decay=0.01), model, key, {"lr": 0.1}.get(key, 0.01))
    power = {"adam": 1, "sgd": 2}[family] * (1 if key == "lr" else -1)
    for name, factor in found.items():
        folded = factor * folds(model).get(name, 1.0) ** power
        mine = planned[name].lr if key == "lr" else planned[name].weight_decay
        assert mine == pytest.approx(folded, rel=1e-6), name
    assert len({round(value, 6) for value in found.values()}) > 1


def test_muadam_and_muadamw_scale_alike(make):
    """One table for Adam: the package's two optimizers give the same factors."""
    model = of_mup(make)
    both = [factors(build(model.parameters(), lr=1.0), model, "lr", 1.0) for build in (mup.MuAdam, mup.MuAdamW)]
    assert both[0] == both[1]


def test_epsilon_is_scaled_by_us_and_not_by_the_package(make):
    _, _, planned = ours(make)
    assert {round(p.eps, 9) for p in planned.parameters if p.role != "unembedding"} == {round(1 / RATIO, 9)}
    groups = mup.MuAdamW(of_mup(make).parameters(), lr=1.0, eps=1e-3).param_groups
    assert {group["eps"] for group in groups} == {1e-3}


def losses(model, optimizer, steps=12):
    torch.manual_seed(7)
    tokens = isinstance(model, TransformerLM)
    inputs = torch.randint(0, VOCABULARY, (8, 10)) if tokens else torch.randn(40, INPUTS, dtype=torch.float64)
    targets = torch.randint(0, VOCABULARY if tokens else CLASSES, (80 if tokens else 40,))
    result = []
    for _ in range(steps):
        loss = F.cross_entropy(model(inputs).flatten(0, -2), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(loss.item())
    return result


def trained(make, kind, rule="mup"):
    """Losses of the package's run and of ours, from the same function at the start, in float64."""
    theirs = of_mup(make, rescale=True).double()
    target, _, planned = ours(make, "sgd" if kind == "sgd" else "adam", rule)
    target.double()
    with torch.no_grad():
        for (name, p), q in zip(theirs.named_parameters(), target.parameters(), strict=True):
            q.copy_(p * folds(theirs).get(name, 1.0))
    if kind == "sgd":
        settings = {"lr": 0.1, "weight_decay": 0.02, "momentum": 0.9}
        optimizers = (
            mup.MuSGD(theirs.parameters(), **settings),
            torch.optim.SGD(param_groups(target, planned, **settings)),
        )
    else:
        # Not zero: Adam divides by it where a gradient is zero.
        settings = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-150}
        optimizers = (
            mup.MuAdamW(theirs.parameters(), **settings),
            torch.optim.AdamW(param_groups(target, planned, **settings)),
        )
    return losses(theirs, optimizers[0]), losses(target, optimizers[1])


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_training_runs_agree_to_round_off(make, kind):
    theirs, mine = trained(make, kind)
    assert theirs[-1] < 0.97 * theirs[0]  # it trains, so a wrong factor would show
    # Twelve steps amplify the roundoff of float64, 1e-16, by a few orders.
    assert mine == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_without_the_rule_they_do_not_agree(make, kind):
    """Negative control: standard parameterization from the same weights trains differently."""
    theirs, mine = trained(make, kind, rule="sp")
    assert mine[0] == pytest.approx(theirs[0], rel=1e-9)
    assert abs(mine[-1] / theirs[-1] - 1) > 1e-3


def test_matrices_that_grow_unequally_need_their_roles():
    """mup divides the rate of each matrix by its own fan-in's growth; a plan does so once the down matrix has its role."""

    def make(width, hidden, readout=nn.Linear):
        return nn.Sequential(
            nn.Linear(INPUTS, width), nn.Linear(width, hidden), nn.Linear(hidden, width), readout(width, CLASSES)
        )

    model = mup.set_base_shapes(
        make(64, 96, mup.MuReadout), make(16, 12, mup.MuReadout), delta=make(24, 18, mup.MuReadout)
    )
    target, base = make(64, 96), make(16, 12)
    target.mue_axes, base.mue_axes = (lambda: {"width": 64, "ffn_width": 96}), (lambda: {"width": 16, "ffn_width": 12})
    for family, build in (("adam", mup.MuAdamW), ("sgd", mup.MuSGD)):
        planned = plan(
            target, base=base, rule="mup", family=family, roles={r"1\.weight": "ffn_up", r"2\.weight": "ffn_down"}
        )
        found = factors(build(model.parameters(), lr=1.0), model, "lr", 1.0)
        for name in ("1.weight", "2.weight", "1.bias", "2.bias", "3.bias"):
            assert planned[name].lr == pytest.approx(found[name], rel=1e-6), (family, name)


class SharedLM(TransformerLM):
    """The readout is the embedding: the package's shared readout, or a linear layer with the embedding's weight."""

    def __init__(self, width, shared=None):
        super().__init__(width)
        if shared is None:
            self.readout = nn.Linear(width, VOCABULARY, bias=False)
            self.readout.weight = self.embedding.weight
        else:  # the package's own bias has the wrong size: it takes the table's sides as (in, out)
            self.readout = shared(self.embedding.weight, bias=False)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_tied_readout_trains_like_the_packages_shared_one(kind):
    """The package divides the readout's input by the ratio of widths; ours folds that into gain and bias of the final norm."""
    torch.manual_seed(0)
    base, delta, theirs = (SharedLM(width, mup.MuSharedReadout) for width in (BASE, DELTA, TARGET))
    mup.set_base_shapes(theirs, base, delta=delta, rescale_params=False)
    target, family = SharedLM(TARGET), "sgd" if kind == "sgd" else "adam"
    planned = plan(target, base=SharedLM(BASE), rule="mup", family=family)
    theirs.double(), target.double()
    drawn = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, q in target.named_parameters():
            q.copy_(drawn[name] / (RATIO if name.startswith("final_norm") else 1.0))
    settings = {"lr": 0.01, "weight_decay": 0.1} | ({"momentum": 0.9} if kind == "sgd" else {"eps": 1e-150})
    build, plain = (mup.MuSGD, torch.optim.SGD) if kind == "sgd" else (mup.MuAdamW, torch.optim.AdamW)
    expected = losses(theirs, build(theirs.parameters(), **settings))
    control = copy.deepcopy(target)
    assert losses(target, plain(param_groups(target, planned, **settings))) == pytest.approx(expected, rel=1e-9)
    assert expected[-1] < 0.97 * expected[0]
    groups = param_groups(control, planned, **settings)
    for group in groups:
        group["lr"] *= 1.01
    assert abs(losses(control, plain(groups))[-1] / expected[-1] - 1) > 1e-6
