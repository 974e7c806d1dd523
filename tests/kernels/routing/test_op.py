"""`route` on the CPU, in numpy and in plain PyTorch, against formulas in float64, and what holds for every backend of it."""

from __future__ import annotations

import pytest
import torch
from helpers import routing_cases as cases
from helpers.routing_cases import CASES, Case, check, close, gradient, reference, run, tensors
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mue.kernels.routing import host, op
from lightning_mue.kernels.routing import pytorch as any_device
from lightning_mue.kernels.routing.op import GATES, SCORINGS, route

#: A few roundings of float32 each, in sums of up to 30 terms; gradients multiply several of them.
VALUES, GRADIENTS = 1e-6, 5e-6


def both(case, dtype, seed=0):
    logits, bias, mask = tensors(case, dtype, seed)
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    return (run(case, ours, bias, mask), ours), (reference(case, exact, bias, mask), exact)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case):
    (routed, logits), (expected, exact) = both(case, torch.float32)
    scale = 30 if case.kind == "wide" else 1  # logits of some 100 have fewer digits behind the point
    check(routed, expected, scale * VALUES)
    assert routed.gates.dtype == routed.z_sum.dtype == routed.probability_sum.dtype == torch.float32
    if case.tokens:
        close(gradient(routed, logits), gradient(expected, exact), scale * GRADIENTS, "gradient")


@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_the_form_for_any_device_agrees(case, monkeypatch):
    (routed, logits), _ = both(case, torch.float64)
    monkeypatch.setattr(op, "_module", lambda *_: any_device)
    (other, own), _ = both(case, torch.float64)
    check(other, routed, 1e-14)
    if case.tokens:
        close(gradient(other, own), gradient(routed, logits), 1e-13, "gradient")


@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "normal" and c.tokens], ids=str)
def test_float64_stays_float64(case):
    (routed, logits), (expected, exact) = both(case, torch.float64)
    assert routed.gates.dtype == torch.float64
    check(routed, expected, 1e-14)
    close(gradient(routed, logits), gradient(expected, exact), 1e-13, "gradient")


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_gradcheck(scoring, gate):
    case = Case(6, 6, 4, scoring, gate, n_groups=2, n_sequences=2, masked=True, biased=True)
    logits, bias, mask = tensors(case, torch.float64)

    def outputs(x):
        routed = run(case, x, bias, mask)
        return routed.gates, routed.probability_sum, routed.z_sum

    assert torch.autograd.gradcheck(outputs, logits.requires_grad_())


@pytest.mark.parametrize("used", ["gates", "probability_sum", "z_sum"])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_loss_of_one_output_alone(scoring, used):
    """An output without a gradient is left out of the backward pass, not taken for zeros of an unknown shape."""
    (routed, logits), (expected, exact) = both(Case(scoring=scoring, n_sequences=3), torch.float64)
    grads = [
        torch.autograd.grad(getattr(r, used).square().sum(), x)[0] for r, x in ((routed, logits), (expected, exact))
    ]
    assert grads[1].norm() > 0.01
    close(*grads, 1e-13, used)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_problem(data):
    draw = data.draw
    groups = draw(st.integers(1, 4), "groups")
    size = draw(st.integers(1, 9), "experts a group")
    each = draw(st.integers(1, size), "active a group")
    sequences = draw(st.integers(1, 3), "sequences")
    case = Case(
        sequences * draw(st.integers(0, 8), "length"),
        groups * size,
        groups * each,
        draw(st.sampled_from(SCORINGS)),
        draw(st.sampled_from(GATES)),
        groups,
        sequences,
        draw(st.booleans(), "masked"),
        draw(st.booleans(), "biased"),
        draw(st.sampled_from(["normal", "quantized"])),
    )
    # With a bias, scores that are equal in float64 may differ in float32 and the other way round.
    dtype = torch.float64 if case.biased else torch.float32
    (routed, logits), (expected, exact) = both(case, dtype, draw(st.integers(0, 99), "seed"))
    check(routed, expected, 2e-6)
    if case.tokens:
        close(gradient(routed, logits), gradient(expected, exact), GRADIENTS, "gradient")


