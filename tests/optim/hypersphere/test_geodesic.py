"""The geodesic retraction and given radii: angles and norms against the rotation written out in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.hypersphere_steps import build, furthest, matrices, normal, orth, parameters, train
from torch import Tensor, nn


def turned(before: Tensor, after: Tensor) -> Tensor:
    """Angle between matrices, `[E]`; by the chord, since an arccosine has no digits for small angles."""
    a, b = (x / x.norm(dim=(1, 2), keepdim=True) for x in (matrices(before), matrices(after)))
    return 2 * torch.asin((a - b).norm(dim=(1, 2)) / 2)


@pytest.mark.parametrize("kind", ["sphere", "adam_sphere"])
@pytest.mark.parametrize("lr", [1e-3, 0.05, 1.0, 3.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_geodesic_turns_by_exactly_lr_and_keeps_the_norm(kind, lr, dtype, tolerance):
    params = parameters(dtype)
    optimizer = build(params, kind, lr=lr, retraction="geodesic")
    for step in range(3):
        before = copy.deepcopy(params)
        train(params, optimizer, range(step, step + 1))
        for old, new in zip(before, params, strict=True):
            # A weight in float32 is 6e-8 off in every entry, so an angle of 1e-3 is, too.
            assert torch.allclose(turned(old, new), torch.tensor(lr).double(), rtol=tolerance, atol=1e-7)
            radius = optimizer.state[new]["radius"].double().reshape(-1)
            assert torch.allclose(matrices(new).norm(dim=(1, 2)), radius, rtol=min(tolerance, 2e-7), atol=0)


def test_negative_control_projection_turns_by_less_than_lr():
    params = parameters(torch.float64)
    before = copy.deepcopy(params)
    train(params, build(params, "sphere", lr=0.5), range(1))
    assert all((turned(old, new) < 0.5 - 1e-2).all() for old, new in zip(before, params, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-7)])
def test_geodesic_equals_the_rotation_written_out(dtype, tolerance):
    """In the plane of W and O, by the matrix exponential of its generator: no sine or tangent of the code's."""
    params = [nn.Parameter(normal((6, 9), 0, dtype))]
    w = matrices(params[0])[0].flatten()
    radius, lr, m = w.norm(), 0.3, torch.zeros(6, 9, dtype=torch.float64)
    optimizer = build(params, "sphere", lr=lr, retraction="geodesic")
    for step in range(3):
        train(params, optimizer, range(step, step + 1))
        g = params[0].grad.double()
        m = 0.95 * m + g
        o = orth(0.95 * m + g, "scheduled").flatten()
        axes = torch.linalg.qr(torch.stack([w, o], 1))[0]  # the plane's orthonormal basis, first along W
        towards = torch.sign(axes[:, 1] @ o) * torch.sign(axes[:, 0] @ w)
        spin = torch.outer(axes[:, 0], axes[:, 1]) - torch.outer(axes[:, 1], axes[:, 0])
        w = torch.matrix_exp(lr * towards * spin) @ w
        assert (params[0].detach().double().flatten() - w).abs().max() / radius < tolerance


@pytest.mark.parametrize("sign", [1, -1])
def test_a_direction_along_the_weight_turns_nothing(sign):
    """An orthogonal matrix, whose own direction is what its gradient orthogonalizes to; the other of the stack turns."""
    q = torch.linalg.qr(normal((8, 8), 0))[0]
    param = nn.Parameter(torch.stack([3 * q, normal((8, 8), 1)]))
    before = param.detach().clone()
    optimizer = build([param], "sphere", lr=0.1, retraction="geodesic")
    param.grad = torch.stack([sign * q, normal((8, 8), 2)])
    optimizer.step()
    angles = turned(before, param)
    assert angles[0] < 1e-5
    assert param.isfinite().all()
    assert angles[1] == pytest.approx(0.1, rel=1e-5)


@pytest.mark.parametrize("noise", [1.0, 0.1, 1e-2, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6, 0.0])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 3e-3), (torch.float64, 1e-6)])
def test_directions_close_to_the_weight_turn_by_lr_or_not_at_all(noise, dtype, least):
    """1 - cos^2 is rounding where the sine is small; dividing by it, float32 once turned by five times the angle."""
    q = torch.linalg.qr(normal((20, 32, 32), 0, torch.float64))[0]
    param = nn.Parameter(q.to(dtype, copy=True))
    param.grad = (q + noise * normal((20, 32, 32), 1, torch.float64) / 32).to(dtype)
    build([param], "sphere", lr=0.1, retraction="geodesic").step()
    o = torch.stack([orth(g, "scheduled") for g in q + noise * normal((20, 32, 32), 1, torch.float64) / 32])
    cosine = torch.cosine_similarity(o.flatten(1), q.flatten(1))
    sine = (1 - cosine.square()).clamp_min(0).sqrt()
    angles = turned(q, param)
    turns = angles > 1e-5
    assert torch.allclose(angles[turns], torch.tensor(0.1).double(), rtol=0.01)
    assert turns[sine > 2 * least].all()
    assert not turns[sine < least / 2].any()


def test_retractions_differ_by_the_step_squared_at_most_after_equal_angles():
    """Both turn in the plane of W and O. The projection loses the part along W: its angle is lr sin(W, O) + O(lr^2)."""

    def gap(lr: float) -> float:
        project, geodesic = parameters(torch.float64)[:1], parameters(torch.float64)[:1]
        start = copy.deepcopy(project)
        train(project, build(project, "sphere", lr=lr), range(1))
        angle = float(turned(start[0], project[0]))
        train(geodesic, build(geodesic, "sphere", lr=angle, retraction="geodesic"), range(1))
        assert furthest(project, geodesic) < 1e-12, "the same point at the same angle"
        o = orth(project[0].grad, "scheduled")  # the first direction is along the gradient
        cosine = torch.cosine_similarity(o.flatten(), start[0].detach().flatten(), dim=0)
        return abs(angle - lr * float((1 - cosine**2).sqrt()))

    assert gap(0.02) > 1e-8
    assert 3.8 < gap(0.02) / gap(0.01) < 4.2


@pytest.mark.parametrize("retraction", ["project", "geodesic"])
@pytest.mark.parametrize("kind", ["sphere", "adam_sphere"])
def test_a_given_radius_is_reached_with_the_first_step_and_kept(kind, retraction):
    params = parameters()
    optimizer = build(params, kind, radius=2.5, retraction=retraction)
    assert all((matrices(p).norm(dim=(1, 2)) - 2.5).abs().min() > 0.5 for p in params), "they start elsewhere"
    for step in range(3):
        before = copy.deepcopy(params)
        train(params, optimizer, range(step, step + 1))
        for old, param in zip(before, params, strict=True):
            assert torch.allclose(matrices(param).norm(dim=(1, 2)), torch.tensor(2.5).double(), rtol=2e-7)
            assert (optimizer.state[param]["radius"] == 2.5).all()
            if retraction == "geodesic":
                assert torch.allclose(turned(old, param), torch.tensor(0.05).double(), rtol=1e-5)
