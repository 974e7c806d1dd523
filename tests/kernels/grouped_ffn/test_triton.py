"""The experts' Triton kernels against a float64 loop: on a device where there is one, else in the interpreter."""

from __future__ import annotations

import sys

import pytest
import torch
from helpers import experts
from helpers.triton_kernels import part_of_experts

from lightning_mue.kernels.dispatch.op import DispatchPlan
from lightning_mue.kernels.grouped_ffn.op import grouped_ffn

Case = experts.Case

#: Norm-wise. float32: about a hundred roundings. bfloat16: operands and three intermediates are rounded to
#: 8 bits (the interpreter cuts off, twice as much). float16: the same with 11 bits.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TILES = {"small": (16, 16, 16), "tall": (32, 16, 16), "wide": (16, 32, 32)}  # the interpreter is slow: mostly "wide"

CASES = [
    Case(9, 20, 24, 4, 2),
    Case(9, 20, 24, 4, 2, "geglu"),
    Case(9, 20, 24, 4, 2, "geglu-tanh"),
    Case(9, 20, 24, 4, 2, "gelu"),
    Case(9, 20, 24, 4, 2, "gelu-tanh"),
    Case(9, 20, 24, 4, 2, "relu2"),
    Case(9, 20, 24, 4, 2, "relu"),
    Case(8, 16, 16, 3, 1, "swiglu", True),
    Case(8, 16, 16, 3, 1, "geglu", True),
    Case(8, 16, 16, 3, 1, "geglu-tanh", True),
    Case(8, 16, 16, 3, 1, "gelu", True),
    Case(8, 16, 16, 3, 1, "gelu-tanh", True),
    Case(8, 16, 16, 3, 1, "relu2", True),
    Case(5, 32, 48, 2, 2),  # top_k = E
    Case(7, 17, 33, 3, 3, "gelu"),
    Case(20, 16, 16, 1, 1),  # E = 1
    Case(17, 18, 9, 1, 1, "relu2", True),
    Case(1, 20, 12, 4, 2),  # 1 token
    Case(1, 1, 1, 1, 1),
    Case(1, 3, 2, 2, 1, "gelu"),
    Case(0, 20, 12, 4, 2),  # 0 tokens
    Case(0, 20, 12, 4, 2, "gelu", True),
    Case(3, 20, 24, 6, 1),  # more experts than rows: empty ones
    Case(2, 16, 32, 9, 1, "relu2", True),
    Case(37, 20, 24, 4, 1, routing="one"),  # all on one expert
    Case(9, 33, 16, 3, 2, "geglu", True, routing="one"),
    Case(34, 16, 16, 2, 1, routing="one"),
    Case(12, 20, 24, 4, 2, routing="masked"),
    Case(12, 20, 24, 4, 2, "gelu", True, routing="masked"),
    Case(10, 17, 19, 3, 2, "relu2", routing="masked"),
    Case(4, 20, 24, 4, 2, routing="none"),
    Case(12, 20, 24, 4, 3, bags=True),
    Case(12, 20, 24, 4, 3, "gelu", True, bags=True),
    Case(8, 16, 16, 4, 4, "geglu-tanh", bags=True, routing="masked"),
    Case(4, 16, 16, 4, 2, bags=True, routing="none"),
    Case(10, 24, 20, 3, 2, layout="columns"),
    Case(10, 24, 20, 3, 2, "gelu", True, layout="cut out"),
    Case(10, 16, 32, 3, 2, layout="cut out"),
    Case(10, 16, 32, 3, 2, "relu2", layout="columns"),
    Case(6, 5, 70, 2, 1),
    Case(6, 70, 5, 2, 1),
    Case(1, 16, 16, 18, 17),  # more rows a token than are unrolled
    Case(11, 31, 29, 3, 2, "geglu", True),
]


def name_of(case):
    words = [f"{case.tokens}x{case.d}x{case.h}-{case.experts}-{case.top_k}", case.activation]
    words += [case.routing] * (case.routing != "any") + [case.layout] * (case.layout != "rows")
    return "-".join(words + ["bias"] * case.bias + ["bags"] * case.bags)


