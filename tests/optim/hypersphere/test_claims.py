"""What docs/derivations/hypersphere.md and docs/from-torch-muon.md say in numbers."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_mue.optim import HyperSphereOptimizer, orthogonalize
from lightning_mue.optim.orthogonal.coefficients import PRESETS
from lightning_mue.optim.orthogonal.newton_schulz import flops
from lightning_mue.parameterizations.rules.kinds import CONVENTIONS

GUIDE = (Path(__file__).parents[3] / "docs" / "from-torch-muon.md").read_text(encoding="utf-8")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stepped(weight: torch.Tensor, gradient: torch.Tensor, kind: str = "sphere", **options) -> torch.Tensor:
    param = nn.Parameter(weight.clone())
    param.grad = gradient.clone()
    HyperSphereOptimizer([{"params": [param], "kind": kind}], **options).step()
    return param.detach()


def angle(one: torch.Tensor, other: torch.Tensor) -> float:
    chord = one / one.norm() - other / other.norm()
    return 2 * math.asin(chord.norm().item() / 2)


@pytest.mark.parametrize("eta", [0.3, 0.01])
@pytest.mark.parametrize("tilt", [0.0, 0.6])
def test_a_step_is_a_rotation_by_the_stated_angle(eta, tilt):
    w, g = normal(20, 30), normal(20, 30, seed=1) + tilt * normal(20, 30)
    o = orthogonalize(g)
    c = torch.cosine_similarity(w.flatten(), o.flatten(), dim=0).item()
    s = math.sqrt(1 - c * c)
    project, geodesic = (stepped(w, g, lr=eta, retraction=name) for name in ("project", "geodesic"))
    assert angle(project, w) == pytest.approx(math.atan(eta * s / (1 - eta * c)), rel=1e-9)
    assert angle(geodesic, w) == pytest.approx(eta, rel=1e-9)
    tangent = (o / o.norm() - c * w / w.norm()) / s
    for new in (project, geodesic):  # in the plane of w and o, away from o
        turned = new / w.norm() - math.cos(angle(new, w)) * w / w.norm()
        torch.testing.assert_close(turned, -math.sin(angle(new, w)) * tangent, rtol=0, atol=1e-12)
    assert abs(c) > 0.3 if tilt else abs(c) < 0.1
    if tilt:  # and only first-order equal up to s
        assert angle(project, w) / eta == pytest.approx(s, rel=2 * eta)


def test_weight_decay_is_a_larger_rate_and_nothing_else():
    w, g, eta, decay = normal(20, 30), normal(20, 30, seed=1), 0.1, 0.5
    decayed = stepped(w, g, lr=eta, weight_decay=decay)
    torch.testing.assert_close(decayed, stepped(w, g, lr=eta / (1 - eta * decay)), rtol=0, atol=1e-13)
    assert (decayed - stepped(w, g, lr=eta)).norm() / w.norm() == pytest.approx(eta**2 * decay, rel=0.1)
    turned = angle(stepped(w, g, lr=eta, weight_decay=decay, retraction="geodesic"), w)
    assert abs(torch.cosine_similarity(w.flatten(), orthogonalize(g).flatten(), dim=0)) < 0.1
    # Stated for c = 0; here |c| < 0.1 shifts the angle by that times the second-order difference.
    assert math.tan(turned) == pytest.approx(math.tan(eta) / (1 - eta * decay), rel=0.01)


def output_change(width: int, samples: int) -> float:
    weight, x, target = (
        normal(width, width) * width**-0.5,
        normal(samples, width, seed=1),
        normal(samples, width, seed=2),
    )
    before = x @ weight.T
    change = x @ stepped(weight, (before - target).T @ x, lr=0.01).T - before
    return (change.norm() / before.norm()).item()


def test_a_rate_acts_alike_at_every_width_if_the_gradients_rank_grows_with_it():
    wide, narrow = output_change(256, 4 * 256), output_change(32, 4 * 32)
    assert wide == pytest.approx(0.0063, rel=0.05)
    assert narrow == pytest.approx(wide, rel=0.05)
    # The stated limit: 16 samples, so that the step grows as the root of width / rank.
    assert output_change(256, 16) / output_change(64, 16) == pytest.approx(2, rel=0.15)


def stream_change(depth: int, lr: float) -> float:
    weights = [nn.Parameter(normal(32, 32, seed=i) * 32**-0.5) for i in range(depth)]
    x, readout, target = normal(64, 32, seed=1000), normal(32, seed=1001), normal(64, seed=1002)

    def stream() -> torch.Tensor:
        h = x
        for weight in weights:
            h = h + depth**-0.5 * torch.tanh(h @ weight.T)
        return h

    before = stream()
    (before @ readout / 32**0.5 - target).square().mean().backward()
    HyperSphereOptimizer([{"params": weights, "kind": "sphere"}], lr=lr).step()
    return ((stream() - before).norm() / before.norm()).item()


def test_depth_needs_a_rate_that_falls_as_its_root():
    shallow = stream_change(8, 2e-3)
    # 16 times the depth: 4 in the limit, and 3.4 with the few directions that this width has room for.
    assert 3 < stream_change(128, 2e-3) / shallow < 4.2
    assert 0.75 < stream_change(128, 2e-3 / 4) / shallow < 1.05


def test_experts_on_spheres_of_their_own_do_not_pay_for_each_other():
    start, idle = normal(2, 16, 16), torch.ones(2, 1, 1)
    idle[1] = 0
    stack = nn.Parameter(start.clone())
    optimizer = HyperSphereOptimizer([{"params": [stack], "kind": "sphere"}], lr=0.02, momentum=0.0)
    joint, radius = start.clone(), start.norm()
    for step in range(300):
        gradient = normal(2, 16, 16, seed=step + 1) * idle
        stack.grad = gradient
        optimizer.step()
        o = orthogonalize(gradient)
        joint = joint - 0.02 * radius * o / o.norm()
        joint = radius * joint / joint.norm()
    own, shared = (x.detach().flatten(1).norm(dim=1) / start.flatten(1).norm(dim=1) for x in (stack, joint))
    torch.testing.assert_close(own, torch.ones_like(own), rtol=1e-12, atol=0)
    assert torch.equal(stack[1], start[1])
    assert shared[0] > 1.04
    assert shared[1] < 0.96


def test_the_completed_square_is_the_polynomial():
    x = normal(6, 9)
    x /= x.norm()
    eye = torch.eye(6, dtype=torch.float64)
    for a, b, c in PRESETS["scheduled"].steps:
        gram = x @ x.mT
        literal = a * x + (b * gram + c * gram @ gram) @ x
        k, rho = -(b / a) * gram, a * c / b**2
        shifted = k - eye / (2 * rho)
        x = a * (rho * shifted @ shifted + (1 - 1 / (4 * rho)) * eye) @ x
        torch.testing.assert_close(x, literal, rtol=0, atol=1e-12)


def test_operation_counts_are_the_stated_ones():
    n = 1000
    for r in (1, 1.5, 2, 2.75, 4):
        m = int(r * n)
        counts = {
            ((1, 1, 1, 1, 1), False): 20 * r + 10,
            ((1, 1, 1, 1, 1), True): 15 * r + 5,
            ((2, 3), False): 8 * r + 28,
            ((2, 3), True): 6 * r + 17,
            ((2, 2, 1), False): 12 * r + 22,
            ((2, 2, 1), True): 9 * r + 13,
        }
        for (segments, symmetric), expected in counts.items():
            assert flops(n, m, segments, symmetric=symmetric) / n**3 == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(24, 24), (48, 12), (12, 48)])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_rate_is_carried_to_the_sphere_by_the_stated_formula(shape, convention):
    out, fan_in = shape
    w, g = normal(*shape) * fan_in**-0.5, normal(*shape, seed=1)
    w *= math.sqrt(out) / w.norm()  # the norm that it has in the mean
    lr = 0.02
    rate = lr * CONVENTIONS[convention](out, fan_in) * math.sqrt(min(shape)) / w.norm().item()
    off = stepped(w, g, "muon", lr=lr, lr_convention=convention) - w
    # 3%: singular values in [0.97, 1.15] rather than 1.
    assert off.norm() / w.norm() == pytest.approx(rate, rel=0.03)
    if convention == "original":
        assert rate == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(("mu", "low", "high"), [(0.0, 0.060, 0.067), (0.95, 0.0095, 0.0130)])
def test_decay_without_a_sphere_sets_an_angle_too(mu, low, high):
    lr, decay, steps = 0.02, 0.1, 2000
    weight = nn.Parameter((normal(24, 24) * 24**-0.5).float())
    optimizer = HyperSphereOptimizer(
        [{"params": [weight], "kind": "muon"}], lr=lr, weight_decay=decay, momentum=mu, nesterov=False
    )
    generator, sizes = torch.Generator().manual_seed(1), []
    for step in range(steps):
        weight.grad = torch.randn(24, 24, generator=generator)
        before = weight.detach().clone()
        optimizer.step()
        if step >= 1500:
            sizes.append(((weight.detach() - before).norm() / before.norm()).item())
    assert low < sum(sizes) / len(sizes) < high  # sqrt(2 lr decay) = 0.0632


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.up, self.norm = nn.Linear(16, 48), nn.LayerNorm(48)
        self.head = nn.Linear(48, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return self.head(self.norm(self.up(x)))


def test_the_guides_examples_run_and_take_the_same_steps(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)  # torch's Muon, word for word, in float32
    before, after, sphere = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    torch.manual_seed(0)
    models = [Model()]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    spaces = [{"torch": torch, "model": model} for model in models]
    exec(before, spaces[0])
    exec(after, spaces[1])
    exec(after.split("\n\n")[0] + "\n" + sphere, spaces[2])
    assert max(len([line for line in code.splitlines() if line.strip()]) for code in (before, after)) <= 10
    taken = {id(p) for p in spaces[0]["hidden"]}
    kinds = {group["kind"]: group["params"] for group in spaces[1]["optimizer"].param_groups}
    assert {n for n, p in models[0].named_parameters() if id(p) in taken} == {
        n for n, p in models[1].named_parameters() if any(p is q for q in kinds["muon"])
    }
    start = copy.deepcopy(models[0])
    for seed in range(3):
        tokens = torch.randint(0, 11, (8, 12), generator=torch.Generator().manual_seed(seed))
        for model, names in zip(models, spaces, strict=True):
            model.zero_grad()
            nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            for optimizer in [names["muon"], names["adamw"]] if "muon" in names else [names["optimizer"]]:
                optimizer.step()
    for (name, p), q, first in zip(
        models[0].named_parameters(), models[1].parameters(), start.parameters(), strict=True
    ):
        # Float32 against float32, three steps: 1e-5 is seen.
        assert (p - q).norm() / (p - first).norm() < 2e-4, name
    assert {group["kind"] for group in spaces[2]["optimizer"].param_groups} == {"sphere", "adam_sphere", "adamw"}
