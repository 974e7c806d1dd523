"""Options of HyperSphereOptimizer against a float64 transcription, torch's own optimizers, or the plain step."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from helpers.hypersphere_steps import build, furthest, matrices, normal, orth, parameters, train
from torch import nn

import lightning_mue.optim.matrices as matrices_module
import lightning_mue.optim.orthogonal.newton_schulz as newton_schulz
from lightning_mue.optim import HyperSphereOptimizer
from lightning_mue.parameterizations.rules.kinds import CONVENTIONS

KINDS = ["sphere", "muon", "adam_sphere", "adamw"]


# Muon without the sphere


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_muon_equals_the_formula(convention, decay, dtype, tolerance):
    factors = {
        "spectral": lambda out, cols: (out / cols) ** 0.5,
        "rms": lambda out, cols: 0.2 * max(out, cols) ** 0.5,
        "original": lambda out, cols: max(1, out / cols) ** 0.5,
        "unit": lambda out, cols: 1,
    }
    assert set(factors) == set(CONVENTIONS)
    params = parameters(dtype)
    weights = [matrices(p) for p in params]
    momenta = [torch.zeros_like(w) for w in weights]
    optimizer = build(params, "muon", weight_decay=decay, lr_convention=convention)
    for step in range(3):
        train(params, optimizer, range(step, step + 1))
        for w, m, param in zip(weights, momenta, params, strict=True):
            g = matrices(param.grad)
            m.mul_(0.95).add_(g)
            o = torch.stack([orth(u, "scheduled") for u in 0.95 * m + g])
            w.mul_(1 - 0.05 * decay).sub_(0.05 * factors[convention](*w.shape[1:]) * o)
    for w, param in zip(weights, params, strict=True):
        assert (matrices(param) - w).abs().max() < tolerance
        assert set(optimizer.state[param]) == {"momentum"}


@pytest.mark.parametrize(("convention", "theirs"), [("original", "original"), ("rms", "match_rms_adamw")])
def test_muon_moves_as_torch_muon_does(convention, theirs):
    """torch iterates in bfloat16, and its momentum is (1 - mu) of ours, which orthogonalization does not see."""
    mine, other = parameters()[:3], parameters()[:3]
    a = build(mine, "muon", preset="classic", lr_convention=convention, weight_decay=0.1)
    b = torch.optim.Muon(other, lr=0.05, momentum=0.95, weight_decay=0.1, adjust_lr_fn=theirs)
    before = copy.deepcopy(mine)
    train(mine, a, range(5))
    train(other, b, range(5))
    for p, q, old in zip(mine, other, before, strict=True):
        moved, expected = (p - old).flatten(), (q - old).flatten()
        assert torch.cosine_similarity(moved, expected, dim=0) > 0.999
        assert (moved.norm() / expected.norm()).item() == pytest.approx(1, abs=0.02)


def test_negative_control_other_conventions_and_presets_move_otherwise_than_torch_muon():
    for options in ({"lr_convention": "unit"}, {"preset": "scheduled"}):
        mine, other = parameters()[2:3], parameters()[2:3]
        before = copy.deepcopy(mine[0])
        train(mine, build(mine, "muon", **{"preset": "classic", "lr_convention": "original", **options}), range(5))
        train(other, torch.optim.Muon(other, lr=0.05, weight_decay=0), range(5))
        ratio = (mine[0] - before).norm() / (other[0] - before).norm()
        assert abs(ratio - 1) > 0.03, options


def test_sphere_false_gives_matrices_muon_and_the_head_adamw():
    model = nn.ModuleDict({"up": nn.Linear(6, 8), "lm_head": nn.Linear(8, 10, bias=False)})
    plain = HyperSphereOptimizer(model.named_parameters(), sphere=False)
    kinds = {name: group["kind"] for group in plain.param_groups for name in group["param_names"]}
    assert kinds == {"up.weight": "muon", "up.bias": "adamw", "lm_head.weight": "adamw"}
    assert (plain.mue_family, HyperSphereOptimizer(model.named_parameters()).mue_family) == ("muon", "sphere")
    plain.add_param_group({"params": [("later.weight", nn.Parameter(torch.zeros(3, 3)))]})
    assert plain.param_groups[-1]["kind"] == "muon", "a zero matrix is welcome off the sphere"
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    plain.step()
    assert not any("radius" in state for state in plain.state.values())


# Signs, types, devices


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nesterov", [True, False])
def test_maximize_is_to_minimize_the_negative(kind, nesterov):
    up, down, control = parameters(), parameters(), parameters()
    options = {"nesterov": nesterov, "weight_decay": 0.1}
    train(up, build(up, kind, maximize=True, **options), sign=-1)
    train(down, build(down, kind, **options))
    train(control, build(control, kind, maximize=True, **options))
    assert furthest(up, down) < 1e-5  # in float32 the other sign takes another way through the kernels
    assert furthest(control, down) > 0.01


@pytest.mark.parametrize("kind", ["sphere", "muon"])
@pytest.mark.parametrize(
    ("weights", "state", "near", "far"),
    [
        (torch.float32, "bfloat16", 0.05, 1e-4),  # a momentum of 8 bits turns a direction by a hundredth
        (torch.bfloat16, "float32", 0.05, 1e-4),  # and so do weights of 8 bits
        (torch.float32, "float32", 0, -1),
    ],
)
def test_state_dtype_is_the_momentums_and_survives_loading(kind, weights, state, near, far):
    params, exact = parameters(weights), parameters(weights)
    optimizer = build(params, kind, state_dtype=state)
    wide = [nn.Parameter(p.detach().float()) for p in exact]
    train(params, optimizer)
    train(wide, build(wide, kind))
    assert far < furthest([nn.Parameter(p.detach().float()) for p in params], wide) <= near
    loaded = copy.deepcopy(params)
    after = build(loaded, kind, state_dtype=state)
    after.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, group in ((optimizer, params), (after, loaded)):
        assert all(str(o.state[p]["momentum"].dtype) == f"torch.{state}" for p in group)
        train(group, o, range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(params, loaded, strict=True))


def test_momentum_in_bfloat16_does_not_stall():
    """A sum in 8 bits stops where a step is less than half a digit: here at 18.5, not at 20, the momentum's limit."""
    param = nn.Parameter(normal((6, 9), 0))
    optimizer = build([param], "sphere", state_dtype="bfloat16", lr=0.0)
    for _ in range(200):
        param.grad = torch.ones(6, 9)
        optimizer.step()
    assert (optimizer.state[param]["momentum"].float() / 20 - 1).abs().max() < 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("retraction", ["project", "geodesic"])