def small(module, monkeypatch, tile="wide", chunk=16, **options):
    """Small tiles and chunks, so that a small problem has many of each."""
    sizes = dict(zip(("rows", "cols", "inner"), TILES[tile], strict=True))
    tiling = sys.modules[module.ExpertTiling.__module__].ExpertTiling(
        **{"stages": 2, "warps": 4, "group": 2, **sizes, **options}
    )
    monkeypatch.setattr(module, "launch_chosen", lambda key, run: run(tiling))
    weights = sys.modules[module.launch_weights.__module__]
    monkeypatch.setattr(weights, "chunk_size", lambda rows, tiles, device: chunk)


@pytest.fixture(autouse=True)
def _no_overflow_checks(triton_experts, monkeypatch):
    """They take a third of the interpreter's time. `test_int64_where_rows_lie_far_apart` sees to what they look for."""
    from triton.runtime import interpreter

    monkeypatch.setattr(
        interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False)
    )


@pytest.fixture
def poisoned(triton_experts, monkeypatch):
    """Results and buffers start as NaN: what is not written shows, and so does what should not be read."""
    names = ("combine", "up", "rows", "hidden", "weights", "experts")

    def new_empty(like, *shape, dtype=None):
        out = like.new_empty(shape, dtype=dtype)
        return out.fill_(torch.nan) if out.is_floating_point() else out.zero_()

    for name in names:
        module = part_of_experts(name)
        monkeypatch.setattr(module, "new_empty", new_empty, raising=False)
        monkeypatch.setattr(module, "new_like", lambda like: torch.full_like(like, torch.nan), raising=False)


def results(module, made, weights=True):
    """y and all gradients, as the operators give them."""
    y, z = module.forward(made.problem, True)
    return [y, *module.backward(made.problem, made.dy, z, weights)]


def check(module, made):
    found, exact = results(module, made), experts.reference(made)
    assert len(found) == len(exact)
    for t, like in zip(found[1:], made.problem.trained, strict=True):
        assert t.dtype == like.dtype
        assert t.stride() == torch.empty_like(like).stride(), "not as the fake implementation promises"
    errors = [experts.error(a, b) for a, b in zip(found, exact, strict=True)]
    assert max(errors) <= TOLERANCES[made.problem.x.dtype], errors


#: Neighbours of cases that every run sees: with the slow tests only, as the interpreter takes about a second for each.
RARE = (4, 8, 10, 13, 15, 18, 22, 24, 28, 32, 36, 38, 40, 41)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] * (i in RARE), id=name_of(c)) for i, c in enumerate(CASES)]
)
def test_equals_a_loop_in_float64(triton_experts, poisoned, monkeypatch, device, case):
    seed = CASES.index(case)
    small(triton_experts, monkeypatch, "wide" if seed % 4 else "small", waves=seed % 2)
    check(triton_experts, experts.make(case, seed, device=device))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [(CASES[i], torch.bfloat16) for i in (0, 26, 31)] + [(CASES[7], torch.float16)],
)
def test_equals_a_loop_in_float64_in_half(triton_experts, poisoned, monkeypatch, device, case, dtype):
    small(triton_experts, monkeypatch)
    check(triton_experts, experts.make(case, 3, dtype, device))


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(9, 32, 16, 2, 2), torch.bfloat16),
        pytest.param(Case(9, 24, 40, 2, 1, "gelu"), torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(Case(9, 20, 24, 2, 1), torch.float32, marks=pytest.mark.slow),
        pytest.param(Case(9, 20, 24, 2, 1, "geglu"), torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_loads_by_the_copy_engine_are_the_same(triton_experts, poisoned, monkeypatch, device, case, dtype):
    made = experts.make(case, 5, dtype, device)
    small(triton_experts, monkeypatch, "small")
    by_pointers = results(triton_experts, made)
    launching = sys.modules["lightning_mue.kernels.triton_tools.launching"]
    taken = []
    describe = launching.describe
    for name in ("tuning", "rows"):
        module = part_of_experts(name)
        monkeypatch.setattr(module, "describe", lambda *args: taken.append(describe(*args)) or taken[-1])
    small(triton_experts, monkeypatch, "small", described=True)
    found = results(triton_experts, made)
    # bfloat16 rows of 20 elements are not aligned to 16 bytes: there it falls back to pointers. 24 and up are.
    assert any(t is not None for t in taken)
    assert all(torch.equal(a, b) for a, b in zip(found, by_pointers, strict=True))


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_weight_gradients_of_whole_blocks_and_a_rest(triton_experts, poisoned, monkeypatch, device, activation):
    """Chunks of about 40 rows in blocks of 16: two are summed without masks, 8 rows with."""
    small(triton_experts, monkeypatch, tile="small", chunk=64)
    check(triton_experts, experts.make(Case(120, 16, 16, 3, 1, activation), 0, device=device))


def test_no_weight_gradients_if_none_are_wanted(triton_experts, monkeypatch, device):
    small(triton_experts, monkeypatch)
    made = experts.make(CASES[6], 1, device=device)
    whole = results(triton_experts, made)
    found = results(triton_experts, made, weights=False)
    assert len(found) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, whole[:3], strict=True))


