"""orthogonalize against the float64 singular value decomposition, on friendly and hostile matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import lightning_mue.optim.matrices as matrices
import lightning_mue.optim.orthogonal.newton_schulz as newton_schulz
from lightning_mue.optim import PRESETS, orthogonalize
from lightning_mue.optim.orthogonal.coefficients import Coefficients

# The polynomials have slope up to 493 (the product of the a) at zero, so float32's 6e-8 of rounding can grow to 3e-5 in the
# directions that hold nothing; the worst over the matrices below is 8e-6.
FLOAT32_ERROR = 5e-5


def polynomial(s: np.ndarray, schedule: Coefficients) -> np.ndarray:
    for a, b, c in schedule.steps:
        s = a * s + b * s**3 + c * s**5
    return s


def matrix(kind: str, out: int, cols: int, seed: int = 0) -> torch.Tensor:
    """A float32 matrix with the spectrum that `kind` names."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(out, cols, generator=generator, dtype=torch.float64)
    if kind == "rank one":
        g = torch.outer(g[:, 0], g[0])
    elif kind == "condition 1e6":
        u, s, vt = torch.linalg.svd(g, full_matrices=False)
        g = u @ torch.diag(torch.logspace(0, -6, len(s), dtype=torch.float64)) @ vt
    elif kind == "tiny":
        g = g * 1e-30
    elif kind == "huge":
        g = g * 1e30
    elif kind == "subnormal":
        g = g * 1e-40
    return g.float()


def misfit(g: torch.Tensor, o: torch.Tensor, schedule: Coefficients) -> tuple[float, np.ndarray, np.ndarray]:
    """Largest entry of `U^T o V - diag(p(s))`; the singular values s over the norm; the results that they came to."""
    u, s, vt = torch.linalg.svd(g.double(), full_matrices=False)
    relative = (s / s.square().sum().sqrt()).numpy()
    core = (u.mT @ o.double() @ vt.mT).numpy()
    return float(np.abs(core - np.diag(polynomial(relative, schedule))).max()), relative, np.diag(core)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["gaussian", "rank one", "condition 1e6", "tiny", "huge", "subnormal"])
@pytest.mark.parametrize("shape", [(48, 48), (32, 96), (96, 32), (1, 64), (64, 1)])
def test_result_has_the_singular_vectors_and_the_promised_singular_values(preset, kind, shape):
    schedule = PRESETS[preset]
    g = matrix(kind, *shape)
    o = orthogonalize(g, preset)
    assert (o.shape, o.dtype) == (g.shape, torch.float32)

    reference = g.double() / g.double().norm()  # subnormals lose digits in float32: compare to what was given
    error, relative, values = misfit(reference, o, schedule)
    assert error < FLOAT32_ERROR
    low, high = schedule.band
    reached = values[relative >= schedule.floor]
    assert reached.size
    assert reached.min() > low - FLOAT32_ERROR
    assert values.max() < high + FLOAT32_ERROR


@pytest.mark.parametrize("preset", PRESETS)
def test_direction_is_close_to_the_polar_factor(preset):
    g = matrix("gaussian", 64, 256)
    u, _, vt = torch.linalg.svd(g.double(), full_matrices=False)
    cosine = torch.cosine_similarity((u @ vt).flatten(), orthogonalize(g, preset).double().flatten(), dim=0)
    # A spread of the singular values over the band [l, h] alone keeps the cosine above 2 sqrt(l h) / (l + h).
    low, high = PRESETS[preset].band
    assert cosine > 2 * (low * high) ** 0.5 / (low + high)


@pytest.mark.parametrize("name", PRESETS)
def test_stated_band_is_the_polynomials_and_tight(name):
    schedule = PRESETS[name]
    y = polynomial(np.linspace(schedule.floor, 1.01, 1_000_001), schedule)
    assert schedule.band[0] <= y.min() < schedule.band[0] + 0.01
    assert schedule.band[1] - 0.01 < y.max() <= schedule.band[1]
    below = polynomial(np.linspace(0, schedule.floor, 10_001), schedule)
    assert below.min() >= 0
    assert below.max() <= schedule.band[1]


def test_negative_controls_one_step_misses_the_band_and_a_wrong_schedule_is_seen():
    g = matrix("gaussian", 48, 48)
    whole = PRESETS["scheduled"]
    once = Coefficients(steps=whole.steps[:1], source="test", floor=whole.floor, band=whole.band)
    error, relative, values = misfit(g, orthogonalize(g, once), once)
    assert error < FLOAT32_ERROR  # it is what it says, but
    assert values[relative >= whole.floor].min() < whole.band[0] - 0.1  # too few steps for the band
    assert misfit(g, orthogonalize(g, "classic"), whole)[0] > 1e-2


