"""Plans: sorting assignments by expert, in plain PyTorch and in Triton, and the plan of expert choice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lightning_mue.kernels import backends
from lightning_mue.kernels.dispatch.op import plan_dispatch, plan_expert_choice

FIELDS = ("order", "inverse", "tokens", "offsets")
BACKENDS = ["torch", "triton"]

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="replaces parts of the kernel in the interpreter"
)


@pytest.fixture(autouse=True)
def kernels(triton_dispatch, monkeypatch):
    """Every buffer that a kernel is given to fill is poisoned; "triton" is accepted in the interpreter."""
    empty = triton_dispatch.new_empty
    monkeypatch.setattr(triton_dispatch, "new_empty", lambda *a, **k: empty(*a, **k).fill_(-77))
    monkeypatch.setattr(backends, "_interpreted", lambda x: True)
    return triton_dispatch


def routing(tokens, experts, k, seed=0, masked=0.2, skew=0.0):
    """Random ids and counts; a token's experts differ, and those of some tokens are E."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator) + skew * torch.arange(experts)
    ids = scores.topk(k).indices
    ids[torch.rand(tokens, generator=generator) < masked] = experts
    return ids, ids.flatten().bincount(minlength=experts + 1)[:experts]


def check(plan, ids, n_experts):
    """Against sorting (expert, position) pairs in Python."""
    pairs = sorted((e, s) for s, e in enumerate(ids.flatten().tolist()))
    order = [s for _, s in pairs]
    assert plan.order.tolist() == order, "order"
    assert plan.tokens.tolist() == [s // ids.shape[1] for s in order], "tokens"
    assert plan.inverse.shape == ids.shape
    assert [order[r] for r in plan.inverse.flatten().tolist()] == list(range(len(order))), "inverse"
    assert plan.offsets.tolist() == [sum(e < i for e, _ in pairs) for i in range(n_experts + 1)], "offsets"
    assert all(getattr(plan, name).dtype == torch.int32 for name in FIELDS)
    assert plan.bags is None


SIZES = [
    (40, 8, 2),
    (1, 1, 1),
    (9, 5, 5),
    (0, 4, 2),
    (700, 12, 3),
    (33, 300, 4),
    (30, 255, 2),
    (30, 256, 2),
    (2048, 3, 1),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_a_sort_in_python(device, size, backend):
    ids, counts = routing(*size)
    check(plan_dispatch(ids.to(device), counts.to(device), backend=backend), ids, size[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["one expert", "all masked", "skewed", "none masked"])
def test_uneven(device, kind, backend):
    ids, counts = routing(1500, 20, 2, masked=float(kind == "all masked"), skew=0.3 * (kind == "skewed"))
    if kind == "one expert":
        ids, counts = (
            torch.full((1500, 1), 13),
            torch.zeros(20, dtype=torch.int64).index_fill(0, torch.tensor([13]), 1500),
        )
    check(plan_dispatch(ids.to(device), counts.to(device), backend=backend), ids, 20)


@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    phases=set(Phase) - {Phase.explain},
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    tokens=st.integers(0, 600),
    experts=st.integers(1, 70),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    masked=st.sampled_from([0.0, 0.3]),
)
def test_any_problem(device, tokens, experts, share, seed, masked):
    ids, counts = routing(tokens, experts, max(1, round(share * min(experts, 6))), seed, masked)
    plans = [plan_dispatch(ids.to(device), counts.to(device), backend=backend) for backend in BACKENDS]
    for plan in plans:
        check(plan, ids, experts)
    for name in FIELDS:
        assert torch.equal(*(getattr(plan, name) for plan in plans)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_ids_and_one_column(device, backend):
    ids, counts = routing(60, 7, 3)
    wide = torch.zeros(60, 6, dtype=torch.int64)
    wide[:, ::2] = ids
    check(plan_dispatch(wide.to(device)[:, ::2], counts.to(device), backend=backend), ids, 7)
    column = ids[:, :1]
    counts = column.flatten().bincount(minlength=8)[:7]
    check(plan_dispatch(column.to(device), counts.to(device), backend=backend), column, 7)


@needs_interpreter
@pytest.mark.parametrize("said", ["order", "offsets"])
def test_negative_controls_a_broken_sort_is_caught(kernels, monkeypatch, said):
    """Wrong counts are wrong offsets; a histogram that is not read is a wrong order, once there are several blocks."""
    ids, counts = routing(1500, 20, 2, masked=0.0)
    check(plan_dispatch(ids, counts, backend="triton"), ids, 20)
    if said == "offsets":
        counts = counts.flip(0).roll(1)
    else:

        class Broken:
            def __getitem__(self, grid):
                return lambda ids, histograms, *args, **kwargs: histograms.zero_()

        monkeypatch.setattr(kernels, "histogram_kernel", Broken())
    # Rows that no assignment claims keep the poison, so that the order differs in both cases.
    place, clamp = kernels.place_kernel, []

    class Safe:
        """Gives the rows room, as wrong ones may lie anywhere."""

        def __getitem__(self, grid):
            def launch(ids, counts, histograms, order, inverse, tokens, *rest, **constants):
                room = [torch.full((3 * len(t),), -77, dtype=torch.int32) for t in (order, tokens)]
                place[grid](ids, counts, histograms, room[0], inverse, room[1], *rest, **constants)
                order.copy_(room[0][: len(order)])
                tokens.copy_(room[1][: len(tokens)])
                clamp.append(room)

            return launch

    monkeypatch.setattr(kernels, "place_kernel", Safe())
    with pytest.raises(AssertionError, match="order"):
        check(plan_dispatch(ids, counts, backend="triton"), ids, 20)
    assert clamp


@pytest.mark.parametrize("backend", BACKENDS)
def test_operator_is_well_formed(backend):
    utils = ["test_schema", "test_faketensor"]
    if backend == "torch":
        utils.append("test_aot_dispatch_dynamic")
    args = (*routing(20, 6, 2), backend)
    torch.library.opcheck(torch.ops.lightning_mue.plan_dispatch.default, args, test_utils=utils)


def fields(plan):
    return plan.order, plan.inverse, plan.tokens, plan.offsets, plan.bags


def test_compiles_without_a_graph_break():
    ids, counts = routing(20, 6, 2)
    compiled = torch.compile(lambda i, c: fields(plan_dispatch(i, c)), fullgraph=True, backend="aot_eager")
    eager, ours = fields(plan_dispatch(ids, counts)), compiled(ids, counts)
    assert all(torch.equal(a, b) for a, b in zip(ours[:4], eager[:4], strict=True))


def test_on_the_meta_device():
    ids, counts = (t.to("meta") for t in routing(20, 6, 2))
    plan = plan_dispatch(ids, counts)
    assert [tuple(getattr(plan, name).shape) for name in FIELDS] == [(40,), (20, 2), (40,), (7,)]
    assert plan_expert_choice(ids, 20).bags.shape == (21,)


def test_what_is_refused():
    flat, matrix = torch.zeros(4, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expert_ids and counts_E: found shapes \[4\] and \[3\].*ids\[:, None\]"):
        plan_dispatch(flat, flat[:3])
    with pytest.raises(ValueError, match=r"found shapes \[2, 3\] and \[2, 3\].*sum counts"):
        plan_dispatch(matrix, matrix)
    with pytest.raises(ValueError, match=r"token_ids_EC: found shape \[4\], expected \[n_experts, capacity\]"):
        plan_expert_choice(flat, 4)


def choice(tokens, experts, capacity, unused, seed=0):
    """Each expert's tokens, all different, in random order; some places are empty."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(experts, tokens, generator=generator).argsort(1)[:, :capacity].contiguous()
    return ids.masked_fill(torch.rand(experts, capacity, generator=generator) < unused, -1)


@pytest.mark.parametrize("unused", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("size", [(20, 4, 5), (7, 3, 7), (1, 1, 1), (0, 3, 0), (9, 5, 0)], ids=str)
def test_expert_choice(size, unused):
    (tokens, experts, capacity), ids = size, choice(*size, unused)
    plan = plan_expert_choice(ids, tokens)
    used = [(e, c, t) for e, row in enumerate(ids.tolist()) for c, t in enumerate(row) if t >= 0]
    total = experts * capacity
    # Rows: the used places, in order.
    assert plan.offsets.tolist() == [sum(e < i for e, _, _ in used) for i in range(experts + 1)]
    assert plan.tokens[: len(used)].tolist() == [t for _, _, t in used]
    # Assignments: by token, then by expert.
    by_token = sorted(range(len(used)), key=lambda r: used[r][2])
    assert plan.inverse[: len(used)].tolist() == by_token
    assert plan.bags.tolist() == [sum(t < i for _, _, t in used) for i in range(tokens + 1)]
    # The two lists are each other's inverse, and unused places are the last of both.
    assert plan.order[plan.inverse].tolist() == list(range(total))
    assert plan.inverse[len(used) :].tolist() == list(range(len(used), total))
    assert ((plan.tokens >= 0) & (plan.tokens < max(tokens, 1))).all()
    assert all(getattr(plan, name).dtype == torch.int32 for name in (*FIELDS, "bags"))
    if not unused:  # values of places in the order of the assignments
        values = torch.randn(experts, capacity)
        expected = [values[used[r][0], used[r][1]].item() for r in by_token]
        assert values.flatten()[plan.inverse].tolist() == expected


def test_expert_choice_compiles_without_a_graph_break():
    ids = choice(20, 4, 5, 0.3)
    compiled = torch.compile(lambda i: fields(plan_expert_choice(i, 20)), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(ids), fields(plan_expert_choice(ids, 20)), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_large_problem_on_a_device():
    ids, counts = (t.cuda() for t in routing(32768, 128, 8))
    ours, twin = (plan_dispatch(ids, counts, backend=backend) for backend in ("triton", "torch"))
    assert all(torch.equal(getattr(ours, name), getattr(twin, name)) for name in FIELDS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_is_captured_into_a_graph():
    ids, counts = (t.cuda() for t in routing(4096, 64, 4))
    plan_dispatch(ids, counts)
    choice_of_experts = choice(4096, 64, 256, 0.1).cuda()
    plan_expert_choice(choice_of_experts, 4096)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, by_expert = plan_dispatch(ids, counts), plan_expert_choice(choice_of_experts, 4096)
    graph.replay()
    assert torch.equal(captured.order, plan_dispatch(ids, counts).order)
    assert torch.equal(by_expert.order, plan_expert_choice(choice_of_experts, 4096).order)