def stable(values, k):
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k]


def top(values, k):
    return torch.from_numpy(host.top(values.numpy(), k))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (5, 5), (6, 4), (16, 3), (17, 2), (24, 24), (64, 8), (100, 10)])
@pytest.mark.parametrize("kind", ["normal", "quantized", "equal", "close", "zeros", "tiny", "nan", "infinite", "minus"])
def test_top_is_a_stable_sort(kind, n, k):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(300, n, generator=generator)
    some = torch.rand(300, n, generator=generator) < 0.1
    values = {
        "normal": x,
        "quantized": x.round(),
        "equal": torch.ones_like(x),
        "close": 1 + x.round() * 2**-23,  # neighbours: what the lowest bits say decides
        "zeros": x.round().clamp(-0.4, 0.4) * torch.where(some, -1.0, 1.0),  # both signs
        "tiny": x.round() * 1e-45,
        "nan": x.masked_fill(some, torch.nan),
        "infinite": x.masked_fill(some, torch.inf),
        "minus": x.masked_fill(some, -torch.inf),
    }[kind]
    kept = values.clone()
    assert torch.equal(top(values, k), stable(values, k))
    assert torch.equal(top(values.double(), k), stable(values, k))
    assert torch.equal(any_device.top(values, k), stable(values, k))
    assert torch.equal(values.view(torch.int32), kept.view(torch.int32))  # nothing was written into the logits


def test_top_repairs_only_where_it_must(monkeypatch):
    """Negative control of the above: without the repair equal values do come out of order; and rows apart are not sorted."""
    x = torch.randn(200, 20, generator=torch.Generator().manual_seed(0))
    sorted_rows, whole = [], torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda self, **kw: sorted_rows.append(len(self)) or whole(self, **kw))
    top(x, 4)
    assert sum(sorted_rows) <= 2
    x[7, 3] = x[7].max() + 1
    x[7, 9] = x[7, 3]
    top(x, 4)
    assert 1 <= sorted_rows[-1] <= 3
    tied = x.round()
    ids, clear = map(torch.from_numpy, host._by_keys(tied.numpy(), 4))
    assert torch.equal(ids[clear], stable(tied, 4)[clear])
    assert not torch.equal(ids, stable(tied, 4))


@pytest.mark.parametrize("n_groups", [1, 2])
def test_equal_logits_go_to_the_lowest_indices(n_groups):
    routed = route(
        torch.zeros(50, 12),
        torch.zeros(12),
        top_k=4,
        scoring="sigmoid",
        gate="linear",
        n_groups=n_groups,
        backend="torch",
    )
    expected = [0, 1, 2, 3] if n_groups == 1 else [0, 1, 6, 7]
    assert (routed.expert_ids == torch.tensor(expected)).all()


def test_without_a_bias_saturated_scores_still_differ():
    logits = torch.tensor([[40.0, 41.0, 0.0, 42.0]])  # sigmoid is 1 for three of them
    for bias, expected in ((0.0, [3, 1]), (1e-3, [0, 1])):
        routed = route(logits, torch.full((4,), bias), top_k=2, scoring="sigmoid", gate="linear")
        assert routed.expert_ids.tolist() == [expected], bias


