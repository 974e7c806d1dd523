"""orthogonalize against the float64 singular value decomposition, on friendly and hostile matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import lightning_mue.optim.newton_schulz as newton_schulz
from lightning_mue.optim import PRESETS, orthogonalize
from lightning_mue.optim.newton_schulz import Coefficients

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
    monkeypatch.setattr(newton_schulz, "chunk_bytes", lambda device: 3 * g[0].numel() * 4)
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
    assert s.max() < 1.17  # performance.md section 5; 1.03 here in float32
    assert s.min() > 0.9
    assert not torch.equal(o, orthogonalize(g, dtype=torch.float32))


def test_float64_is_computed_in_float64():
    g = matrix("gaussian", 32, 48).double()
    o = orthogonalize(g)
    assert o.dtype == torch.float64
    assert misfit(g, o, PRESETS["scheduled"])[0] < 1e-12


def test_low_precision_input_and_autocast_do_not_change_the_products():
    g = matrix("gaussian", 32, 48).bfloat16()
    expected = orthogonalize(g.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o = orthogonalize(g)
    assert o.dtype == torch.float32
    assert torch.equal(o, expected)


def test_input_is_not_changed_and_gets_no_graph():
    g = matrix("gaussian", 8, 8).requires_grad_()
    before = g.detach().clone()
    assert not orthogonalize(g).requires_grad
    assert torch.equal(g, before)


def test_empty_batch():
    assert orthogonalize(torch.empty(0, 4, 8)).shape == (0, 4, 8)


@pytest.mark.parametrize(
    ("g", "kwargs", "error", "words"),
    [
        (torch.ones(3), {}, ValueError, "g must be a matrix"),
        (torch.ones(2, 2, 2, 2), {}, ValueError, r"\[2, 2, 2, 2\]"),
        (torch.ones(3, 3), {"preset": "quintic"}, ValueError, "classic.*scheduled.*quintic"),
        (torch.ones(3, 3, dtype=torch.int64), {}, TypeError, "real floating point"),
        (torch.ones(3, 3, dtype=torch.complex64), {}, TypeError, "real floating point"),
        (torch.ones(3, 3), {"dtype": torch.int8}, TypeError, "int8"),
    ],
)
def test_bad_input(g, kwargs, error, words):
    with pytest.raises(error, match=words):
        orthogonalize(g, **kwargs)
