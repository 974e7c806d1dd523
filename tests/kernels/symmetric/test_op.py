"""symmetric_matmul: its twin in PyTorch, what it accepts, and that the kernel is reached as an operator."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_mue.kernels.symmetric import op as symmetric
from lightning_mue.kernels.symmetric.op import symmetric_matmul, symmetric_matmul_torch
from lightning_mue.optim import orthogonalize


def batch(n=12, k=20, dtype=torch.float32, device="cpu", seed=0):
    """a, a.mT and a symmetric c."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(3, n, k, generator=generator).to(device, dtype)
    c = torch.randn(3, n, n, generator=generator).to(device, dtype)
    return a, a.mT, c + c.mT


@pytest.fixture
def with_kernel(triton_symmetric, monkeypatch, device):
    """symmetric_matmul takes the kernel, on a device or in the interpreter, and does not time it."""
    monkeypatch.setattr(symmetric, "kernel_fits", lambda a: True)
    monkeypatch.setenv("LIGHTNING_MUE_AUTOTUNE", "0")
    return triton_symmetric


# Norm of the error over the norm of the result: half a unit in the last place each, about; a whole one for bfloat16 in the
# interpreter, which cuts it off.
ERRORS = {torch.float64: 1e-15, torch.float32: 5e-7, torch.bfloat16: 6e-3, torch.float16: 6e-4}


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("function", [symmetric_matmul, symmetric_matmul_torch])
def test_product_on_the_cpu(function, dtype):
    a, b, c = batch(dtype=dtype)
    exact = -0.5 * c.double() + 2 * a.double() @ b.double()
    result = function(a, b, c, alpha=2.0, beta=-0.5)
    assert result.dtype == dtype
    assert (result.double() - exact).norm() <= ERRORS[dtype] * exact.norm()
    assert not torch.allclose(result.double(), exact.mT + c.double())
    # In a product of commuting matrices the factors are not each other's transpose.
    power = function(c, function(c, c))
    exact = torch.linalg.matrix_power(c.double(), 3)
    assert (power.double() - exact).norm() <= 3 * ERRORS[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize(("n", "k"), [(128, 20), (300, 40), (257, 7)])
def test_large_products_on_the_cpu_go_by_blocks(monkeypatch, dtype, n, k):
    monkeypatch.setattr(symmetric, "_pays_in_blocks", lambda a: True)
    a, b, c = batch(n, k, dtype)
    out = torch.full((3, n, 2 * n), torch.nan, dtype=dtype)[:, :, ::2]
    with torch.autocast("cpu", torch.bfloat16):
        assert symmetric_matmul(a, b, alpha=-0.5, out=out) is out
    exact = -0.5 * a.double() @ b.double()
    assert (out.double() - exact).norm() <= ERRORS[dtype] * exact.norm()
    blocks = torch.arange(n) // symmetric._BLOCK_ROWS
    mirrored = blocks[:, None] != blocks
    assert torch.equal(out[:, mirrored], out.mT[:, mirrored])
    # Of a product that is not symmetric the lower triangle counts.
    other = torch.randn(3, k, n).to(dtype)
    ours, full = symmetric_matmul(a, other), symmetric_matmul_torch(a, other)
    lower = blocks[:, None] >= blocks
    assert (ours - full)[:, lower].double().norm() <= 2 * ERRORS[dtype] * full.double().norm()
    assert not mirrored.any() or (ours - full)[:, ~lower].double().norm() > 0.1 * full.double().norm()
    assert torch.equal(symmetric_matmul(a, b, c, beta=1.0), symmetric_matmul_torch(a, b, c, beta=1.0))


def test_blocks_pay_for_large_matrices_only():
    def pays(n, k, dtype):
        return symmetric._pays_in_blocks(torch.empty(1, n, k, dtype=dtype, device="meta"))

    large = [(512, 1408, torch.bfloat16), (512, 512, torch.bfloat16), (512, 512, torch.float32)]
    assert all(pays(*case) for case in large)
    assert not any(
        pays(*case) for case in [(256, 512, torch.bfloat16), (512, 256, torch.bfloat16), (64, 1 << 20, torch.float32)]
    )


@pytest.mark.parametrize("dtype", symmetric._KERNEL_DTYPES)
def test_kernel_and_twin_agree(with_kernel, device, dtype):
    a, b, c = batch(dtype=dtype, device=device)
    out = torch.full((3, 12, 24), torch.nan, dtype=dtype, device=device)[:, :, ::2]
    kernel = symmetric_matmul(a, b, c, alpha=2.0, beta=-0.5, out=out)
    twin = symmetric_matmul_torch(a, b, c, alpha=2.0, beta=-0.5)
    assert kernel is out
    assert torch.equal(kernel, kernel.mT)
    assert (kernel - twin).double().norm() <= 2 * ERRORS[dtype] * twin.double().norm()
    # Only the kernel makes a product symmetric that is not, from its lower half: so it ran.
    skew = torch.randn(3, 20, 12, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    lopsided = symmetric_matmul(a, skew)
    assert torch.equal(lopsided, lopsided.mT)
    exact = (a.double() @ skew.double()).tril()
    assert (lopsided.tril().double() - exact).norm() <= 2 * ERRORS[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_c_is_not_read_with_beta_zero(dtype):
    a, b, c = batch(dtype=dtype)
    assert torch.equal(symmetric_matmul(a, b, torch.full_like(c, torch.nan)), symmetric_matmul(a, b))
    assert torch.equal(symmetric_matmul(a, b, out=torch.full_like(c, torch.nan)), symmetric_matmul(a, b))
    assert symmetric_matmul(a, b, torch.full_like(c, torch.nan), beta=1.0).isnan().all()


def test_kernel_does_not_read_c_with_beta_zero(with_kernel, device):
    a, b, c = batch(device=device)
    assert torch.equal(symmetric_matmul(a, b, torch.full_like(c, torch.nan)), symmetric_matmul(a, b))


def test_out_is_returned_and_autocast_changes_nothing():
    a, b, c = batch()
    expected = symmetric_matmul(a, b, c, beta=1.0)
    out = torch.full((3, 12, 30), torch.nan)[:, :, 5:17]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert symmetric_matmul(a, b, c, beta=1.0, out=out) is out
        assert symmetric_matmul(a, b, c, beta=1.0).dtype == torch.float32
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 0, 5)])
def test_empty(shape):
    a = torch.zeros(shape)
    assert symmetric_matmul(a, a.mT).shape == (shape[0], shape[1], shape[1])


