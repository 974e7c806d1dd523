"""The Triton kernels of routing against their twin: on a device where there is one, else in the interpreter."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.routing_cases import CASES, Case, check, close, gradient, run, tensors
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mue.kernels import backends
from lightning_mue.kernels.routing.op import GATES, SCORINGS, Settings

#: Both compute in float32; the kernel's sums and exponentials differ in the last bits.
VALUES, GRADIENTS = 1e-6, 3e-6

needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="replaces parts of the kernel in the interpreter"
)


def with_backward(kernels):
    """triton_backward.py, as triton.py was loaded with it."""
    return sys.modules[kernels.backward.__module__]


@pytest.fixture
def kernels(triton_routing, monkeypatch):
    """Every buffer that a kernel is given to fill is poisoned; "triton" is accepted in the interpreter."""
    empty = triton_routing.new_empty

    def poisoned(like, *shape, dtype=None):
        out = empty(like, *shape, dtype=dtype)
        return out.fill_(torch.nan if out.is_floating_point() else -77)

    for module in (triton_routing, with_backward(triton_routing)):
        monkeypatch.setattr(module, "new_empty", poisoned)
    monkeypatch.setattr(backends, "_interpreted", lambda x: True)
    return triton_routing


def compare(case, device, seed=0, slack=1):
    logits, bias, mask = (None if t is None else t.to(device) for t in tensors(case, seed=seed))
    results = []
    for backend in ("triton", "torch"):
        x = logits.clone().requires_grad_()
        routed = run(case, x, bias, mask, backend)
        results.append((routed, gradient(routed, x)))
    (ours, our_gradient), (twin, gradient_of_twin) = results
    scale = slack * (30 if case.kind == "wide" else 1)
    check(ours, twin, scale * VALUES)
    close(our_gradient, gradient_of_twin, scale * GRADIENTS, "gradient")


#: Every scoring and gate with a mask, a bias and groups; of the other sizes one each, in turn.
FEW = [c for c in CASES if c.biased] + [c for i, c in enumerate(CASES) if i % 9 == 0 and not c.biased]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_equals_the_twin(kernels, device, case):
    compare(case, device)


@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=set(Phase) - {Phase.explain},
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_problem(kernels, device, data):
    draw = data.draw
    groups = draw(st.integers(1, 4), "groups")
    size = draw(st.integers(1, 12), "experts a group")
    each = draw(st.integers(1, min(size, 4)), "active a group")
    sequences = draw(st.integers(1, 3), "sequences")
    case = Case(
        sequences * draw(st.integers(0, 50), "length"),
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
    compare(case, device, draw(st.integers(0, 99), "seed"))


@pytest.mark.parametrize(
    "case",
    [
        Case(300, 64, 4, n_sequences=2, masked=True),  # several programs a sequence
        Case(900, 5, 2, n_sequences=3, biased=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("programs", [1, 4, 396])
def test_blocks_steps_and_parts(kernels, device, monkeypatch, case, programs):
    """The same whether a program takes one block of tokens or many."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    compare(case, device)


def test_many_experts(kernels, device):
    compare(Case(5, 1000, 36, "sigmoid-normalized", "sqrt", n_groups=4), device)


def test_how_work_is_cut(kernels):
    for length in (1, 7, 100, 4096, 32768):
        for sequences in (1, 3, 64):
            for block in (1, 16, 128):
                steps, programs = kernels._cut(length, sequences, block)
                assert steps * programs * block >= length
                assert steps * (programs - 1) * block < length  # none is idle
                assert programs * sequences <= max(kernels.PROGRAMS + sequences, sequences)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_nan_infinite_and_signed_zeros(kernels, device, scoring, biased):
    def change(logits):
        logits[1] = torch.nan
        logits[2, 5] = torch.nan
        logits[3, ::2] = -torch.inf
        logits[4] = 0.0
        logits[4, ::3] = -0.0
        logits[5, 2] = 1e-45
        return logits

    case = Case(12, 8, 4, scoring, biased=biased)
    logits, bias, _ = (None if t is None else t.to(device) for t in tensors(case))
    x = change(logits)
    ours, twin = (run(case, x, bias, None, backend) for backend in ("triton", "torch"))
    assert torch.equal(ours.expert_ids, twin.expert_ids)
    assert torch.equal(ours.gates.isnan(), twin.gates.isnan())
    assert ours.gates.isnan().any(1).tolist() == [t in (1, 2) for t in range(12)]
    close(ours.gates.nan_to_num(), twin.gates.nan_to_num(), VALUES, "gates")
    assert torch.equal(ours.counts, twin.counts)
    assert ours.expert_ids[4].tolist() == twin.expert_ids[4].tolist()
    if not biased:
        assert ours.expert_ids[4].tolist() == [0, 1, 2, 3]  # both zeros are equal
        assert ours.expert_ids[1].tolist() == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy, in the interpreter