def test_zero_gives_zero_and_nan_stays_in_its_matrix():
    g = torch.stack([matrix("gaussian", 16, 24, seed) for seed in range(4)])
    g[1] = 0
    g[2, 3, 4] = torch.nan
    o = orthogonalize(g)
    assert torch.equal(o[1], torch.zeros(16, 24))
    assert o[2].isnan().all()
    assert torch.equal(o[0], orthogonalize(g[[0, 1, 3]])[0])
    assert o[3].isfinite().all()
    assert torch.equal(orthogonalize(torch.zeros(5, 3)), torch.zeros(5, 3))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_batch_equals_its_matrices_however_it_is_cut_and_strided(monkeypatch, shape):
    g = torch.stack([matrix("gaussian", *shape, seed) for seed in range(7)])
    whole = orthogonalize(g)
    monkeypatch.setattr(matrices, "chunk_bytes", lambda device: 3 * g[0].numel() * 4)
    cut = orthogonalize(g)
    strided = orthogonalize(g.mT.contiguous().mT)
    single = torch.stack([orthogonalize(x) for x in g])
    # Matrix products of different batch sizes may add in another order: rounding only.
    for other in (cut, strided, single):
        assert (other - whole).abs().max() < FLOAT32_ERROR
    assert whole.is_contiguous()


def test_bfloat16_products_keep_the_largest_singular_value():
    g = matrix("gaussian", 64, 256)
    o = orthogonalize(g, dtype=torch.bfloat16)
    s = torch.linalg.svdvals(o.double())
    assert o.dtype == torch.float32
    assert s.max() < 1.17  # docs/derivations/hypersphere.md; 1.03 here in float32
    assert s.min() > 0.9
    assert not torch.equal(o, orthogonalize(g, dtype=torch.float32))


def test_float64_is_computed_in_float64():
    g = matrix("gaussian", 32, 48).double()
    o = orthogonalize(g)
    assert o.dtype == torch.float64
    assert misfit(g, o, PRESETS["scheduled"])[0] < 1e-12


def test_low_precision_input_and_autocast_do_not_change_the_products():
    for shape in ((32, 32), (32, 64)):  # either form
        g = matrix("gaussian", *shape).bfloat16()
        expected = orthogonalize(g.float())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            o = orthogonalize(g)
            assert (g.float() @ g.float().mT).dtype == torch.bfloat16, "it would lower a product"
        assert o.dtype == torch.float32
        assert torch.equal(o, expected)


def test_input_is_not_changed_and_gets_no_graph():
    g = matrix("gaussian", 8, 8).requires_grad_()
    before = g.detach().clone()
    assert not orthogonalize(g).requires_grad
    assert torch.equal(g, before)