def test_no_inner_dimension_leaves_beta_c():
    c = batch()[2]
    a = torch.zeros(3, 12, 0)
    assert torch.equal(symmetric_matmul(a, a.mT, c, beta=2.0), 2 * c)
    assert torch.equal(symmetric_matmul(a, a.mT), torch.zeros(3, 12, 12))


A, B, C = batch()
BUFFER = torch.zeros(5, 12, 12)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "words"),
    [
        ((A[0], B[0]), {}, ValueError, r"a and b: found shapes \[12, 20\].*\[B, n, k\].*unsqueeze"),
        ((A, A), {}, ValueError, r"\[3, 12, 20\] and \[3, 12, 20\]"),
        ((A, B[:2]), {}, ValueError, r"\[2, 20, 12\]"),
        ((A, B[..., :7]), {}, ValueError, r"\[3, 20, 7\]"),
        ((A, B, C[:, :5]), {"beta": 1.0}, ValueError, r"c: found shape \[3, 5, 12\], expected shape \[3, 12, 12\]"),
        ((A, B), {"beta": 1.0}, ValueError, "c: found None, expected a tensor, for beta is 1.0"),
        ((A, B), {"out": BUFFER}, ValueError, r"out: found shape \[5, 12, 12\], expected shape \[3, 12, 12\]"),
        ((A, B.double()), {}, TypeError, "b: found torch.float64 .*expected torch.float32"),
        ((A, B, C.bfloat16()), {"beta": 1.0}, TypeError, "c: found torch.bfloat16 .*expected torch.float32"),
        ((A, B), {"out": C.to("meta")}, TypeError, "out: found torch.float32 on meta, expected torch.float32 on cpu"),
        ((A.int(), B.int()), {}, TypeError, "a: found torch.int32, expected real floating point"),
        ((A.cfloat(), B.cfloat()), {}, TypeError, "a: found torch.complex64, expected real floating point"),
        ((A.clone().requires_grad_(), B), {}, RuntimeError, "symmetric_matmul: found .* requires a gradient.*no_grad"),
    ],
)
def test_bad_arguments(args, kwargs, error, words):
    for function in (symmetric_matmul, symmetric_matmul_torch):
        with pytest.raises(error, match=words):
            function(*args, **kwargs)


