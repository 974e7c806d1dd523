"""State: what it is made of, that it survives saving and copying exactly, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from lightning_mue.optim import HyperSphereOptimizer


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.ParameterDict:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (10, 6), "up": (8, 6), "down": (6, 8), "experts": (3, 8, 6), "gain": (6,), "head": (10, 6)}
    return nn.ParameterDict({k: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for k, s in shapes.items()})


def build(params: nn.ParameterDict, **options) -> HyperSphereOptimizer:
    return HyperSphereOptimizer(params.named_parameters(), **{"lr": 0.05, **options})


def train(params: nn.ParameterDict, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for p in params.values():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def assert_equal(a: nn.ParameterDict, b: nn.ParameterDict) -> None:
    assert all(torch.equal(a[name], b[name]) for name in a)


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    ("dtype", "radius"), [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float64,) * 2]
)
def test_entries_shapes_and_types(dtype, radius):
    params = network(dtype)
    optimizer = build(params)
    assert not optimizer.state, "created at the first step"
    train(params, optimizer, range(1))
    adam = {"exp_avg", "exp_avg_sq", "step"}
    expected = {"embed": adam, "gain": adam, "head": adam | {"radius"}}
    for name, p in params.items():
        state = optimizer.state[p]
        assert set(state) == expected.get(name, {"momentum", "radius"})
        for key in set(state) - {"radius", "step"}:
            assert (state[key].shape, state[key].dtype) == (p.shape, dtype)
        if "radius" in state:
            assert state["radius"].dtype == radius
            assert state["radius"].shape == ((3,) if name == "experts" else ())
        if "step" in state:
            assert state["step"].dtype == torch.float32


def test_radius_is_the_norm_at_the_first_step_not_at_construction():
    params = network()
    optimizer = build(params)
    with torch.no_grad():
        params["up"].mul_(3)
    norm = params["up"].detach().norm()
    train(params, optimizer, range(5))
    assert torch.allclose(params["up"].detach().norm(), norm, rtol=1e-6)


def test_parameters_without_gradient_are_left_alone():
    params = network()
    optimizer = build(params)
    for name in ("up", "gain"):
        params[name].grad = torch.ones_like(params[name])
    optimizer.step()
    assert set(optimizer.state) == {params["up"], params["gain"]}
    build(network()).step()  # none at all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resumed_run_equals_the_uninterrupted_one(dtype):
    through = network(dtype)
    whole = build(through)
    train(through, whole, range(6))

    first = network(dtype)
    before = build(first)
    train(first, before, range(3))
    saved = through_a_file({"weights": first.state_dict(), "optimizer": before.state_dict()})
    second = network(dtype, seed=1)
    second.load_state_dict(saved["weights"])
    after = build(second)
    after.load_state_dict(saved["optimizer"])
    for a, b in zip(before.state.values(), after.state.values(), strict=True):
        for key in a:
            assert a[key].dtype == b[key].dtype, key
            assert torch.equal(a[key], b[key]), key
    train(second, after, range(3, 6))
    assert_equal(through, second)


def test_negative_control_without_the_state_the_run_differs():
    through, cut = network(), network()
    whole = build(through)
    train(through, whole, range(6))
    train(cut, build(cut), range(3))
    train(cut, build(cut), range(3, 6))
    assert not torch.equal(through["up"], cut["up"])


def test_state_loaded_before_the_first_step_wins_over_the_weights_of_that_moment():
    """Distributed checkpoints take a step with lr 0 and zero gradients to make the state that they then fill."""
    params = network()
    optimizer = build(params)
    train(params, optimizer, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(params)

    fresh = network(seed=5)
    restored = build(fresh)
    for group in restored.param_groups:
        group["lr"] = 0.0
    before = copy.deepcopy(fresh)
    for p in fresh.values():
        p.grad = torch.zeros_like(p)
    restored.step()
    assert_equal(before, fresh)
    fresh.load_state_dict(weights.state_dict())
    restored.load_state_dict(saved)
    train(params, optimizer, range(3, 5))
    train(fresh, restored, range(3, 5))
    assert_equal(params, fresh)


def test_deepcopy_and_pickle_continue_alike():
    params = network()
    optimizer = build(params, adamw_lr=0.001, adamw_weight_decay=0.25)
    train(params, optimizer, range(2))
    copied, copied_optimizer = copy.deepcopy((params, optimizer))
    loaded, loaded_optimizer = pickle.loads(pickle.dumps((params, optimizer)))
    for p, o in ((params, optimizer), (copied, copied_optimizer), (loaded, loaded_optimizer)):
        train(p, o, range(2, 4))
    assert_equal(params, copied)
    assert_equal(params, loaded)
    copied_optimizer.add_param_group({"params": [("late.bias", nn.Parameter(torch.ones(3)))]})
    late = copied_optimizer.param_groups[-1]
    assert (late["lr"], late["weight_decay"]) == (0.001, 0.25)


def test_options_missing_from_an_older_save_get_defaults():
    params = network()
    optimizer = build(params)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["nesterov"], group["preset"]
    optimizer.load_state_dict(saved)
    assert all(group["nesterov"] and group["preset"] == "scheduled" for group in optimizer.param_groups)
    train(params, optimizer, range(1))


@pytest.mark.parametrize("other", [torch.optim.AdamW, torch.optim.Muon])
def test_state_of_another_optimizer_is_refused(other):
    params = network()
    matrices = [params["up"], params["down"]]
    theirs = other(matrices)
    train(params, theirs, range(1))
    mine = HyperSphereOptimizer([{"params": matrices, "kind": "sphere"}])
    with pytest.raises(
        ValueError,
        match=r"state_dict: found param group 0 with .*expected a HyperSphereOptimizer's.*AdamW or Muon.*from scratch",
    ):
        mine.load_state_dict(theirs.state_dict())
    assert not mine.state


def test_state_of_another_model_is_refused():
    params = network()
    optimizer = build(params)
    train(params, optimizer, range(1))
    wider = nn.ParameterDict({name: nn.Parameter(torch.randn(*p.shape[:-1], 7)) for name, p in params.items()})
    with pytest.raises(ValueError, match=r"momentum of shape \[6, 8\] for parameter 'down' of shape \[6, 7\]"):
        build(wider).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        HyperSphereOptimizer([("down", params["down"])]).load_state_dict(optimizer.state_dict())


def test_kind_may_change_between_steps_and_old_state_stays():
    params = network()
    optimizer = build(params)
    train(params, optimizer, range(2))
    momentum = optimizer.state[params["up"]]["momentum"].clone()
    sphere = next(group for group in optimizer.param_groups if group["kind"] == "sphere")
    sphere["kind"] = "adam_sphere"
    train(params, optimizer, range(2, 3))
    state = optimizer.state[params["up"]]
    assert set(state) == {"momentum", "radius", "exp_avg", "exp_avg_sq", "step"}
    assert torch.equal(state["momentum"], momentum)
    assert torch.allclose(params["up"].detach().norm(), state["radius"], rtol=1e-6)
    sphere["kind"] = "somewhere"
    with pytest.raises(ValueError, match="kind: found 'somewhere'"):
        train(params, optimizer, range(3, 4))


def test_groups_swapped_in_by_hooks_are_the_ones_that_count():
    """As the scaling callback does: other groups for the duration of a step, the user's before and after."""
    swapped, direct = network(), network()
    optimizer, expected = build(swapped, lr=0.01), build(direct, lr=0.03)
    users = optimizer.param_groups

    def swap(opt, args, kwargs) -> None:
        opt.param_groups = [
            {key: value for key, value in {**group, "params": [p], "lr": 0.03}.items() if key != "param_names"}
            for group in users
            for p in group["params"]
        ]

    def restore(opt, args, kwargs) -> None:
        opt.param_groups = users

    optimizer.register_step_pre_hook(swap)
    optimizer.register_step_post_hook(restore)
    train(swapped, optimizer, range(3))
    train(direct, expected, range(3))
    assert optimizer.param_groups is users
    for name in swapped:  # batches of another size may add in another order
        assert torch.allclose(swapped[name], direct[name], rtol=0, atol=1e-5), name
    assert not torch.allclose(swapped["up"], network()["up"], rtol=0, atol=1e-2)