def test_through_the_operator(triton_experts, monkeypatch, device):
    """What a user calls, by autograd: gradients for what asks for them, and nothing kept where nothing does."""
    small(triton_experts, monkeypatch)
    made = experts.make(Case(6, 16, 16, 2, 1, "geglu", True), 10, device=device)
    exact, p = experts.reference(made), made.problem
    plan = DispatchPlan(p.order, p.inverse, p.tokens, p.offsets)
    weights = {"w_gate": p.w_gate, "b_gate": p.b_gate, "b_up": p.b_up, "activation": p.activation, "backend": "triton"}
    x, w_down = p.x.clone().requires_grad_(), p.w_down.clone().requires_grad_()
    y = grouped_ffn(x, p.gates, p.w_up, w_down, plan, **weights)
    found = [y, *torch.autograd.grad(y, [x, w_down], made.dy)]
    assert max(experts.error(a, exact[i]) for i, a in zip((0, 1, 5), found, strict=True)) <= 1e-5
    kept = []
    monkeypatch.setattr(
        triton_experts, "forward", lambda p, keep, f=triton_experts.forward: kept.append(keep) or f(p, keep)
    )
    assert torch.equal(grouped_ffn(p.x, p.gates, p.w_up, p.w_down, plan, **weights), y)
    assert kept == [False]


def test_the_same_bits_every_time(triton_experts, monkeypatch, device):
    small(triton_experts, monkeypatch)
    made = experts.make(Case(20, 20, 24, 2, 1, bias=True), 2, device=device)
    first, second = results(triton_experts, made), results(triton_experts, made)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_permuting_tokens_permutes_the_output_exactly(triton_experts, monkeypatch, device):
    small(triton_experts, monkeypatch)
    case = Case(14, 20, 24, 3, 2)
    made = experts.make(case, 4, device=device)
    y, dx, dgates, *_ = results(triton_experts, made)
    new = torch.randperm(case.tokens, generator=torch.Generator().manual_seed(0))
    expert_of = torch.tensor(made.expert_of).view(case.tokens, -1)[new].flatten()
    plan = experts.plan_of(torch.arange(case.tokens).repeat_interleave(case.top_k), expert_of, case)
    p = made.problem
    plan = {name: None if t is None else t.to(device) for name, t in vars(plan).items()}
    moved = made._replace(problem=p._replace(x=p.x[new], gates=p.gates[new], **plan), dy=made.dy[new])
    for found, before in zip(results(triton_experts, moved), (y, dx, dgates), strict=False):
        assert torch.equal(found, before[new])


def test_permuting_experts_changes_nothing(triton_experts, monkeypatch, device):
    small(triton_experts, monkeypatch)
    case = Case(9, 20, 24, 4, 1, bias=True)
    made = experts.make(case, 6, device=device)
    p, new = made.problem, torch.tensor([2, 0, 3, 1])
    old_to_new = new.argsort()
    expert_of = old_to_new[torch.tensor(made.expert_of)]
    plan = vars(experts.plan_of(torch.tensor(made.token_of), expert_of, case))
    plan = {name: None if t is None else t.to(device) for name, t in plan.items()}
    weights = {n: getattr(p, n)[new] for n in ("w_gate", "w_up", "w_down", "b_gate", "b_up")}
    moved = made._replace(problem=p._replace(**plan, **weights))
    before, found = results(triton_experts, made), results(triton_experts, moved)
    for i, (a, b) in enumerate(zip(found, before, strict=True)):
        assert torch.equal(a, b if i < 3 else b[new])