def test_a_tensor_of_a_learning_rate_steps_as_the_number(kind, retraction):
    options = {"retraction": retraction, "weight_decay": 0.1}
    plain, tensor = parameters(), parameters()
    train(plain, build(plain, kind, lr=0.07, **options))
    lr = torch.tensor(0.07)
    optimizer = build(tensor, kind, lr=lr, capturable=True, **options)
    train(tensor, optimizer)
    assert furthest(plain, tensor) < 1e-5
    lr.fill_(0)
    before = copy.deepcopy(tensor)
    train(tensor, optimizer, range(3, 4))
    assert all(torch.equal(a, b) for a, b in zip(before, tensor, strict=True))
    with pytest.raises(
        TypeError, match=r"lr: found tensor.*, expected a finite number of at least 0\. .*set capturable"
    ):
        build(parameters(), kind, lr=lr)


@pytest.mark.parametrize("kind", KINDS[:3])  # the fourth is torch's function, which insists on a real GPU
@pytest.mark.parametrize("options", [{}, {"retraction": "geodesic", "nesterov": False}, {"weight_decay": 0.1}], ids=str)
def test_capturable_steps_read_no_tensor_off_the_cpu(monkeypatch, kind, options):
    """A tensor of the device "meta" takes the way of a GPU's and has no value that could be read."""
    params = [nn.Parameter(p.detach().to("meta")) for p in parameters()]
    optimizer = build(params, kind, lr=torch.tensor(0.1, device="meta"), capturable=True, **options)
    for _ in range(2):
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step()
    assert all("step" not in state or state["step"].is_meta for state in optimizer.state.values())


def test_negative_control_reading_a_meta_tensor_raises():
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool((torch.ones(3, device="meta") != 0).all())


# Experts, groups, deep copies


