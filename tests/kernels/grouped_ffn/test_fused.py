"""Gate and up in one tensor: every backend against separate tensors and against a loop in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import experts

from lightning_mue.kernels.backends import implementation
from lightning_mue.kernels.grouped_ffn import op

#: Norm-wise, in float32: about a hundred roundings.
TOLERANCE = 1e-5


@pytest.fixture(params=["torch", "grouped_mm", pytest.param("triton", marks=pytest.mark.slow)])
def backend(request, monkeypatch):
    """On the CPU, Triton's kernels run in its interpreter."""
    if request.param == "triton":
        loaded = request.getfixturevalue("triton_experts")
        real = implementation
        monkeypatch.setattr(op, "implementation", lambda name, b: loaded if b == "triton" else real(name, b))
    return request.param


def fused(problem, layout):
    w_up = experts.laid_out(torch.cat([problem.w_gate, problem.w_up], 1), layout)
    b_up = None if problem.b_up is None else torch.cat([problem.b_gate, problem.b_up], 1)
    problem = problem._replace(x=problem.x.contiguous(), gates=problem.gates.contiguous())  # as `grouped_ffn` does
    return problem._replace(w_gate=None, b_gate=None, w_up=w_up, b_up=b_up)


def results(problem, dy, backend):
    """y and the gradients of `trained`."""
    y, z = op.grouped_ffn_op(*problem, backend, True)
    return [y, *op.grouped_ffn_backward_op(dy, z, *problem, backend, True)]


@pytest.mark.parametrize(
    ("layout", "bias"), [("rows", True), ("columns", False), ("columns", True), ("cut out", False)]
)
def test_equals_separate_tensors_and_float64(backend, device, layout, bias):
    made = experts.make(experts.Case(7, 16, 12, 3, 2, bias=bias, layout=layout), 3, device=device)
    problem = fused(made.problem, layout)
    found, separate = results(problem, made.dy, backend), results(made.problem, made.dy, backend)
    y, dx, dgates, dw_gate, dw_up, dw_down, *db = experts.reference(made)
    exact = [y, dx, dgates, torch.cat([dw_gate, dw_up], 1), dw_down, *([torch.cat(db, 1)] if db else [])]
    unfused = [*separate[:3], torch.cat(separate[3:5], 1), separate[5], *([torch.cat(separate[6:], 1)] if bias else [])]
    assert len(found) == len(exact)
    for grad, like in zip(found[1:], problem.trained, strict=True):
        assert grad.stride() == torch.empty_like(like).stride(), "not as the fake implementation promises"
    assert max(experts.error(a, b) for a, b in zip(found, exact, strict=True)) <= TOLERANCE
    assert max(experts.error(a, b.double().cpu()) for a, b in zip(found, unfused, strict=True)) <= TOLERANCE
    swapped = problem._replace(w_up=problem.w_up.roll(12, 1))  # up first: noticed
    assert experts.error(results(swapped, made.dy, backend)[0], y) > 0.1