def test_bias_selects_and_does_not_weigh():
    logits, bias, _ = tensors(Case(biased=True))
    biased, plain = (run(Case(top_k=8), logits, b, None) for b in (bias, torch.zeros(8)))
    assert not torch.equal(biased.expert_ids, plain.expert_ids)
    back = torch.zeros(30, 8).scatter(1, biased.expert_ids, biased.gates)
    assert torch.allclose(back, logits.softmax(1), atol=1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("whole", [True, False])
def test_nan_stays_with_its_token(scoring, n_groups, biased, whole):
    case = Case(40, 8, 4, scoring, n_groups=n_groups, biased=biased, n_sequences=2)
    logits, bias, _ = tensors(case)
    dirty = logits.clone()
    dirty[3, : 8 if whole else 1] = torch.nan
    dirty.requires_grad_()
    clean, routed = run(case, logits, bias, None), run(case, dirty, bias, None)
    others = torch.arange(40) != 3
    assert torch.equal(routed.expert_ids[others], clean.expert_ids[others])
    assert torch.equal(routed.gates[others], clean.gates[others])
    assert torch.equal(routed.z_sum[1], clean.z_sum[1])
    assert routed.gates[3].isnan().all()
    assert ((routed.expert_ids >= 0) & (routed.expert_ids < 8)).all()
    assert not cases.overlap(routed.expert_ids)
    grad = torch.autograd.grad(routed.gates[others].sum() + routed.probability_sum[1, 0] + routed.z_sum[1], dirty)[0]
    assert grad[others].isfinite().all()


def test_padding_may_hold_anything():
    """Masked tokens as if they were not there: NaN and infinite ones, with gradients of NaN, change nothing."""
    case = Case(40, 8, 4, n_sequences=2, masked=True)
    logits, bias, mask = tensors(case)
    grads = []
    for filler in (0.0, torch.nan, torch.inf, -torch.inf, 1e38):
        x = logits.masked_fill(~mask[:, None], filler).requires_grad_()
        routed = run(case, x, bias, mask)
        check(routed, reference(case, logits.double(), bias, mask), VALUES)
        poison = torch.where(mask, 1.0, torch.nan)[:, None] * routed.gates
        grads.append(torch.autograd.grad(poison.square()[mask].sum() + routed.z_sum.sum(), x)[0])
    assert all(torch.equal(g, grads[0]) for g in grads)
    assert (grads[0][~mask] == 0).all()
    assert (grads[0][mask] != 0).any()


def test_sqrt_has_a_finite_gradient_where_a_gate_underflows():
    logits = torch.tensor([[0.0, -200.0]], requires_grad=True)
    routed = route(logits, torch.zeros(2), top_k=2, scoring="topk-softmax", gate="sqrt")
    assert 0 < routed.gates[0, 1] < 1e-40  # exp(-200) is 0 in float32, its root is not
    (grad,) = torch.autograd.grad(routed.gates.sum(), logits)
    assert grad.isfinite().all()


def test_permuting_tokens_permutes_the_route():
    case = Case(37, 16, 4, kind="quantized")
    logits, bias, _ = tensors(case)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(3))
    straight, permuted = run(case, logits, bias, None), run(case, logits[order], bias, None)
    assert torch.equal(permuted.expert_ids, straight.expert_ids[order])
    assert torch.equal(permuted.gates, straight.gates[order])
    assert torch.equal(permuted.counts, straight.counts)


def test_large_problems_agree():
    case = Case(2048, 64, 8)
    logits, bias, _ = tensors(case)
    routed = run(case, logits, bias, None)
    assert torch.equal(routed.expert_ids, stable(logits, 8))
    close(routed.gates, logits.double().gather(1, routed.expert_ids).softmax(1), VALUES, "gates")
    assert torch.equal(routed.counts[0], routed.expert_ids.flatten().bincount(minlength=64))
    # Sums of 2048 numbers, added up pairwise.
    close(routed.probability_sum[0], logits.double().softmax(1).sum(0), 3e-6, "probability")


def test_strided_logits():
    case = Case(30, 8, 2)
    wide = torch.randn(8, 60, generator=torch.Generator().manual_seed(0)).requires_grad_()
    view = wide.T[::2]
    routed = run(case, view, torch.zeros(8), None)
    expected = run(case, view.detach().clone(), torch.zeros(8), None)
    assert torch.equal(routed.expert_ids, expected.expert_ids)
    routed.gates[:, 0].sum().backward()
    assert wide.grad.T[::2].norm() > 0
    assert wide.grad.T[1::2].norm() == 0


@pytest.mark.parametrize("case", [Case(), Case(masked=True, n_sequences=3, biased=True), Case(0, 4, 2)], ids=str)
def test_operators_are_well_formed(case):
    logits, bias, mask = tensors(case)
    logits.requires_grad_()
    values = (case.top_k, case.scoring, case.gate, case.n_groups, case.n_sequences, "torch")
    torch.library.opcheck(torch.ops.lightning_mue.route.default, (logits, bias, mask, *values))
    gates, ids, *_, log_sum = torch.ops.lightning_mue.route.default(logits.detach(), bias, mask, *values)
    grads = (torch.randn_like(gates), None, torch.ones(case.n_sequences))
    args = (*grads, logits.detach(), ids, gates, log_sum, mask, *values)
    torch.library.opcheck(torch.ops.lightning_mue.route_backward.default, args)