def test_sparse_gradients_are_refused():
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = HyperSphereOptimizer([("embed.weight", table.weight)])
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"gradient of parameter 'embed.weight'.*found a sparse tensor.*sparse=False"
    ):
        optimizer.step()


def test_state_in_another_order_and_truncated_radii_are_refused():
    pairs = [(name, nn.Parameter(torch.randn(4, 4))) for name in ("a", "b")]
    optimizer = HyperSphereOptimizer(pairs)
    for _, weight in pairs:
        weight.grad = torch.randn(4, 4)
    optimizer.step()
    with pytest.raises(ValueError, match="state_dict: found the state of 'a', expected that of 'b'"):
        HyperSphereOptimizer(pairs[::-1]).load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()
    state["state"][0]["radius"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"radius of shape \[3\]"):
        HyperSphereOptimizer(pairs).load_state_dict(state)


def test_a_copy_has_no_process_group_and_auto_of_older_versions_means_none():
    weight = nn.Parameter(torch.randn(4, 4))
    assert HyperSphereOptimizer([("w", weight)]).process_group is None
    group = object()  # stands in for one, which cannot be copied or pickled
    optimizer = HyperSphereOptimizer([("w", weight)], process_group=group)
    assert optimizer.process_group is group
    assert copy.deepcopy(optimizer).process_group is None
    assert pickle.loads(pickle.dumps(optimizer)).process_group is None
    with pytest.warns(UserWarning, match='process_group: found "auto", which means None') as caught:
        assert HyperSphereOptimizer([("w", weight)], process_group="auto").process_group is None
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.raises(ValueError, match="process_group: found 'all', expected a process group or None"):
        HyperSphereOptimizer([("w", weight)], process_group="all")


