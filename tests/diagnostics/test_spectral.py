"""Spectral diagnostics against singular value decompositions in float64."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mue.diagnostics import (
    alignment_summary,
    leading_singular,
    mean_alignment,
    minority_share,
    qk_spectral_entropy,
    stable_rank,
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (5, 16, 12), (2, 3, 8, 8), (7, 1), (1, 7)])
@pytest.mark.parametrize("size", [1.0, 1e-25])
def test_leading_value_and_vector_are_those_of_the_decomposition(shape, size):
    weight = draw(*shape, seed=sum(shape)) * size
    values, vectors = leading_singular(weight, iterations=60)
    _, s, vh = torch.linalg.svd(weight.double())
    # The value converges with the square of the vector's error; float32 products.
    torch.testing.assert_close(values.double(), s[..., 0], rtol=1e-5, atol=0)
    cosine = (vectors[..., 0].double() * vh[..., 0, :]).sum(-1).abs()
    torch.testing.assert_close(cosine, torch.ones_like(cosine), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        stable_rank(weight / size, values / size).double(), s.square().sum(-1) / s[..., 0].square(), rtol=3e-5, atol=0
    )


def test_few_iterations_from_the_last_vectors_follow_a_weight_that_moves():
    weight, step = draw(64, 48), draw(64, 48, seed=1)
    _, vectors = leading_singular(weight, iterations=2)  # a poor start
    for _ in range(10):
        weight = weight + 0.01 * step
        values, vectors = leading_singular(weight, vectors, iterations=2)
    exact = torch.linalg.svdvals(weight.double())[0]
    assert values.item() == pytest.approx(exact.item(), rel=1e-4)
    cold, _ = leading_singular(weight, torch.linalg.qr(draw(48, 4, seed=2)).Q, iterations=2)
    assert cold.item() < 0.98 * exact.item()  # without the start, so few iterations are not enough


def test_vectors_do_not_depend_on_the_sign_of_the_start_and_nan_stays_in_its_matrix():
    weight = draw(3, 10, 6)
    values, vectors = leading_singular(weight, iterations=40)
    again, turned = leading_singular(weight, -vectors, iterations=5)
    torch.testing.assert_close(turned[..., 0], vectors[..., 0], rtol=0, atol=1e-4)
    weight[1, 2, 3] = math.nan
    broken, _ = leading_singular(weight, iterations=40)
    assert broken.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(broken[[0, 2]], values[[0, 2]])
    torch.testing.assert_close(again, values)
    with pytest.raises(ValueError, match=r"weight: found shape \[6\]"):
        leading_singular(torch.zeros(6))


def test_alignment_is_the_cosine_and_sums_add_up():
    x, direction = draw(5, 7, 12).bfloat16(), torch.nn.functional.normalize(draw(12, seed=1), dim=0)
    x[0, 0] = 0  # padding
    tokens = x.double().flatten(0, 1)[1:]
    cosine = tokens @ direction.double() / tokens.norm(dim=1)
    whole = alignment_summary(x, direction)
    parts = alignment_summary(x[:2], direction) + alignment_summary(x[2:], direction)
    for summary in (whole, parts):
        assert mean_alignment(summary).item() == pytest.approx(cosine.abs().mean().item(), rel=1e-5)
        positive = (cosine > 0).double().mean().item()
        assert minority_share(summary).item() == pytest.approx(min(positive, 1 - positive), rel=1e-6)
    shifted = alignment_summary(x.float() + 20 * direction, direction)  # all on one side
    assert minority_share(shifted).item() == 0
    assert mean_alignment(shifted).item() > 0.9
    assert alignment_summary(torch.zeros(0, 12), direction).tolist() == [0, 0, 0]
    x[3, 3, 3] = math.nan
    assert mean_alignment(alignment_summary(x, direction)).isnan()
    assert minority_share(alignment_summary(x, direction)).isnan()


@pytest.mark.parametrize("size", [1.0, 1e-20])
def test_qk_entropy_is_that_of_the_whole_product(size):
    w_q, w_k = draw(4, 6, 20) * size, draw(2, 6, 20, seed=1) * size
    s = torch.linalg.svdvals(w_q.double().mT @ w_k.double().repeat_interleave(2, 0)).square()
    expected = torch.special.entr(s / s.sum(-1, keepdim=True)).sum(-1)
    torch.testing.assert_close(qk_spectral_entropy(w_q, w_k).double(), expected, rtol=1e-5, atol=1e-6)
    tiled = torch.special.entr(s[[0, 2, 1, 3]]).sum(-1)  # heads in another order are other figures
    assert not torch.allclose(tiled, expected)


def test_qk_entropy_at_its_ends_and_with_broken_heads():
    k = 8
    basis = torch.eye(k, 16).expand(2, k, 16)
    one = torch.zeros(1, k, 16)
    one[0, 0, 0] = 3.0
    assert qk_spectral_entropy(basis, basis[:1]).tolist() == pytest.approx([math.log(k)] * 2)
    assert qk_spectral_entropy(one, basis[:1]).item() == pytest.approx(0, abs=1e-6)
    broken = basis.clone()
    broken[1, 0, 0] = math.inf
    assert qk_spectral_entropy(broken, basis[:1]).isnan().tolist() == [False, True]
    assert qk_spectral_entropy(0 * one, basis[:1]).isnan().all()
    with pytest.raises(ValueError, match="w_q, w_k: found shapes"):
        qk_spectral_entropy(draw(3, 6, 20), draw(2, 6, 20))
