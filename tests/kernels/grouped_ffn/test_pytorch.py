"""The experts in plain PyTorch against a float64 loop: blocks of one expert, of several, of part of one; one thread and two."""

from __future__ import annotations

import pytest
import torch
from helpers import experts

from lightning_mue.kernels import scratch
from lightning_mue.kernels.activations import ACTIVATIONS
from lightning_mue.kernels.compute_type import VARIABLE
from lightning_mue.kernels.grouped_ffn.op import grouped_ffn_backward_op, grouped_ffn_op
from lightning_mue.kernels.grouped_ffn.pytorch import blocks, running
from lightning_mue.kernels.grouped_ffn.pytorch import experts as grouped_ffn

Case = experts.Case

#: Norm-wise. float64: a thousand roundings. float32: a hundred. bfloat16: operands, results and four
#: intermediates have 8 bits; a result of few numbers may be as far off as its worst one. float16: the same with 11 bits.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

CASES = [
    *(Case(60, 24, 20, 5, 2, activation) for activation in ACTIVATIONS),
    *(Case(50, 16, 16, 3, 1, activation, True) for activation in ACTIVATIONS),
    *(Case(70, 17, 33, 4, 2, activation, True, "masked") for activation in ACTIVATIONS),
    Case(50, 32, 48, 2, 2),  # top_k = E
    Case(40, 17, 33, 3, 3, "gelu"),
    Case(80, 16, 16, 1, 1),  # E = 1
    Case(1, 20, 12, 4, 2),  # 1 token
    Case(1, 1, 1, 1, 1),
    Case(1, 3, 2, 2, 1, "gelu"),
    Case(0, 20, 12, 4, 2),  # 0 tokens
    Case(0, 20, 12, 4, 2, "gelu", True),
    Case(3, 20, 24, 6, 1),  # more experts than rows: empty ones
    Case(2, 16, 32, 9, 1, "relu2", True),
    Case(9, 20, 24, 4, 2, "relu", True),
    Case(90, 20, 24, 4, 1, routing="one"),  # all on one expert
    Case(60, 33, 16, 3, 2, "geglu", True, routing="one"),
    Case(4, 20, 24, 4, 2, routing="none"),
    Case(60, 20, 24, 4, 3, bags=True),
    Case(60, 20, 24, 4, 3, "gelu", True, bags=True),
    Case(40, 16, 16, 4, 4, "geglu-tanh", bags=True, routing="masked"),
    Case(4, 16, 16, 4, 2, bags=True, routing="none"),
    Case(60, 24, 20, 3, 2, layout="columns"),
    Case(60, 24, 20, 3, 2, "gelu", True, layout="cut out"),
    Case(70, 16, 8, 64, 4),  # many small experts
    Case(200, 8, 8, 32, 2),
]


@pytest.fixture(autouse=True)
def _bfloat16_as_it_is(monkeypatch):
    monkeypatch.setenv(VARIABLE, "bfloat16")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request, monkeypatch):
    """With two threads, experts of more than 16 rows are cut."""
    monkeypatch.setattr(running, "_PARALLEL_FLOPS", 0)
    monkeypatch.setattr(blocks, "_CUT_ROWS", 16)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def problem_of(case, dtype, seed=0):
    """With gates of the type that `Problem` asks for."""
    made = experts.make(case, seed, dtype)
    gates = made.problem.gates.to(torch.promote_types(dtype, torch.float32))
    return made._replace(problem=made.problem._replace(gates=gates))


def computed(made):
    y, z = grouped_ffn.forward(made.problem, True)
    return [y, *grouped_ffn.backward(made.problem, made.dy, z, True)]


def assert_close(found, exact, dtype, tokens):
    tolerance = TOLERANCES[dtype] * (3 if dtype in (torch.bfloat16, torch.float16) and tokens < 40 else 1)
    assert [experts.error(f, e) for f, e in zip(found, exact, strict=True)] == pytest.approx(
        [0] * len(exact), abs=tolerance
    )


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_a_loop_in_float64(threads, case, dtype):
    made = problem_of(case, dtype)
    found = computed(made)
    assert found[0].dtype == dtype
    assert found[2].dtype == made.problem.gates.dtype
    assert_close(found, experts.reference(made), dtype, case.tokens)


@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_where_bfloat16_is_slow_float32_is_multiplied(threads, case, monkeypatch):
    """Operands and results have 8 bits, and so has z; no other intermediate. So it is no less exact than bfloat16 products."""
    monkeypatch.setenv(VARIABLE, "float32")
    made = problem_of(case, torch.bfloat16)
    assert grouped_ffn._Forward(made.problem, False).dtype == torch.float32
    found = computed(made)
    assert [f.dtype for f in found] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        *[torch.bfloat16] * (len(found) - 3),
    ]
    assert_close(found, experts.reference(made), torch.bfloat16, case.tokens)
    if case == CASES[0]:
        monkeypatch.setenv(VARIABLE, "bfloat16")
        errors = [
            [experts.error(f, e) for f, e in zip(each, experts.reference(made), strict=True)]
            for each in (found, computed(made))
        ]
        assert sum(errors[0]) < sum(errors[1])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_comparison_bites(dtype):
    """Negative control: one expert's gate matrix that is off by 30 % is seen in every result that it has a part in."""
    made = problem_of(CASES[0], dtype)
    w_gate = made.problem.w_gate.clone()
    w_gate[1] *= 1.3
    exact = experts.reference(made)
    wrong = computed(made._replace(problem=made.problem._replace(w_gate=w_gate)))
    errors = [experts.error(f, e) for f, e in zip(wrong, exact, strict=True)]
    assert min(errors[0], *errors[3:6]) > TOLERANCES[dtype]