def test_out_may_lie_beside_its_inputs_but_not_on_them():
    square = BUFFER.clone()
    x, y = square[:2], square[3:]
    x.normal_()
    assert symmetric_matmul(x, x.mT, out=y) is y
    for name, args, kwargs in (
        ("a", (x, x.mT), {"out": x}),
        ("a", (x, x.mT), {"out": square[1:3]}),  # the last of x is the first of out
        ("b", (y.clone(), y.mT), {"out": square[2:4].mT}),
        ("c", (y.clone(), y.clone(), x), {"beta": 1.0, "out": x}),
    ):
        with pytest.raises(
            ValueError, match=f"out: found memory that it shares with {name}, expected memory of its own"
        ):
            symmetric_matmul(*args, **kwargs)
    symmetric_matmul(y.clone(), y.clone(), x, out=x)  # beta is 0: c is not an input


def test_weights_with_a_gradient_are_fine_without_recording():
    a = A.clone().requires_grad_()
    with torch.no_grad():
        assert not symmetric_matmul(a, a.mT).requires_grad


def test_operator_is_well_formed(with_kernel, device):
    a, b, c = batch(device=device)
    for args in ((a, b, c, 2.0, 0.5, torch.empty_like(c)), (a, b, None, 1.0, 0.0, torch.empty_like(c))):
        torch.library.opcheck(torch.ops.lightning_mue.symmetric_matmul.default, args)


@pytest.mark.parametrize("kernel", [False, True])
def test_compiles_without_a_graph_break(kernel, request, device):
    if kernel:
        request.getfixturevalue("with_kernel")
    a, _, c = batch(device=device if kernel else "cpu")

    def step(a, c):
        gram = symmetric_matmul(a, a.mT)
        return symmetric_matmul(gram, gram, c, alpha=0.5, beta=2.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, c), step(a, c))


def test_operator_counts_half_the_operations(with_kernel, device):
    a, b, _ = batch(device=device)
    with FlopCounterMode(display=False) as counter:
        symmetric_matmul(a, b)
    assert counter.get_total_flops() == 3 * 12 * 13 * 20


@pytest.fixture
def matmul_precision():
    """Undo what a test sets; both the newer setting and the older one are process-wide."""
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cuda.matmul.fp32_precision = before[1]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("highest", None, "ieee"),
        ("high", None, "tf32"),
        ("highest", "tf32", "tf32"),
        ("high", "ieee", "ieee"),
    ],
)
def test_float32_follows_torch(triton_symmetric, matmul_precision, monkeypatch, device, old, new, expected):
    torch.set_float32_matmul_precision(old)
    if new:
        torch.backends.cuda.matmul.fp32_precision = new
    seen = []
    monkeypatch.setattr(triton_symmetric, "launch", lambda *args: seen.append(args[-1]))
    a, b, c = batch(device=device)
    torch.ops.lightning_mue.symmetric_matmul(a, b, None, 1.0, 0.0, c)
    assert seen == [expected]


