"""One linear layer of all experts: both implementations against a loop over rows in float64."""

from __future__ import annotations

import pytest
import torch
from helpers import experts
from helpers.experts import Case

from lightning_mue.kernels.grouped_ffn.pytorch import blocks, running
from lightning_mue.kernels.grouped_linear.op import grouped_linear, grouped_linear_backward_op, grouped_linear_op

#: Norm-wise: some tens of roundings of the type.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
IN, OUT = 24, 40
CASES = [
    Case(60, IN, OUT, 4, 2),
    Case(61, IN, OUT, 5, 2, bias=True, routing="masked"),
    Case(90, IN, OUT, 3, 2, bias=True, routing="one"),
    Case(200, IN, OUT, 32, 2, bias=True),
    Case(40, IN, OUT, 4, 3, bias=True, bags=True, routing="masked"),
    Case(4, IN, OUT, 4, 2, routing="none"),
    Case(60, IN, OUT, 4, 2, layout="columns"),
]


def make(case, dtype, by_token, seed=0):
    """Arguments of the operator without its backend, dy, and y with all gradients in float64."""
    generator = torch.Generator().manual_seed(seed)
    token_of, expert_of = experts.assignments(case, generator)
    plan = experts.plan_of(token_of, expert_of, case)
    n_rows, order = len(token_of), plan.order.long()

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    x = normal(case.tokens if by_token else n_rows, IN)
    weight = experts.laid_out(normal(case.experts, OUT, IN), case.layout)
    bias = normal(case.experts, OUT) if case.bias else None
    dy = normal(n_rows, OUT)
    exact = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    rows = []
    for r, (token, expert) in enumerate(zip(token_of[order].tolist(), expert_of[order].tolist(), strict=True)):
        if expert == case.experts:
            rows.append(torch.zeros(OUT, dtype=torch.float64))
            continue
        row = exact[1][expert] @ exact[0][token if by_token else r]
        rows.append(row if bias is None else row + exact[2][expert])
    y = torch.stack(rows) if rows else exact[0].new_zeros(0, OUT)
    y = y + 0 * sum(t.sum() for t in exact if t is not None)  # a gradient of zero where no row is computed
    y.backward(dy.double())
    expected = [y.detach(), *[t.grad for t in exact if t is not None]]
    return (x, weight, bias, *vars(plan).values(), by_token), dy, expected


def computed(given, dy, backend):
    return [
        grouped_linear_op(*given, backend),
        *grouped_linear_backward_op(dy, *given, backend, True),
    ]


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request, monkeypatch):
    """With two threads, experts of more than 16 rows are cut."""
    monkeypatch.setattr(running, "_PARALLEL_FLOPS", 0)
    monkeypatch.setattr(blocks, "_CUT_ROWS", 16)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("by_token", [True, False], ids=["tokens", "rows"])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*[("torch", dtype) for dtype in TOLERANCES], ("grouped_mm", torch.float32), ("grouped_mm", torch.bfloat16)],
    ids=str,
)
def test_equals_a_loop_in_float64(case, by_token, backend, dtype, threads):
    given, dy, expected = make(case, dtype, by_token)
    for found, value in zip(computed(given, dy, backend), expected, strict=True):
        assert found.dtype == dtype
        assert experts.error(found, value) <= TOLERANCES[dtype]


def test_a_bias_of_another_expert_is_noticed():
    (x, weight, bias, *rest), dy, expected = make(CASES[3], torch.float64, True)
    assert experts.error(computed((x, weight, bias.roll(1, 0), *rest), dy, "torch")[0], expected[0]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_gradcheck(case, threads):
    (x, weight, bias, *rest), *_ = make(case._replace(tokens=5), torch.float64, True)
    weight, bias = weight[:, :3].clone(), bias[:, :3].clone()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *t: grouped_linear_op(*t, *rest, "torch"), leaves)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("backend", ["torch", "grouped_mm"])
@pytest.mark.parametrize("by_token", [True, False])
def test_operator_contract(backend, by_token):
    given, dy, _ = make(CASES[1]._replace(layout="columns"), torch.float32, by_token)
    torch.library.opcheck(grouped_linear_backward_op, (dy, *given, backend, True))
    for t in given[:3]:
        t.requires_grad_()
    torch.library.opcheck(grouped_linear_op, (*given, backend))


def test_without_gradients_of_weights_only_that_of_x_is_computed():
    given, dy, expected = make(CASES[1], torch.float64, True)
    (dx,) = grouped_linear_backward_op(dy, *given, "torch", False)
    assert experts.error(dx, expected[1]) <= TOLERANCES[torch.float64]


def test_what_does_not_fit_is_named():
    (x, weight, bias, *rest), *_ = make(CASES[1], torch.float32, True)
    plan = experts.DispatchPlan(*rest[:5])
    for changed, key in (
        ({"x": x[:, 1:]}, "x"),
        ({"bias": bias[:, 1:]}, "bias"),
        ({"weight": weight[0]}, "weight"),
        ({"weight": weight[1:], "bias": None}, "offsets"),
        ({"by_token": False}, "x"),
    ):
        with pytest.raises(ValueError, match=f"^{key}: found shape"):
            grouped_linear(**{"x": x, "weight": weight, "plan": plan, "bias": bias, "by_token": True, **changed})
    with pytest.raises(TypeError, match=r"^weight: found torch.float64"):
        grouped_linear(x, weight.double(), plan, by_token=True)
    with pytest.raises(ValueError, match=r"^backend: "):
        grouped_linear(x, weight, plan, by_token=True, backend="cuda")
