"""Activation metrics against closed forms and float64 references; summaries merge to the whole."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mue.diagnostics import (
    activation,
    activation_summary,
    kurtosis,
    max_over_rms,
    merge_summaries,
    outlier_percent,
    output_rms,
    summary_metrics,
)
from lightning_mue.diagnostics.channels import channel_summary

METRICS = {
    "rms": output_rms,
    "outlier_percent": outlier_percent,
    "max_over_rms": max_over_rms,
    "kurtosis": kurtosis,
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(*shape, seed=0):
    x = normal(*shape, seed=seed)
    return x.sign() * x.abs() ** 3 + 0.5


def test_rms_closed_forms():
    assert output_rms(torch.tensor([3.0, -4.0])).item() == pytest.approx(math.sqrt(12.5), rel=1e-6)
    assert output_rms(torch.full((2, 3, 4), -0.25)).item() == 0.25


def test_max_over_rms_closed_forms():
    assert max_over_rms(torch.tensor([-2.0, 2.0, 2.0])).item() == pytest.approx(1, rel=1e-6)
    one_hot = torch.zeros(1, 100)
    one_hot[0, 3] = -7
    assert max_over_rms(one_hot).item() == pytest.approx(10, rel=1e-6)


def test_kurtosis_closed_forms():
    # The standard error of a normal sample's kurtosis is sqrt(24 / n) = 0.005 here: five of them.
    assert kurtosis(normal(1000, 1000)).item() == pytest.approx(3, abs=0.025)
    assert kurtosis(torch.tensor([1.0, -1.0, 1.0, -1.0])).item() == 1.0  # the least possible
    uniform = torch.rand(10**6, generator=torch.Generator().manual_seed(0))
    assert kurtosis(uniform).item() == pytest.approx(1.8, abs=0.01)
    assert kurtosis(heavy_tailed(1000, 100)).item() > 20  # negative control: not 3 for everything


def test_kurtosis_survives_a_large_mean():
    # A float32 sum of raw fourth powers would lose the figure altogether at a mean of 1000 deviations.
    x = normal(200, 500, seed=1)
    shifted = x + 1000
    expected = kurtosis(shifted.double()).item()  # float32 rounding of x + 1000 itself is in the reference
    assert expected == pytest.approx(3, abs=0.1)
    assert kurtosis(shifted).item() == pytest.approx(expected, rel=1e-3)
    assert summary_metrics(activation_summary(shifted))["kurtosis"].item() == pytest.approx(expected, rel=1e-3)


def test_outliers_are_counted_per_token():
    x = torch.zeros(4, 100)
    x[:, ::2], x[:, 1::2] = 1, -1
    assert outlier_percent(x).item() == 0
    x[2, 5] = 50  # one of 400 entries; its own token's deviation grows to about 5.1
    assert outlier_percent(x).item() == pytest.approx(0.25)
    # A token that is large as a whole holds no outliers, though all its entries are 50 deviations from the rest.
    x = normal(50, 100)
    x[7] += 1000
    assert outlier_percent(x).item() == 0


def test_outliers_use_the_population_deviation():
    one_hot = torch.zeros(1, 27)
    one_hot[0, 0] = 1  # sqrt(26) = 5.1 population deviations away; 26 features allow exactly 5
    assert outlier_percent(one_hot).item() == pytest.approx(100 / 27)
    assert outlier_percent(one_hot[:, :26]).item() == 0
    assert outlier_percent(one_hot[:, :10], threshold=2.9).item() == pytest.approx(10)


def test_outlier_percent_of_a_normal():
    # P(|z| > 2) = 4.55 %
    assert outlier_percent(normal(2000, 500), threshold=2.0).item() == pytest.approx(4.55, abs=0.1)


@pytest.mark.parametrize("shape", [(7,), (5, 40), (2, 3, 40), (1, 1)])
@pytest.mark.parametrize("make", [normal, heavy_tailed])
def test_summary_equals_the_functions(shape, make):
    x = make(*shape)
    found = summary_metrics(activation_summary(x, threshold=2.0))
    for name, function in METRICS.items():
        expected = function(x, threshold=2.0) if name == "outlier_percent" else function(x)
        assert found[name].item() == pytest.approx(expected.item(), rel=1e-5, nan_ok=True), name


def test_summaries_merge_to_the_whole(monkeypatch):
    parts = [heavy_tailed(n, 30, seed=n) * scale for n, scale in ((1, 1.0), (64, 0.1), (17, 20.0))]
    whole = summary_metrics(activation_summary(torch.cat(parts).double(), threshold=2.0))
    total = torch.zeros(activation.SUMMARY_SIZE)
    for part in parts:
        total = merge_summaries(total, activation_summary(part, threshold=2.0))
    swapped = merge_summaries(
        activation_summary(torch.cat(parts[1:]), threshold=2.0), activation_summary(parts[0], 2.0)
    )
    monkeypatch.setattr(activation, "block_elements", lambda device: 5 * 30)  # five tokens a chunk
    chunked = activation_summary(torch.cat(parts), threshold=2.0)
    for merged in (total, swapped, chunked):
        for name, value in summary_metrics(merged).items():
            assert value.item() == pytest.approx(whole[name].item(), rel=1e-5), name
    mean_of_parts = sum(kurtosis(part).item() for part in parts) / 3  # negative control: merging is not averaging
    assert abs(mean_of_parts - whole["kurtosis"].item()) > 1


def test_third_moment_merges():
    x = heavy_tailed(40, 30).square()
    merged = merge_summaries(activation_summary(x[:11]), activation_summary(x[11:]))
    expected = (x.double() - x.double().mean()).pow(3).mean().item()
    assert merged[3].item() == pytest.approx(expected, rel=1e-5)


def test_empty():
    empty = torch.empty(0, 8)
    assert all(function(empty).isnan() for function in METRICS.values())
    assert activation_summary(empty).eq(0).all()
    assert activation_summary(torch.empty(3, 0)).eq(0).all()
    assert all(value.isnan() for value in summary_metrics(activation_summary(empty)).values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_not_hidden(bad):
    x = normal(4, 50)
    x[1, 2] = bad
    assert outlier_percent(x).isnan()
    assert kurtosis(x).isnan()
    merged = merge_summaries(activation_summary(normal(4, 50)), activation_summary(x))
    found = summary_metrics(merged)
    assert not any(found[name].isfinite() for name in ("rms", "outlier_percent", "kurtosis", "max_over_rms"))


def test_constant_has_no_kurtosis_but_an_rms():
    x = torch.full((3, 4), 2.0)
    assert kurtosis(x).isnan()
    assert outlier_percent(x).item() == 0
    assert output_rms(x).item() == 2


@pytest.mark.parametrize("function", list(METRICS.values()))
def test_float32_and_input_untouched(function):
    x = normal(6, 40).bfloat16()
    before = x.clone()
    assert function(x).dtype == torch.float32
    assert torch.equal(x, before)


@pytest.mark.parametrize("function", [outlier_percent, activation_summary])
def test_refuses_a_scalar(function):
    with pytest.raises(ValueError, match=r"x: found a scalar, expected .*features"):
        function(torch.tensor(1.0))


def test_tokens_that_do_not_count_change_nothing():
    """Padding may hold anything, NaN too: the summaries are those of the other tokens."""
    x, counts = torch.randn(3, 7, 40).pow(3) + 1, torch.rand(3, 7) < 0.6
    x[~counts] = torch.tensor([float("nan"), 1e4, -50.0])[torch.randint(0, 3, ((~counts).sum(), 1))]
    torch.testing.assert_close(
        activation_summary(x, 2.0, counts), activation_summary(x[counts], 2.0), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(channel_summary(x, counts), channel_summary(x[counts]), rtol=1e-6, atol=0)
    assert activation_summary(x, 2.0, counts)[6] > 0
    assert not activation_summary(x, 2.0, torch.zeros(3, 7)).any()
    assert not channel_summary(x, torch.zeros(3, 7))[:10].any()