def test_compiles_without_a_graph_break():
    case = Case(masked=True, n_sequences=2)
    logits, bias, mask = tensors(case)
    logits.requires_grad_()
    compiled = torch.compile(lambda x: run(case, x, bias, mask), fullgraph=True, backend="aot_eager")
    eager, ours = run(case, logits, bias, mask), compiled(logits)
    check(ours, eager, 0)
    assert torch.equal(gradient(ours, logits), gradient(eager, logits))


def test_on_the_meta_device():
    case = Case(n_sequences=3, masked=True)
    routed = run(case, *(t.to("meta") for t in tensors(case)), backend="auto")
    assert [tuple(t.shape) for t in routed] == [(30, 2), (30, 2), (3, 8), (3, 8), (3,)]
    assert routed.expert_ids.dtype == routed.counts.dtype == torch.int64


def test_saves_no_copy_of_its_inputs():
    case = Case(64, 8, 2)
    logits, bias, _ = tensors(case)
    logits.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        routed = run(case, logits, bias, None)
    known = {t.untyped_storage().data_ptr() for t in (logits, *routed)}
    own = [t for t in saved if t.untyped_storage().data_ptr() not in known]
    assert [tuple(t.shape) for t in own] == [(64,)]  # one number a token: its logsumexp


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        (
            {"logits_TE": torch.zeros(6, 4).bfloat16()},
            TypeError,
            "logits_TE: found torch.bfloat16, expected float32 or float64",
        ),
        ({"logits_TE": torch.zeros(2, 3, 4)}, ValueError, r"found shapes \[2, 3, 4\].*\[tokens, n_experts\]"),
        (
            {"bias_E": torch.zeros(5)},
            ValueError,
            r"logits_TE and bias_E: found shapes \[6, 4\] and \[5\], expected ",
        ),
        ({"scoring": "softmax"}, ValueError, "scoring: found 'softmax', expected one of 'softmax-topk'"),
        ({"gate": "cube"}, ValueError, "gate: found 'cube', expected one of 'linear', 'sqrt'"),
        ({"top_k": 5}, ValueError, "top_k: found 5, expected 1 to n_experts=4"),
        ({"top_k": 0}, ValueError, "top_k: found 0"),
        ({"n_groups": 3}, ValueError, "n_groups: found 3, expected a divisor of n_experts=4 and of top_k=2"),
        ({"n_groups": 4}, ValueError, "n_groups: found 4, expected a divisor"),
        ({"n_sequences": 4}, ValueError, "n_sequences: found 4, expected a divisor of the number of tokens, 6"),
        ({"n_sequences": 0}, ValueError, "n_sequences: found 0"),
        ({"mask_T": torch.ones(6)}, TypeError, "mask_T: found torch.float32, expected torch.bool.*mask.bool"),
        ({"mask_T": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"mask_T: found shape \[2, 3\], expected \[6\]"),
        ({"backend": "cuda"}, ValueError, "backend: found 'cuda', expected one of"),
    ],
)
def test_what_is_refused(changed, error, words):
    arguments = {"logits_TE": torch.zeros(6, 4), "bias_E": torch.zeros(4), "top_k": 2}
    arguments |= {"scoring": "sigmoid", "gate": "linear"}
    route(**arguments)
    with pytest.raises(error, match=words):
        route(**arguments | changed)


def test_a_wrong_gradient_is_caught(monkeypatch):
    """Negative control of the comparison with float64."""
    whole = host._through_probabilities

    def wrong(*args):
        whole(*args)
        args[-1][:] *= 1 + 1e-4

    monkeypatch.setattr(host, "_through_probabilities", wrong)
    (routed, logits), (expected, exact) = both(Case(), torch.float32)
    with pytest.raises(AssertionError, match="gradient"):
        close(gradient(routed, logits), gradient(expected, exact), GRADIENTS, "gradient")