@pytest.mark.parametrize("shape", [(0, 4, 8), (3, 0, 8), (3, 4, 0), (0, 4), (4, 0)])
def test_empty_batches_and_matrices(shape):
    assert orthogonalize(torch.empty(shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_hostile_neighbours_in_a_batch_leave_a_matrix_alone(dtype):
    """One of them takes the whole batch off the fast way of scaling, so float32 may round otherwise."""
    kinds = ["gaussian", "tiny", "huge", "subnormal", "rank one", "gaussian", "gaussian", "gaussian"]
    g = torch.stack([matrix(kind, 16, 40, seed) for seed, kind in enumerate(kinds)])
    g[5] = 0
    g[6, 0, 0] = torch.nan
    g[7, 0, 0] = torch.inf
    o = orthogonalize(g, dtype=dtype)
    for i in range(5):
        alone = orthogonalize(g[i], dtype=dtype)
        # Scaled otherwise, so rounded otherwise, which grows most in what a matrix of rank one does not hold.
        error = (o[i] - alone).norm() / alone.norm()
        assert error < {torch.bfloat16: 0.3, torch.float16: 0.03}.get(dtype, FLOAT32_ERROR), (i, error)
    assert torch.equal(o[5], torch.zeros(16, 40))
    assert o[6].isnan().all()
    assert o[7].isnan().all()


def test_results_share_no_memory_with_each_other_or_the_input():
    """Scratch is used again within a call; what was given out must not be."""
    g = torch.stack([matrix("gaussian", 16, 24, seed) for seed in range(4)])
    first = orthogonalize(g)
    kept = first.clone()
    second = orthogonalize(-g)
    assert torch.equal(first, kept)
    assert torch.equal(second, -kept)
    assert first.data_ptr() not in (g.data_ptr(), second.data_ptr())


def test_pool_gives_out_what_came_back_and_nothing_twice():
    pool, like = matrices.Pool(), torch.empty(0)
    a, b = pool.take((2, 3), like), pool.take((2, 3), like)
    assert a.data_ptr() != b.data_ptr()
    pool.give(a)
    assert pool.take((2, 3), like, torch.float64).dtype == torch.float64
    assert pool.take((3, 2), like).shape == (3, 2)
    assert pool.take((2, 3), like).data_ptr() == a.data_ptr()
    assert pool.take((2, 3), like).data_ptr() not in (a.data_ptr(), b.data_ptr())
    assert pool.nbytes == 4 * 24 + 48  # five were new, of them one of doubles


UNITS = {(1,) * 5: (20, 10, 15, 5), (2, 3): (8, 28, 6, 17), (2, 2, 1): (12, 22, 9, 13)}


@pytest.mark.parametrize("segments", UNITS, ids=str)
def test_operations_are_those_of_the_theory(segments):
    """docs/derivations/hypersphere.md: per n^3, `p r + q` with plain products and `ps r + qs` with symmetric kernels."""
    p, q, ps, qs = UNITS[segments]
    for n, r in ((8, 1), (8, 4), (16, 11)):
        assert newton_schulz.flops(n, n * r, segments) == (p * r + q) * n**3
        assert newton_schulz.flops(n, n * r, segments, symmetric=True) == (ps * r + qs) * n**3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_form_is_the_one_with_fewer_operations(dtype):
    gram = (2, 2, 1) if dtype == torch.bfloat16 else (2, 3)
    schedule = PRESETS["scheduled"]
    for shape in ((16, 16), (16, 22), (22, 16)):
        assert newton_schulz._segments(torch.empty(1, *shape, dtype=dtype), schedule) == (1,) * 5
    for shape in ((16, 26), (26, 16), (16, 64), (1, 64)):
        assert newton_schulz._segments(torch.empty(1, *shape, dtype=dtype), schedule) == gram
    for count in (1, 2, 3, 7):  # schedules of other lengths are run whole
        some = Coefficients(steps=schedule.steps[:1] * count, source="test", floor=0.1, band=(0, 2))
        assert sum(newton_schulz._segments(torch.empty(1, 16, 64, dtype=dtype), some)) == count


def test_counted_operations_are_the_ones_done():
    """torch counts them; the standard form at aspect 1 and the Gram form at 2 and 4."""
    for shape, segments in (((16, 16), (1,) * 5), ((16, 32), (2, 3)), ((64, 16), (2, 3))):
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.ones(3, *shape), dtype=torch.float32)
        assert counter.get_total_flops() == 3 * newton_schulz.flops(*sorted(shape), segments)


def test_negative_control_all_steps_in_one_segment_are_less_exact(monkeypatch):
    g = matrix("condition 1e6", 32, 96)
    kept = misfit(g, orthogonalize(g), PRESETS["scheduled"])[0]
    monkeypatch.setattr(newton_schulz, "_segments", lambda x, schedule: (5,))
    error = misfit(g, orthogonalize(g), PRESETS["scheduled"])[0]
    assert kept < FLOAT32_ERROR < 3 * FLOAT32_ERROR < error  # 6e-6 and 4e-4 are seen


@pytest.mark.parametrize("setting", ["highest", "high", "medium", "the newer one", "none"])
def test_tf32_is_float32_on_a_cpu_with_any_setting_and_the_setting_stays(setting):
    g = matrix("gaussian", 16, 48)
    matmul, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    saved = matmul.fp32_precision, cpu.fp32_precision
    try:
        if setting == "the newer one":
            matmul.fp32_precision = "tf32"  # and torch.get_float32_matmul_precision raises
        elif setting != "none":
            torch.set_float32_matmul_precision(setting)
        before = matmul.fp32_precision
        assert torch.equal(orthogonalize(g, dtype="tf32"), orthogonalize(g, dtype=torch.float32))
        with newton_schulz.tf32_products(True):
            assert matmul.fp32_precision == "tf32"
        assert matmul.fp32_precision == before
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision, cpu.fp32_precision = saved


@pytest.mark.slow  # the compiler takes most of a minute
def test_compiled_is_the_same():
    g = torch.stack([matrix("gaussian", 32, 96, seed) for seed in range(2)])
    for dtype, tolerance in ((torch.float32, FLOAT32_ERROR), (torch.bfloat16, 0.05)):
        error = (orthogonalize(g, dtype=dtype, compile=True) - orthogonalize(g, dtype=dtype)).abs().max()
        assert error < tolerance


@pytest.mark.parametrize(
    ("g", "kwargs", "error", "words"),
    [
        (torch.ones(3), {}, ValueError, r"g: found shape \[3\], expected a matrix"),
        (torch.ones(2, 2, 2, 2), {}, ValueError, r"\[2, 2, 2, 2\]"),
        (
            torch.ones(3, 3),
            {"preset": "quintic"},
            ValueError,
            "preset: found 'quintic', expected one of 'classic', 'scheduled'",
        ),
        (torch.ones(3, 3, dtype=torch.int64), {}, TypeError, "g: found torch.*, expected a real floating-point dtype"),
        (
            torch.ones(3, 3, dtype=torch.complex64),
            {},
            TypeError,
            "g: found torch.*, expected a real floating-point dtype",
        ),
        (
            torch.ones(3, 3),
            {"dtype": torch.int8},
            TypeError,
            "dtype: found torch.int8, expected a real floating-point dtype",
        ),
    ],
)
def test_bad_input(g, kwargs, error, words):
    with pytest.raises(error, match=words):
        orthogonalize(g, **kwargs)