def test_blocks_of_every_kind_occur(threads):
    """What the cases above are meant to cover."""
    kinds = set()
    for case in CASES:
        for dtype in TOLERANCES:
            layout = grouped_ffn._Forward(problem_of(case, dtype).problem, False).layout
            kinds |= {(b.shape[0] > 1, b.is_padded, b.part > 0) for b in layout.blocks}
    expected = {(False, False, False), (False, True, False), (True, True, False)}
    assert kinds >= (expected if threads == 1 else {*expected, (False, False, True), (False, True, True)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASES[0], CASES[12], CASES[-2], CASES[-1]], ids=str)
def test_nothing_undefined_is_read_or_returned(threads, case, dtype, monkeypatch):
    """New memory and kept buffers full of NaN change no bit of any result."""
    made = problem_of(case, dtype)
    before = computed(made)
    for storage in (storage for spare in scratch._spare.values() for storage in spare):
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(255)  # NaN in every type that it may be read as
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(1).isnan().all()
        after = computed(made)
    finally:
        torch.use_deterministic_algorithms(False)
    for b, a in zip(before, after, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_are_equal_and_threads_round_alike(dtype, monkeypatch):
    """GEMM kernels may differ in the last bits from one row count to another."""
    made, results = problem_of(Case(400, 16, 24, 8, 2), dtype), {}
    monkeypatch.setattr(running, "_PARALLEL_FLOPS", 0)
    for n in (1, 2):
        torch.set_num_threads(n)
        results[n] = computed(made)
        for first, again in zip(results[n], computed(made), strict=True):
            assert torch.equal(first, again)
    for one, two in zip(*results.values(), strict=True):
        assert (one - two).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * one.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_token_of_nan_spoils_its_own_experts_only(threads, dtype):
    """Padding repeats rows: never those of another expert."""
    made = problem_of(Case(64, 8, 8, 16, 1), dtype)
    token = 5
    made.problem.x[token] = torch.nan
    y, _, _, dw_gate, dw_up, dw_down = computed(made)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [token]
    for dw in (dw_gate, dw_up, dw_down):
        assert dw.isnan().flatten(1).any(1).nonzero().flatten().tolist() == [made.expert_of[token]]


def test_without_weight_gradients_and_without_kept_pre_activations(threads):
    made = problem_of(CASES[0], torch.float32)
    y, z = grouped_ffn.forward(made.problem, True)
    y_only, none = grouped_ffn.forward(made.problem, False)
    assert torch.equal(y, y_only)
    assert none.shape == (2, 0, 20)
    dx, dgates, *_ = grouped_ffn.backward(made.problem, made.dy, z, True)
    few = grouped_ffn.backward(made.problem, made.dy, z, False)
    assert len(few) == 2
    assert torch.equal(few[0], dx)
    assert torch.equal(few[1], dgates)


def test_gradcheck(threads):
    made = problem_of(Case(6, 5, 3, 4, 2, "geglu", True, "masked"), torch.float64)
    trained = [t.requires_grad_() for t in made.problem.trained]
    rest = made.problem[7:]
    assert torch.autograd.gradcheck(lambda *t: grouped_ffn_op(*t, *rest, "torch", True)[0], trained)


@pytest.mark.parametrize("case", [CASES[0], CASES[9], CASES[21]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_operator_contract(case, dtype):
    """Schema, autograd registration, fake implementation and AOT dispatch, as PyTorch checks them."""
    made = problem_of(case, dtype)
    for t in made.problem.trained:
        t.requires_grad_()
    tolerances = {"atol": 1e-2, "rtol": 1e-2} if dtype == torch.bfloat16 else {}
    torch.library.opcheck(grouped_ffn_op, (*made.problem, "torch", True), **tolerances)
    with torch.no_grad():
        z = grouped_ffn.forward(made.problem, True)[1]
    args = [t.detach() if isinstance(t, torch.Tensor) else t for t in (made.dy, z, *made.problem)]
    torch.library.opcheck(grouped_ffn_backward_op, (*args, "torch", True), **tolerances)


def test_results_are_ordinary_tensors(threads):
    """Not of the inference mode in which the workers run: those cannot be saved for a backward pass."""
    made = problem_of(CASES[0], torch.float32)
    assert not any(t.is_inference() for t in computed(made))
    with torch.inference_mode():
        y = grouped_ffn.forward(made.problem, False)[0]
    assert torch.equal(y, grouped_ffn.forward(made.problem, False)[0])


@pytest.mark.parametrize(("activation", "planes"), [("swiglu", 2), ("gelu", 1)])
def test_only_what_is_needed_is_saved(activation, planes):
    """Beside its inputs the operator keeps the [S, h] pre-activations (the minimum; see Memory in docs/moe.md)."""
    made, saved = problem_of(Case(16, 6, 10, 4, 2, activation), torch.float32), {}
    for t in made.problem.trained:
        t.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        grouped_ffn_op(*made.problem, "torch", True)
    inputs = {t.data_ptr() for t in made.problem if isinstance(t, torch.Tensor)}
    assert [t.shape for pointer, t in saved.items() if pointer not in inputs] == [(planes, 32, 10)]


def test_work_buffers_stay_unless_they_are_large(monkeypatch):
    monkeypatch.setattr(scratch, "_spare", {})
    like = torch.empty(0)
    with scratch.borrowed("test", like, 1000) as first, scratch.borrowed("test", like, 1000) as second:
        places = {first.data_ptr(), second.data_ptr()}
        assert len(places) == 2
    with scratch.borrowed("test", like, 900) as again:
        assert again.data_ptr() in places
    with scratch.borrowed("test", like, scratch._KEPT_BYTES) as huge:
        assert len(huge) == scratch._KEPT_BYTES
    assert all(len(storage) <= scratch._KEPT_BYTES for storage in scratch._spare["test"])
