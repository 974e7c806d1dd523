"""Groups added to a built optimizer: one entry for the caller, each parameter stepped by its kind."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import ExponentialLR

from lightning_mue import plan
from lightning_mue.optim import HyperSphereOptimizer
from lightning_mue.optim.schedule import WarmupDecay
from lightning_mue.parameterizations.applying.scaled_step import ScaledStep

SHAPES = {"embedding.weight": (7, 5), "hidden.weight": (5, 5), "norm.bias": (5,), "lm_head.weight": (6, 5)}
KINDS = ["adamw", "sphere", "adamw", "adam_sphere"]


def weights(seed, shapes=SHAPES):
    draw = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=draw)) for name, shape in shapes.items()}


def train(members, optimizer, seeds):
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        for p in members.values():
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()


def head(**options):
    """Return an optimizer with one hidden matrix."""
    first = nn.Parameter(torch.ones(3, 3))
    return HyperSphereOptimizer([("first.weight", first)], **{"lr": 0.1, "compute_dtype": "float64", **options})


def with_added(late, **group):
    optimizer = head(adamw_lr=0.001)
    optimizer.add_param_group({"params": list(late.items()), "lr": 0.03, **group})
    return optimizer


def assert_same(members, expected):
    for name, p in expected.items():
        assert torch.equal(p, members[name]), name


@pytest.mark.parametrize("sphere", [True, False])
@pytest.mark.parametrize("decay", [None, 0.5])
def test_one_added_group_is_one_entry_and_steps_by_kind(sphere, decay):
    options = {"sphere": sphere, "weight_decay": 0.2, "adamw_weight_decay": decay}
    late, expected = weights(0), weights(0)
    optimizer = head(adamw_lr=0.001, **options)
    optimizer.add_param_group({"params": list(late.items()), "lr": 0.03})
    assert [(group["kind"], group["lr"]) for group in optimizer.param_groups[1:]] == [("mixed", 0.03)]
    assert all(a is b for a, b in zip(optimizer.param_groups[1]["params"], late.values(), strict=True))
    reference = HyperSphereOptimizer(expected.items(), lr=0.03, compute_dtype="float64", **options)
    assert len(reference.param_groups) == (3 if sphere else 2)
    for i, rate in enumerate((0.03, 0.02, 0.01)):
        optimizer.param_groups[-1]["lr"] = rate  # what BackboneFinetuning writes
        for group in reference.param_groups:
            group["lr"] = rate
        train(late, optimizer, [i])
        train(expected, reference, [i])
    assert_same(late, expected)
    for name, p in expected.items():
        assert not torch.equal(p, weights(0)[name])
        assert optimizer.state[late[name]].keys() == reference.state[p].keys()
    assert optimizer.mue_family == reference.mue_family
    assert "hidden.weight [5, 5] by shape" in optimizer.describe()


def test_rates_of_adamw_keep_their_ratio_under_a_scheduler_where_the_group_sets_no_lr():
    late, expected = weights(1), weights(1)
    optimizer = head(adamw_lr=0.02)
    optimizer.add_param_group({"params": list(late.items())})
    reference = HyperSphereOptimizer(expected.items(), lr=0.1, adamw_lr=0.02, compute_dtype="float64")
    schedules = [ExponentialLR(each, 0.5) for each in (optimizer, reference)]
    for i in range(3):
        train(late, optimizer, [i])
        train(expected, reference, [i])
        for schedule in schedules:
            schedule.step()
    for name, p in expected.items():
        torch.testing.assert_close(late[name], p, rtol=1e-6, atol=1e-7)  # 0.1 * 0.2 is not 0.02 to the last bit
        assert (p - weights(1)[name]).abs().max() > 1e-3
    with pytest.raises(ValueError, match=r"lr: found 0 beside adamw_lr=0.5 in one group.*Give the group an `lr` other"):
        optimizer.add_param_group({"params": list(weights(2).items()), "lr": 0.0, "adamw_lr": 0.5})
    assert len(optimizer.param_groups) == 2
    optimizer.add_param_group({"params": list(weights(2).items()), "lr": 0.0})
    assert [part["lr"] for part in optimizer._parts()[-3:]] == [0.0] * 3


@pytest.mark.parametrize("how", ["auto", 5])
def test_matrices_that_are_split_stay_in_the_one_group(how):
    shapes = {"a.in_proj_weight": (15, 5), "hidden.weight": (5, 5), "gate_up_proj.weight": (10, 5), "norm.bias": (5,)}
    late, expected = weights(3, shapes), weights(3, shapes)
    for kind in (None, "sphere"):
        members = {name: p for name, p in late.items() if kind is None or p.ndim > 1}
        optimizer, given = head(split="auto"), {} if kind is None else {"kind": kind}
        optimizer.add_param_group({"params": list(members.items()), "split": how, **given})
        added = optimizer.param_groups[-1]
        assert len(optimizer.param_groups) == 2
        assert added["kind"] == (kind or "mixed")
        reference = HyperSphereOptimizer(expected.items(), lr=0.1, split=how, compute_dtype="float64")
        train(members, optimizer, range(2))
        train({name: expected[name] for name in members}, reference, range(2))
        for name, p in members.items():
            assert torch.equal(p, expected[name]), name
            radius = optimizer.state[p].get("radius")
            assert radius is None or torch.equal(radius, reference.state[expected[name]]["radius"])
        state = copy.deepcopy(optimizer.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.load_state_dict(state)
        late, expected = weights(3, shapes), weights(3, shapes)


def test_a_mixed_group_survives_copies_saves_and_replacement():
    late = weights(1)
    optimizer = with_added(late, weight_decay=0.1, adamw_weight_decay=0.0)
    train(late, optimizer, range(2))
    copied, copied_optimizer = copy.deepcopy((late, optimizer))
    loaded, loaded_optimizer = pickle.loads(pickle.dumps((late, optimizer)))
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in late.items()}
    resumed_optimizer = with_added(resumed, weight_decay=0.1, adamw_weight_decay=0.0)
    # As BaseFinetuning.on_fit_start does on resume, before the state is loaded.
    resumed_optimizer.param_groups = [dict(group) for group in resumed_optimizer.param_groups]
    resumed_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    again = {name: nn.Parameter(p.detach().clone()) for name, p in late.items()}
    groups = [{**group} for group in optimizer.param_groups]
    groups[1]["params"] = list(again.values())
    rebuilt = HyperSphereOptimizer(groups)  # as wrapping optimizers do
    assert [group["kind"] for group in rebuilt.param_groups] == ["sphere", "adamw", "sphere", "adam_sphere"]
    assert [group["lr"] for group in rebuilt.param_groups] == [0.1, 0.03, 0.03, 0.03]
    assert [group["weight_decay"] for group in rebuilt.param_groups] == [0.0, 0.0, 0.1, 0.1]
    pairs = [(late, optimizer), (copied, copied_optimizer), (loaded, loaded_optimizer), (resumed, resumed_optimizer)]
    for members, each in pairs:
        assert each.param_groups[-1]["kind"] == "mixed"
        assert "trainable" not in each.param_groups[-1]
        train(members, each, range(2, 4))
        assert_same(members, late)
        each.add_param_group(
            {"params": [("x.weight", nn.Parameter(torch.ones(2, 2))), ("x.bias", nn.Parameter(torch.ones(2)))]}
        )
        assert each.param_groups[-1]["name"] == "mixed-2"


def test_groups_without_names_join_those_with_names_and_the_other_way_round():
    late, noted = weights(2), weights(2)
    optimizer = head()
    with pytest.warns(UserWarning, match=r"found 3 of 4 parameters \(numbers 0, 1, 3\).*note_names\(model\)") as caught:
        optimizer.add_param_group({"params": list(late.values()), "lr": 0.5})
    assert [caught[0].filename, len(caught)] == [__file__, 1]
    assert optimizer.param_groups[-1]["param_names"] == [""] * 4
    assert optimizer.param_groups[-1]["kinds"] == ["sphere", "sphere", "adamw", "sphere"]
    train(late, optimizer, range(2))
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.describe().count("(unnamed)") == 4
    with pytest.warns(UserWarning, match="hidden matrices"):
        nameless = HyperSphereOptimizer([nn.Parameter(torch.ones(3, 3))])
    model = nn.Module()
    for name, p in noted.items():
        module, leaf = name.split(".")
        model.add_module(module, nn.Module())
        model.get_submodule(module).register_parameter(leaf, p)
    nameless.note_names(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nameless.add_param_group({"params": [*noted.values(), nn.Parameter(torch.ones(2))]})
    assert [group["param_names"] for group in nameless.param_groups] == [[""], [*noted, ""]]
    assert nameless.param_groups[-1]["kinds"] == [*KINDS, "adamw"]
    with pytest.warns(UserWarning, match=r"found 1 of 2 parameters \(numbers 0\) with two or three"):
        nameless.add_param_group({"params": [nn.Parameter(torch.ones(4, 2, 3)), nn.Parameter(torch.ones(2, 2, 3, 3))]})


def test_torch_checkpoints_of_unnamed_groups_and_their_order():
    model = nn.ModuleDict(
        {"head": nn.Linear(4, 3, bias=False), "body": nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))}
    )

    def build(order=1):
        clone = copy.deepcopy(model)
        optimizer = HyperSphereOptimizer(clone["head"].named_parameters("head"), compute_dtype="float64")
        with pytest.warns(UserWarning, match="found 1 of 4"):
            optimizer.add_param_group({"params": list(clone["body"].parameters())[::order], "lr": 0.03})
        return clone, optimizer

    (one, optimizer), (other, resumed) = build(), build()
    train(dict(one.named_parameters()), optimizer, range(2))
    other.load_state_dict(one.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(one, optimizer))
    set_optimizer_state_dict(other, resumed, saved)
    for each, stepped in ((one, optimizer), (other, resumed)):
        train(dict(each.named_parameters()), stepped, range(2, 4))
    assert_same(dict(other.named_parameters()), dict(one.named_parameters()))
    turned, optimizer = build(-1)
    with pytest.raises(
        ValueError, match=r"found the kind 'sphere' for parameter .*\[4\].*expected 'radius'.*same order"
    ):
        set_optimizer_state_dict(turned, optimizer, saved)


def test_groups_that_need_no_joining_and_kinds_that_do_not_fit():
    optimizer = with_added(weights(4))
    optimizer.add_param_group({"params": [], "lr": 0.5})
    optimizer.add_param_group({"params": [("d.bias", nn.Parameter(torch.ones(4)))], "name": "last"})
    assert [group["name"] for group in optimizer.param_groups] == ["sphere", "mixed", "adamw", "last"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.03, 0.5, 0.001]
    with pytest.raises(ValueError, match=r"kinds: found 0 entries.*expected one for each of its 1.*leave `kind` out"):
        optimizer.add_param_group({"params": [("e.bias", nn.Parameter(torch.ones(4)))], "kind": "mixed"})
    optimizer.param_groups[1]["params"].pop()
    with pytest.raises(ValueError, match="kinds: found 4 entries in a param group, expected one for each of its 3"):
        optimizer.step()


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize(("key", "meant"), [("lrr", "lr"), ("weight_dacay", "weight_decay"), ("wd", "weight_decay")])
def test_misspelt_keys_are_refused_by_name(key, meant, add):
    group = {"params": [("b.weight", nn.Parameter(torch.ones(3, 3)))], key: 0.5}
    with pytest.raises(ValueError, match=f"param group: found the key '{key}'.*Did you mean '{meant}'"):
        head().add_param_group(group) if add else HyperSphereOptimizer([group])


def test_notes_in_a_group_are_told_and_keys_of_torch_are_not():
    optimizer = head()
    with pytest.warns(UserWarning, match=r"found the keys 'lr_scale', 'tag', which are no options") as caught:
        optimizer.add_param_group({"params": [("b.weight", nn.Parameter(torch.ones(3, 3)))], "lr_scale": 0.5, "tag": 1})
    assert caught[0].filename == __file__
    assert optimizer.param_groups[-1]["lr_scale"] == 0.5
    other = torch.optim.AdamW([nn.Parameter(torch.ones(3))])
    ExponentialLR(other, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.add_param_group(other.param_groups[0])


def test_warmup_decay_leaves_added_groups_to_who_added_them():
    optimizer = head()
    schedule = WarmupDecay(optimizer, total_steps=10, warmup=0.0)
    optimizer.add_param_group({"params": list(weights(5).items()), "lr": 0.03})
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.09), 0.03]
    schedule.load_state_dict(schedule.state_dict())
    schedule.total_steps = 5
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.08), 0.03]


class Tiny(nn.Module):
    def __init__(self, width):
        super().__init__()
        torch.manual_seed(width)
        self.tok, self.proj = nn.Embedding(7, width), nn.Linear(width, width)
        self.lm_head = nn.Linear(width, 7, bias=False)


@pytest.mark.parametrize("names", [True, False])
def test_a_plan_scales_the_one_rate_by_each_role(names):
    """Also where a nameless embedding was taken for a hidden matrix: it gets the plan's kind, and its own group's rate."""
    model, twin = Tiny(16), Tiny(16)
    table = plan(model, base=Tiny(8), rule="hyperp", family="muon")
    optimizer = HyperSphereOptimizer(model.proj.named_parameters("proj"), lr=0.1, sphere=False, compute_dtype="float64")
    rest = {"tok.weight": model.tok.weight, "lm_head.weight": model.lm_head.weight}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.add_param_group({"params": list(rest.items()) if names else list(rest.values()), "lr": 0.03})
    assert optimizer.param_groups[-1]["kind"] == ("mixed" if names else "muon")
    groups = [
        {"params": list(twin.proj.named_parameters("proj")), "lr": 0.1},
        {"params": [("tok.weight", twin.tok.weight)], "kind": "adamw", "lr": 0.03},
        {"params": [("lm_head.weight", twin.lm_head.weight)], "kind": "adamw", "lr": 0.03},
    ]
    reference = HyperSphereOptimizer(groups, sphere=False, compute_dtype="float64")
    scaled = [ScaledStep(optimizer, table, model), ScaledStep(reference, table, twin)]
    for rate in (0.03, 0.01):
        optimizer.param_groups[-1]["lr"] = reference.param_groups[-2]["lr"] = reference.param_groups[-1]["lr"] = rate
        train(dict(model.named_parameters()), optimizer, [3])
        train(dict(twin.named_parameters()), reference, [3])
        factors = {entry.role: entry.lr for entry in table.parameters}
        assert any(factor != 1 for factor in factors.values())
        assert scaled[0].effective_lr == scaled[1].effective_lr
        assert scaled[0].effective_lr["embedding"] == pytest.approx(rate * factors["embedding"])
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))