def test_padding_may_hold_anything(kernels, device):
    case = Case(40, 8, 4, n_sequences=2, masked=True)
    logits, bias, mask = (t.to(device) for t in tensors(case))
    results = []
    for filler in (0.0, torch.nan, torch.inf):
        x = logits.masked_fill(~mask[:, None], filler).requires_grad_()
        routed = run(case, x, bias, mask, "triton")
        results.append((*routed, gradient(routed, x)))
        assert (results[-1][-1][~mask] == 0).all()
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other, results[0], strict=True))


def test_repeats_bit_by_bit(kernels, device):
    case = Case(500, 24, 3, biased=True)
    logits, bias, _ = (None if t is None else t.to(device) for t in tensors(case))
    first, second = (run(case, logits, bias, None, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class NoHost(TorchDispatchMode):
    """Refuses what waits for the device, and remembers what ran."""

    def __init__(self):
        super().__init__()
        self.ran = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.ran.add(name)
        if "_local_scalar_dense" in name or "nonzero" in name or "_to_copy" in name or "is_nonzero" in name:
            raise RuntimeError(f"host synchronization: {name}")
        return func(*args, **(kwargs or {}))


def within(mode, logits, bias, mask, case, kernels):
    """The implementation itself, forward and backward: an operator would hide from the mode what it calls."""
    s = Settings(**case.settings)
    with mode:
        gates, ids, _, p, z, log_sum = kernels.forward(logits, bias, mask, s)
        kernels.backward(gates, p, z, logits, ids, gates, log_sum, mask, s)


@needs_interpreter
def test_nothing_goes_to_the_host(kernels, monkeypatch):
    from lightning_mue.kernels.routing import host

    case = Case(masked=True, biased=True, n_sequences=2)
    args = (*tensors(case), case)
    # The interpreter itself reads its tensors: launches do nothing here, only what surrounds them is watched.
    launches = []

    class Silent:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append(grid)

    for name in ("route_kernel", "sum_parts_kernel", "route_backward_kernel"):
        monkeypatch.setattr(with_backward(kernels) if "backward" in name else kernels, name, Silent())
    within(NoHost(), *args, kernels)
    assert len(launches) == 3
    with pytest.raises(RuntimeError, match="host synchronization"):  # negative control
        within(NoHost(), *args, host)


def test_operator_is_well_formed(kernels, device):
    case = Case(20, 6, 2, masked=True)
    logits, bias, mask = (t.to(device) for t in tensors(case))
    values = (case.top_k, case.scoring, case.gate, case.n_groups, case.n_sequences, "triton")
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        torch.ops.lightning_mue.route.default, (logits.requires_grad_(), bias, mask, *values), test_utils=utils
    )


@needs_interpreter
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("_keys", "ids"),
        ("_choose", "ids|counts"),
        ("_log_gates", "gates"),
        ("_sigmoid", "gradient"),
        ("_cut", "ids|counts|nan"),
    ],
)
def test_negative_controls_a_broken_kernel_is_caught(kernels, monkeypatch, device, part, said):
    whole = getattr(kernels, part)

    def keys(score, e, *constants):  # of equal scores the last index
        return whole(score, constants[1] - 1 - e, *constants)

    def choose(*args):  # groups are not closed
        return whole(*args[:-1], args[-4])

    def log_gates(chosen, log_sum, *rest):
        return whole(chosen * 1.00001, log_sum, *rest)

    def sigmoid(x):
        return whole(x) * 1.0001

    def cut(length, sequences, block):
        steps, programs = whole(length, sequences, block)
        return steps, max(1, programs - 1)

    broken = {"_keys": keys, "_choose": choose, "_log_gates": log_gates, "_sigmoid": sigmoid, "_cut": cut}
    cases = {
        "_keys": Case(20, 8, 2, kind="quantized"),
        "_choose": Case(20, 8, 4, n_groups=4),
        "_cut": Case(300, 8, 2),
    }
    case = cases.get(part, Case(20, 8, 2, "sigmoid"))
    compare(case, device)
    for module in (kernels, with_backward(kernels)):
        monkeypatch.setattr(module, part, broken[part], raising=module is kernels)
    with pytest.raises(AssertionError, match=said):
        compare(case, device)


