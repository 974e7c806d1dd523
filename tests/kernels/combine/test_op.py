"""Sums over a token's rows: the operator with both implementations, against a float64 loop."""

from __future__ import annotations

import pytest
import torch
from helpers import experts

from lightning_mue.kernels.combine import op as combine
from lightning_mue.kernels.combine.op import combine_rows
from lightning_mue.kernels.dispatch.op import DispatchPlan

Case = experts.Case

BACKENDS = ["torch", "triton"]
CASES = [
    Case(9, 20, 0, 4, 2),
    Case(7, 33, 0, 3, 3),
    Case(1, 1, 0, 1, 1),
    Case(0, 8, 0, 4, 2),
    Case(12, 20, 0, 4, 2, routing="masked"),
    Case(4, 20, 0, 4, 2, routing="none"),
    Case(12, 20, 0, 4, 3, bags=True),
    Case(9, 17, 0, 4, 4, bags=True, routing="masked"),
    Case(2, 2100, 0, 18, 17),  # wider than a program, more rows than are unrolled
]


@pytest.fixture(autouse=True)
def _kernels(triton_experts):
    """Backend "triton" runs anywhere: on the CPU in the interpreter."""


def make(case, dtype, device, weighted=True, seed=0):
    """Rows (NaN where they belong to no expert), gates, plan, dy, and the token of each assignment."""
    generator = torch.Generator().manual_seed(seed)
    token_of, expert_of = experts.assignments(case, generator)
    plan = experts.plan_of(token_of, expert_of, case)
    rows = torch.randn(len(plan.order), case.d, generator=generator).to(dtype)
    rows[int(plan.offsets[-1]) :] = torch.nan
    gates = torch.rand(plan.inverse.shape, generator=generator)
    gates = gates.double() if dtype == torch.float64 else gates
    dy = torch.randn(case.tokens, case.d, generator=generator).to(dtype)
    plan = DispatchPlan(*(None if t is None else t.to(device) for t in vars(plan).values()))
    rows, gates = rows.to(device).requires_grad_(), gates.to(device).requires_grad_()
    return rows, gates if weighted else None, plan, dy.to(device), token_of.tolist()


def reference(rows, gates, plan, dy, token_of):
    """y, and the gradients of rows and, if given, gates: sums in float64 over assignments, one at a time."""
    rows, dy = rows.detach().cpu().double(), dy.cpu().double()
    weights = torch.ones(len(rows)).double() if gates is None else gates.detach().cpu().double().flatten()
    y, drows, dgates = torch.zeros_like(dy), torch.zeros_like(rows), torch.zeros_like(weights)
    for j, (t, r) in enumerate(zip(token_of, plan.inverse.flatten().tolist(), strict=True)):
        if r < int(plan.offsets[-1]):
            y[t] += weights[j] * rows[r]
            drows[r] = weights[j] * dy[t]
            dgates[j] = rows[r] @ dy[t]
    return [y, drows] if gates is None else [y, drows, dgates.view(gates.shape)]


def results(rows, gates, plan, dy, backend):
    y = combine_rows(rows, plan, gates, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, [rows] if gates is None else [rows, gates], dy)]


def check(found, exact, dtype, cut_off=False):
    # Norm-wise. A rounding of the result and float32 sums; the interpreter cuts bfloat16 off instead of rounding it.
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7 if cut_off else 2**-8}[dtype]
    assert len(found) == len(exact)
    for a, b in zip(found, exact, strict=True):
        assert experts.error(a, b) <= tolerance


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_loop_in_float64(device, case, backend, weighted):
    made = make(case, torch.float32, device, weighted)
    check(results(*made[:4], backend), reference(*made), torch.float32)


@pytest.mark.parametrize(("backend", "dtype"), [("torch", torch.float64), *((b, torch.bfloat16) for b in BACKENDS)])
def test_other_types(device, backend, dtype):
    made = make(CASES[4], dtype, device)
    found = results(*made[:4], backend)
    assert [t.dtype for t in found] == [dtype, dtype, made[1].dtype]
    check(found, reference(*made), dtype, cut_off=backend == "triton" and device == "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_rows_or_only_gates_are_trained(device, backend):
    rows, gates, plan, dy, _ = make(CASES[4], torch.float32, device)
    _, drows, dgates = results(rows, gates, plan, dy, backend)
    y = combine_rows(rows, plan, gates.detach(), backend=backend)
    assert torch.equal(torch.autograd.grad(y, rows, dy)[0], drows)
    y = combine_rows(rows.detach(), plan, gates, backend=backend)
    assert torch.equal(torch.autograd.grad(y, gates, dy)[0], dgates)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [Case(3, 4, 0, 2, 2), Case(4, 4, 0, 2, 2, bags=True)], ids=str)
def test_is_an_operator_in_full(device, backend, case):
    """Schema, fake implementations, autograd registration, and tracing with symbolic shapes."""
    rows, gates, plan, dy, _ = make(case, torch.float32, device)
    tensors = (plan.order, plan.inverse, plan.tokens, plan.offsets)
    torch.library.opcheck(combine.combine_rows_op, (rows, gates, *tensors, plan.bags, backend))
    torch.library.opcheck(combine.combine_rows_op, (rows, None, *tensors, plan.bags, backend))
    given = (dy, rows.detach(), gates.detach(), *tensors, backend)
    torch.library.opcheck(combine.combine_rows_backward_op, given)
    torch.library.opcheck(combine.combine_rows_backward_op, (dy, None, None, *tensors, backend))


def test_strided_rows_and_gates(device):
    for backend in BACKENDS:
        rows, gates, plan, dy, token_of = make(CASES[0], torch.float32, device)
        rows, gates = (t.detach().mT.contiguous().mT.requires_grad_() for t in (rows, gates))
        made = rows, gates, plan, dy.mT.contiguous().mT, token_of
        check(results(*made[:4], backend), reference(*made), torch.float32)


def test_bad_arguments_are_named():
    rows, gates, plan, *_ = make(CASES[0], torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"rows_Sd: found shape \[17, .*\], expected .* S = 18 rows"):
        combine_rows(rows[:-1], plan)
    with pytest.raises(ValueError, match=r"gates: found torch.float64 .*, expected torch.float32 of shape \[9, 2\]"):
        combine_rows(rows, plan, gates.double())
    with pytest.raises(ValueError, match="backend: found 'cuda', expected one of"):
        combine_rows(rows, plan, backend="cuda")


@pytest.mark.parametrize("broken", ["gates left out", "masked rows read", "the order of rows"])
def test_negative_controls_a_wrong_sum_is_caught(device, broken):
    rows, gates, plan, dy, token_of = make(CASES[4], torch.float32, device)
    exact = reference(rows, gates, plan, dy, token_of)
    if broken == "gates left out":
        gates = torch.ones_like(gates).requires_grad_()
    elif broken == "masked rows read":
        plan.offsets[-1] = len(rows)
    else:
        plan = DispatchPlan(plan.order, plan.inverse.flip(0), plan.tokens, plan.offsets)
    for backend in BACKENDS:
        with pytest.raises(AssertionError):
            check(results(rows, gates, plan, dy, backend), exact, torch.float32)