@pytest.mark.parametrize("kind", ["sphere", "muon"])
@pytest.mark.parametrize("retraction", ["project", "geodesic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_without_gradient_keeps_its_weight_and_its_momentum_decays(kind, retraction, dtype):
    stack = nn.Parameter(normal((4, 12, 20), 0, dtype))
    optimizer = build([stack], kind, retraction=retraction, momentum=0.5, weight_decay=0.1)
    train([stack], optimizer, range(1))
    before, momentum = stack.detach().clone(), optimizer.state[stack]["momentum"].clone()
    stack.grad = normal((4, 12, 20), 7, dtype)
    stack.grad[2] = 0
    optimizer.step()
    assert torch.equal(stack[2], before[2])
    assert torch.equal(optimizer.state[stack]["momentum"][2], momentum[2] / 2)
    assert not any(torch.equal(stack[i], before[i]) for i in (0, 1, 3))


def test_groups_keep_options_of_their_own():
    options = [
        {"lr": 0.02, "momentum": 0.5, "retraction": "geodesic", "preset": "classic"},
        {"lr": 0.03, "kind": "muon", "lr_convention": "rms", "weight_decay": 0.2, "nesterov": False},
        {"lr": 0.04, "radius": 3.0, "compute_dtype": "bfloat16", "maximize": True},
        {"lr": 0.05, "state_dtype": "bfloat16", "compute_dtype": "float64"},
        {"lr": 0.06, "kind": "adam_sphere", "betas": (0.5, 0.6), "eps": 0.1},
    ]
    together, alone = parameters(), parameters()
    groups = [{"kind": "sphere", **option, "params": [p]} for p, option in zip(together, options, strict=True)]
    train(together, HyperSphereOptimizer(groups))
    for i, (param, option) in enumerate(zip(alone, options, strict=True)):
        optimizer = HyperSphereOptimizer([{"params": [param], "kind": option.get("kind", "sphere")}], **without(option))
        for step in range(3):
            param.grad = normal(tuple(param.shape), 100 * (step + 1) + i)
            optimizer.step()
        assert torch.equal(param, together[i]), option
        default = parameters()
        train(default, build(default, option.get("kind", "sphere"), lr=option["lr"]))
        assert not torch.equal(default[i], together[i]), f"{option} makes no difference"


def without(option: dict) -> dict:
    return {key: value for key, value in option.items() if key != "kind"}


@pytest.mark.parametrize("kind", KINDS)
def test_closure_deepcopy_and_pickle_with_every_option_set(kind):
    options = {
        "lr": torch.tensor(0.05),
        "capturable": True,
        "state_dtype": "bfloat16",
        "retraction": "geodesic",
        "radius": 2.0,
        "lr_convention": "rms",
        "maximize": True,
        "weight_decay": 0.1,
    }
    params = parameters()
    optimizer = build(params, kind, **options)
    train(params, optimizer, range(2))
    copies = [copy.deepcopy((params, optimizer)), pickle.loads(pickle.dumps((params, optimizer)))]
    loss = optimizer.step(lambda: train_gradients(params))
    assert loss == 17.0
    for others, other in copies:
        other.step(lambda others=others: train_gradients(others))
        assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))
        assert other.param_groups[0]["retraction"] == "geodesic"


def train_gradients(params: list[nn.Parameter]) -> float:
    assert torch.is_grad_enabled()
    for i, param in enumerate(params):
        param.grad = normal(tuple(param.shape), 50 + i)
    return 17.0


# Memory


@pytest.mark.parametrize("state", ["float32", "bfloat16"])
def test_memory_is_one_momentum_a_matrix_and_scratch_that_is_bounded(monkeypatch, state):
    limit = 64 << 10
    monkeypatch.setattr(matrices_module, "chunk_bytes", lambda device: limit)

    def memory(count: int) -> dict[str, int]:
        params = [nn.Parameter(normal((16, 48), seed)) for seed in range(count)]
        optimizer = build(params, "sphere", state_dtype=state)
        train(params, optimizer, range(2))
        found = optimizer.memory()
        assert set(found) == {"momentum", "radius", "scratch"}
        assert found["momentum"] == count * 16 * 48 * (4 if state == "float32" else 2)
        assert found["radius"] == 4 * count
        return found

    # Directions, X, the next X, and five matrices of the small side, each a third of X here: once for a full chunk of 21
    # matrices, and once more for what is left for the last one.
    batch = (3 + 5 / 3) * 16 * 48 * 4
    assert 4 * batch * 0.9 < memory(4)["scratch"] <= 4 * batch
    for count in (42, 420):
        assert 21 * batch * 0.9 < memory(count)["scratch"] <= 21 * batch
    assert memory(400)["scratch"] <= memory(40)["scratch"] <= 2 * 21 * batch
    assert batch * 21 < 5 * limit


def test_reference_orth_agrees_with_the_library():
    u = normal((12, 40), 3, torch.float64)
    assert np.abs((orth(u, "scheduled") - newton_schulz.orthogonalize(u)).numpy()).max() < 1e-12


def test_an_unknown_type_in_the_environment_is_refused_before_the_first_step(monkeypatch):
    monkeypatch.setenv("LIGHTNING_MUE_CPU_DTYPE", "float8")
    with pytest.raises(ValueError, match="LIGHTNING_MUE_CPU_DTYPE: found 'float8'"):
        build(parameters(), "sphere")