def test_rows_of_no_expert_may_hold_anything(triton_experts, monkeypatch, device):
    """Their z is not written, and what lies there, NaN, is not read; nor are gates of theirs."""
    small(triton_experts, monkeypatch)
    made = experts.make(Case(12, 20, 24, 4, 2, bias=True, routing="masked"), 7, device=device)
    exact = experts.reference(made)
    p = made.problem
    stray = p.inverse >= p.offsets[-1]
    assert stray.any()
    made = made._replace(problem=p._replace(gates=p.gates.masked_fill(stray, torch.nan)))
    y, z = triton_experts.forward(made.problem, True)
    z[:, int(p.offsets[-1]) :] = torch.nan
    found = [y, *triton_experts.backward(made.problem, made.dy, z, True)]
    assert max(experts.error(a, b) for a, b in zip(found, exact, strict=True)) <= 1e-5


def test_int64_where_rows_lie_far_apart(triton_experts, monkeypatch, device):
    """Rows of x and experts' matrices beyond 2^31 elements, in memory that is reserved but, between them, never touched."""
    small(triton_experts, monkeypatch)
    made = experts.make(Case(6, 16, 16, 3, 2), 8, torch.bfloat16, device)
    near = results(triton_experts, made)
    p = made.problem

    def far_apart(t, stride):
        far = t.new_empty(stride * (len(t) - 1) + t[0].numel())
        view = far.as_strided(t.shape, (stride, *t.stride()[1:]))
        return view.copy_(t)

    far = p._replace(
        x=far_apart(p.x, 2**29 + 16), w_up=far_apart(p.w_up, 2**30 + 16), w_down=far_apart(p.w_down, 2**30 + 16)
    )
    y, z = triton_experts.forward(far, True)
    grads = triton_experts.backward(far, made.dy, z, False)
    assert all(torch.equal(a, b) for a, b in zip([y, *grads], near, strict=False))


needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="replaces parts of kernels in the interpreter")


@needs_interpreter
@pytest.mark.parametrize("part", ["slope", "last tile", "chunks", "gates", "mask"])
def test_negative_controls_a_broken_kernel_is_caught(triton_experts, poisoned, monkeypatch, part):
    small(triton_experts, monkeypatch, "small")
    made = experts.make(Case(20, 16, 24, 1, 1, routing="masked" if part == "mask" else "any"), 9)
    check(triton_experts, made)
    modules = {n: part_of_experts(n) for n in ("hidden", "up", "tile_map")}
    if part == "slope":
        whole = modules["hidden"].function_and_slope
        monkeypatch.setattr(modules["hidden"], "function_and_slope", lambda z, a: (whole(z, a)[0], whole(z, a)[0]))
    elif part == "last tile":
        place, language = modules["up"].place_of, modules["tile_map"].tl

        def no_last_column(tile, row_tiles, col_tiles, group):
            row, col = place(tile, row_tiles, col_tiles, group)
            return row, language.minimum(col, col_tiles - 2)

        monkeypatch.setattr(modules["up"], "place_of", no_last_column)
    elif part == "chunks":
        weights = sys.modules[triton_experts.launch_weights.__module__]
        monkeypatch.setattr(weights, "add_chunks_kernel", {(n,): lambda *args, **kwargs: None for n in range(10_000)})
    elif part == "gates":
        monkeypatch.setattr(
            triton_experts, "launch_combine", lambda *a, f=triton_experts.launch_combine: f(*a[:4], None, a[5])
        )
    else:
        made.problem.offsets[-1] += 1  # one row of no expert is taken for the last expert's
    with pytest.raises(AssertionError):
        check(triton_experts, made)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_any_shape(triton_experts, poisoned, monkeypatch, device, seed):
    """A wide sweep at random, with the tilings that users get."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    def one_of(options):
        return list(options)[draw(0, len(options) - 1)]

    for _ in range(10):
        e = draw(1, 7)
        routing, layout = one_of(["any", "any", "one", "masked"]), one_of(["rows", "columns", "cut out"])
        case = Case(
            draw(0, 60),
            draw(1, 90),
            draw(1, 90),
            e,
            draw(1, e),
            one_of(experts.FUNCTIONS),
            bool(draw(0, 1)),
            routing,
            bool(draw(0, 1)),
            layout,
        )
        made = experts.make(case, draw(0, 2**20), one_of(TOLERANCES), device)
        with monkeypatch.context() as patch:
            if draw(0, 1):
                tile, chunk = one_of(TILES), one_of([16, 40])
                small(triton_experts, patch, tile, chunk, waves=draw(0, 2), described=bool(draw(0, 1)))
            check(triton_experts, made)