COMPILE = """
import itertools, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lightning_mue.kernels.dispatch import triton as dispatch
from lightning_mue.kernels.routing import triton as routing, triton_backward, triton_functions

INTEGERS = {"ids_ptr": "i64", "mask_ptr": "u8", "counts_out": "i64"} | dict.fromkeys(
    ("counts_ptr", "histograms_ptr", "order_ptr", "inverse_ptr", "tokens_ptr", "offsets_ptr"), "i32")

def ptx(kernel, **constants):
    names = kernel.arg_names
    types = {n: "constexpr" if n in constants else "*" + INTEGERS.get(n, "fp32") if "_ptr" in n or "_out" in n else "i32"
             for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if types[n].startswith("*")}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in constants.items()}, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]

texts = []
for (E, K, G), sigmoid, over in [((8, 2, 1), True, True), ((96, 6, 3), False, False), ((128, 8, 1), False, True)]:
    up = triton.next_power_of_2
    shared = {"E": E, "EP": up(E), "K": K, "KP": up(K), "SIGMOID": sigmoid, "OVER_SET": over, "SQRT": sigmoid,
              "HAS_MASK": not sigmoid, "BT": min(128, triton_functions.TILE // up(E))}
    texts += [
        ptx(routing.route_kernel, SIZE=E // G, EACH=K // G, **shared),
        ptx(triton_backward.route_backward_kernel, HAS_DGATES=True, HAS_DPROBABILITY=True, HAS_DZ=sigmoid, **shared),
        ptx(routing.sum_parts_kernel, E=E, BE=min(32, up(E)), BP=32),
        ptx(dispatch.histogram_kernel, E=E, EP=up(E), BLOCK=1024, ROWS=min(64, 4096 // up(E))),
        ptx(dispatch.place_kernel, K=K, E=E, EP=up(E), BLOCK=1024, ROWS=min(64, 4096 // up(E))),
    ]
assert all(".target sm_90" in text for text in texts)
print(len(texts), sum(len(re.findall(r"\\\\b(?:atom|red)\\\\.", text)) for text in texts))
"""


@pytest.mark.slow
def test_compiles_for_hopper_without_atomics():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True)
    if "no attribute" in done.stderr or "ImportError" in done.stderr:
        pytest.skip(f"this Triton cannot compile without a device: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["15", "0"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [Case(32768, 128, 8), Case(4096, 64, 2, n_sequences=4), Case(1000, 1024, 32)], ids=str)
def test_large_problems_on_a_device(case):
    compare(case, "cuda", slack=5)  # a device's exponentials are off by two units, and sums are long


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_is_captured_into_a_graph():
    case = Case(4096, 64, 4, masked=True)
    logits, bias, mask = (t.cuda() for t in tensors(case))
    logits.requires_grad_()

    def step():
        routed = run(case, logits, bias, mask, "triton")
        return (*routed, gradient_of(routed, logits))

    def gradient_of(routed, x):
        return torch.autograd.grad(routed.gates.sum() + routed.z_sum.sum() + routed.probability_sum[0, 0], x)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        logits.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