def test_fastest_tiling_is_kept_for_sizes_alike(triton_symmetric, monkeypatch, device):
    m = triton_symmetric
    timed, used, timing_is_possible = [], [], True

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: used.append((constants["TILE"], constants["COLS"]))

    for name in ("_chosen", "_known"):
        monkeypatch.setattr(m, name, {})
    monkeypatch.setattr(m, "may_time", lambda device: timing_is_possible)
    monkeypatch.setattr(m, "milliseconds", lambda run, tiling: timed.append(tiling) or -tiling.tile)
    monkeypatch.setattr(m, "symmetric_kernel", Kernel())
    largest = max(m.HALF, key=lambda tiling: tiling.tile)[:2]

    def launch(n, k, dtype=torch.bfloat16, **kwargs):
        a = torch.zeros(2, n, k, dtype=dtype, device=device)
        m.launch(a, a.mT, None, 1.0, 0.0, a.new_empty(2, n, n), **kwargs)

    launch(64, 64)
    launch(64, 64)
    launch(96, 112)
    assert timed == list(m.HALF)
    assert used == [largest] * 3
    for count, args in enumerate([(192, 64), (64, 192), (63, 64), (64, 63), (64, 64, torch.float16)], 2):
        launch(*args)
        assert len(timed) == count * len(m.HALF), args
    timed.clear()
    launch(64, 64, torch.float32, precision="tf32")
    launch(64, 64, torch.float32, precision="ieee")
    assert timed == [*m.TF32, *m.IEEE]

    # Where nothing can be timed, known sizes keep their choice; others get the first, and are timed when that is possible.
    timing_is_possible = False
    launch(64, 64)
    launch(640, 640)
    assert used[-2:] == [largest, m.HALF[0][:2]]
    timing_is_possible = True
    launch(640, 640)
    assert used[-1] == largest


def test_nothing_is_timed_off_the_device_or_when_switched_off(triton_symmetric, monkeypatch, device):
    assert not triton_symmetric.may_time(torch.device("cpu"))
    monkeypatch.setenv("LIGHTNING_MUE_AUTOTUNE", "0")
    assert not triton_symmetric.may_time(torch.device(device))


@pytest.mark.parametrize("shape", [(2, 20, 20), (2, 20, 70), (2, 70, 20)])
def test_orthogonalize_through_the_kernel(with_kernel, monkeypatch, shape):
    """All the products of an orthogonalization, with the operands laid out as it lays them out."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    launches, launch = [], with_kernel.launch
    monkeypatch.setattr(with_kernel, "launch", lambda *args: launches.append(1) or launch(*args))
    ours = orthogonalize(g, dtype=torch.float32)
    assert len(launches) >= 10
    monkeypatch.setattr(symmetric, "kernel_fits", lambda a: False)
    assert (
        ours - orthogonalize(g, dtype=torch.float32)
    ).abs().max() < 5e-5  # as in tests/optim/orthogonal/test_newton_schulz.py


def test_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from lightning_mue.kernels.symmetric.op import symmetric_matmul, triton_available
a = torch.ones(2, 3, 4)
assert (symmetric_matmul(a, a.mT) == 4).all()
print(triton_available())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "precision", "error"),
    [
        (torch.bfloat16, "ieee", 3e-3),
        (torch.float16, "ieee", 4e-4),
        (torch.float32, "tf32", 1e-3),
        (torch.float32, "ieee", 1e-6),
    ],
)
@pytest.mark.parametrize(("n", "k"), [(1024, 2816), (768, 2048), (500, 1000), (257, 129)])
def test_on_a_device(matmul_precision, dtype, precision, error, n, k):
    torch.backends.cuda.matmul.fp32_precision = precision
    a, b, c = batch(n, k, dtype, "cuda", seed=n)
    out = torch.full_like(c, torch.nan)
    exact = 0.5 * a.double() @ b.double() - c.double()
    symmetric_matmul(a, b, c, alpha=0.5, beta=-1.0, out=out)
    assert torch.equal(out, out.mT)
    assert (out.double() - exact).norm() <= error * exact.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [512, 520])
def test_is_captured_into_a_graph_known_size_or_not(n):
    a, b, c = batch(n, 640, torch.bfloat16, "cuda")
    out = torch.empty_like(c)
    if n == 512:
        symmetric_matmul(a, b, c, beta=1.0, out=out)
    else:  # compiled, as every kernel must be before a capture, but not timed
        from lightning_mue.kernels.symmetric.triton import HALF, launch

        launch(a, b, c, 1.0, 1.0, out, tiling=HALF[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        symmetric_matmul(a, b, c, beta=1.0, out=out)
    a.normal_()
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, symmetric_matmul(a, b, c, beta=1.0))
