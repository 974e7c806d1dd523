"""Spike scores and drift sums against their definitions in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_mue.diagnostics.spikes import MAD_TO_STD, cusum, new_cusum, push, spike_score


def lower_median(values):
    """The lower middle one of an even number."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


def reference(value, window, floor):
    known = [v for v in window if not np.isnan(v)]
    median = lower_median(known)
    scale = max(MAD_TO_STD * lower_median([abs(v - median) for v in known]), floor * abs(median))
    return (value - median) / scale


@pytest.mark.parametrize("filled", [1, 40, 41, 128])
def test_score_is_the_distance_in_robust_deviations(filled):
    rng = np.random.default_rng(filled)
    window = np.full((2, 128), np.nan)
    window[:, 128 - filled :] = rng.lognormal(size=(2, filled))
    values = rng.lognormal(size=2) * 5
    found = spike_score(torch.tensor(values), torch.tensor(window), min_history=1, floor=0.02)
    expected = [reference(v, w, 0.02) for v, w in zip(values, window, strict=True)]
    # float32 against float64: a difference of two numbers of the same size, over one of a few percent of it.
    np.testing.assert_allclose(found.score.double().numpy(), expected, rtol=1e-4)


def test_few_outliers_do_not_move_the_score():
    """The control: mean and standard deviation of the same window hide the second spike behind the first."""
    clean = torch.linspace(1.9, 2.1, 100)
    spoilt = clean.clone()
    spoilt[::10] = 1000.0
    value = torch.tensor([4.0])
    scores = [float(spike_score(value, window[None]).score) for window in (clean, spoilt)]
    assert scores[1] > 0.5 * scores[0] > 10
    assert (4.0 - spoilt.mean()) / spoilt.std() < 1


def test_no_score_without_history_or_for_what_is_not_finite():
    window = torch.full((1, 128), torch.nan)
    for n in range(64):
        assert spike_score(torch.tensor([1e9]), window).score.isnan(), n
        window = push(torch.tensor([1.0 + n % 3]), window)
    assert spike_score(torch.tensor([1e9]), window).score > 1e6
    for value in (torch.nan, torch.inf):
        assert spike_score(torch.tensor([value]), window).score.isnan()
        assert torch.equal(push(torch.tensor([value]), window).nan_to_num(-1), window.nan_to_num(-1))


def test_a_series_that_hardly_varies_has_no_spikes():
    window = torch.full((1, 100), 2.0)
    assert abs(float(spike_score(torch.tensor([2.2]), window, floor=0.02).score) - 5) < 1e-3
    assert float(spike_score(torch.tensor([2.2]), window, floor=0.0).score) > 1e6  # the control


def first_alarm(series, limit=20.0):
    window, state = torch.full((1, 128), torch.nan), new_cusum(1)
    for step, value in enumerate(series):
        values = torch.tensor([float(value)])
        state = cusum(values, window, state)
        window = push(values, window)
        if state[0, 0] > limit:
            return step
    return None


@pytest.mark.slow
def test_a_slow_rise_is_a_drift_and_noise_is_none():
    rng = np.random.default_rng(3)
    noise = 3 + 0.1 * rng.standard_normal(2000)
    falling = 3 + 3 * np.exp(-np.arange(2000) / 300) + 0.1 * rng.standard_normal(2000)
    assert first_alarm(noise) is None
    assert first_alarm(falling) is None
    rising = falling + 0.002 * np.clip(np.arange(2000) - 1000, 0, None)  # a fiftieth of the noise a step
    step = first_alarm(rising)
    assert 1000 < step < 1500
    # No value stands out: the largest score until then is no spike.
    window = torch.tensor(rising[step - 128 : step])[None]
    assert spike_score(torch.tensor([rising[step]]), window).score < 10


def test_a_spike_alone_is_no_drift():
    series = [3.0 + 0.1 * (n % 5) for n in range(200)]
    series[150] = 1e6
    assert first_alarm(series) is None


def test_sum_by_its_recursion():
    rng = np.random.default_rng(5)
    series = 1 + 0.05 * rng.standard_normal(300) + 0.002 * np.arange(300)
    window, state = torch.full((1, 128), torch.nan), new_cusum(1)
    total, kept = 0.0, (0.0, 1.0)
    for n, value in enumerate(series):
        past = series[max(0, n - 128) : max(0, n - 64)]  # the older half of the last 128
        if len(past) >= 32:
            median = lower_median(past)
            scale = max(MAD_TO_STD * lower_median(np.abs(past - median)), 0.02 * abs(median))
            kept = (median, scale) if total <= 0 else kept
            total = max(0.0, total + min(4.0, (value - kept[0]) / kept[1]) - 1.5)
        values = torch.tensor([value])
        state = cusum(values, window, state)
        window = push(values, window)
        assert abs(float(state[0, 0]) - total) < 1e-3 * max(1, total), n
    assert total > 5