def test_an_old_pickle_gets_the_new_options():
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = HyperSphereOptimizer([("w", weight)])
    old = optimizer.__getstate__()
    old["defaults"]["process_group"] = "auto"
    new = (
        "retraction",
        "zero_gradient",
        "radius",
        "state_dtype",
        "lr_convention",
        "maximize",
        "capturable",
        "compile",
        "sphere",
    )
    old["defaults"] = {key: value for key, value in old["defaults"].items() if key not in new}
    old["param_groups"] = [{k: v for k, v in group.items() if k not in new} for group in old["param_groups"]]
    restored = HyperSphereOptimizer.__new__(HyperSphereOptimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restored.__setstate__(old)
    assert restored.process_group is None
    weight.grad = torch.randn(4, 4)
    restored.step()


@pytest.mark.parametrize("kind", ["sphere", "muon"])
def test_parameters_without_entries_and_decay_by_the_whole_weight(kind):
    weight = nn.Parameter(torch.randn(4, 4))
    groups = [{"params": [nn.Parameter(torch.zeros(0, 5)), weight], "kind": kind, "lr": 0.5, "weight_decay": 2.0}]
    optimizer = HyperSphereOptimizer(groups)
    for param in groups[0]["params"]:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert weight.isfinite().all()


def test_an_option_changed_to_nonsense_is_named_at_the_step():
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = HyperSphereOptimizer([("w", weight)])
    optimizer.param_groups[0]["retraction"] = "geodetic"
    weight.grad = torch.randn(4, 4)
    with pytest.raises(ValueError, match="retraction: found 'geodetic', expected one of 'project', 'geodesic'"):
        optimizer.step()
