"""The option `zero_gradient`: what a matrix does whose gradient is exactly zero, against a literal float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_mue.optim import PRESETS, HyperSphereOptimizer

SHAPES = {"stack": (3, 6, 10), "single": (1, 12, 8)}


def normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(u: np.ndarray) -> np.ndarray:
    x = u / max(np.linalg.norm(u), 1e-300)
    for a, b, c in PRESETS["scheduled"].steps:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def reference(w, grads, kind, *, lr, decay, skip):
    """One matrix [out, in] over the gradients of some steps, by the definition."""
    radius, m, v = np.linalg.norm(w), np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(grads, 1):
        if kind == "adam_sphere":
            m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
            o = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
        else:
            m = 0.95 * m + g
            o = orthogonal(0.95 * m + g)
        if skip and not g.any():
            continue
        if kind == "muon":
            w = (1 - lr * decay) * w - lr * np.sqrt(w.shape[0] / w.shape[1]) * o
            continue
        w = (1 - lr * decay) * w - lr * radius * o / max(np.linalg.norm(o), 1e-300)
        w = radius * w / np.linalg.norm(w)
    return w


def grads_of(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Matrix 1 has no gradient after the first step, matrix 2 (where there are three) never has one."""
    grads = [normal(shape, 10 + step) for step in range(3)]
    for step, grad in enumerate(grads):
        if step:
            grad[int(shape[0] > 1)] = 0
        grad[2:] = 0
    return grads


def trained(shape, kind, *, zero_gradient, decay=0.3):
    param = nn.Parameter(normal(shape, 0))
    groups = [{"params": [param], "kind": kind, "zero_gradient": zero_gradient}]
    optimizer = HyperSphereOptimizer(groups, lr=0.1, weight_decay=decay, compute_dtype="float64")
    for grad in grads_of(shape):
        param.grad = grad
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("kind", ["sphere", "adam_sphere", "muon"])
@pytest.mark.parametrize("name", SHAPES)
def test_both_forms_equal_the_reference(name, kind):
    start = normal(SHAPES[name], 0)
    ends = {}
    for form in ("skip", "momentum"):
        ends[form] = trained(SHAPES[name], kind, zero_gradient=form)
        for i, w in enumerate(start.numpy()):
            grads = [grad[i].numpy() for grad in grads_of(SHAPES[name])]
            wanted = reference(w, grads, kind, lr=0.1, decay=0.3, skip=form == "skip")
            assert np.abs(ends[form][i].numpy() - wanted).max() < 1e-12
    without = int(name == "stack")
    assert (ends["skip"][without] - ends["momentum"][without]).norm() > 0.05 * start[without].norm(), "they differ"
    if name == "stack":
        assert (ends["skip"][0] - ends["momentum"][0]).abs().max() < 1e-13, (
            "an expert with gradients sees no difference"
        )


def test_an_expert_that_never_had_a_gradient_stays_bit_for_bit_on_the_sphere_and_decays_off_it():
    start = normal(SHAPES["stack"], 0)
    for kind in ("sphere", "adam_sphere"):
        assert torch.equal(trained(SHAPES["stack"], kind, zero_gradient="momentum")[2], start[2])
    decayed = trained(SHAPES["stack"], "muon", zero_gradient="momentum")[2]
    assert torch.allclose(decayed, start[2] * (1 - 0.1 * 0.3) ** 3, rtol=1e-12, atol=0)


def test_momentum_alone_turns_by_the_full_angle_until_it_underflows():
    """Why "skip" is the default: Muon's step does not shrink with the momentum."""
    param = nn.Parameter(normal((6, 10), 0).float())
    optimizer = HyperSphereOptimizer([("w", param)], lr=0.01, zero_gradient="momentum", momentum=0.5)
    param.grad = normal((6, 10), 1).float()
    optimizer.step()
    param.grad.zero_()
    turned = []
    for _ in range(200):
        before = param.detach().clone()
        optimizer.step()
        turned.append(((param - before).norm() / before.norm()).item())
    assert all(angle == pytest.approx(0.01, rel=0.1) for angle in turned[:20])
    assert turned[-1] == 0, "0.5^200 is not a float32"


def test_a_step_with_lr_0_changes_no_bit():
    for kind in ("sphere", "adam_sphere", "muon"):
        param = nn.Parameter(normal((3, 6, 10), 0))
        before = param.detach().clone()
        optimizer = HyperSphereOptimizer([{"params": [param], "kind": kind}], lr=0.0, zero_gradient="momentum")
        for grad in (normal((3, 6, 10), 1), torch.zeros(3, 6, 10)):
            param.grad = grad.to(param)
            optimizer.step()
        assert torch.equal(param, before)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match=r"zero_gradient: found 'keep', expected .*skip.*momentum"):
        HyperSphereOptimizer([("w", nn.Parameter(normal((3, 4), 0)))], zero_gradient="keep")
