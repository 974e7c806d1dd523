"""SpikeScore, as a whole and step by step, against the loop that OLMo-core runs, in plain float64 numbers."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mue.diagnostics import spike_share
from lightning_mue.diagnostics.spike_share import SpikeCount, spikes_in


def loop(values, window, threshold):
    """Which values are spikes: the mean and population deviation of the last finite ones, once there are enough."""
    history, found = [], []
    for value in values:
        recent = history[-window:]
        mean = sum(recent) / len(recent) if recent else 0.0
        std = math.sqrt(sum((x - mean) ** 2 for x in recent) / len(recent)) if recent else 0.0
        found.append(len(recent) == window and std >= 1e-10 and value > mean + threshold * std)
        if math.isfinite(value):
            history.append(value)
    return found


def series(seed, n=700, odd=()):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator, dtype=torch.float64).exp() + 5 * torch.linspace(1, 0, n).double()
    values[torch.randint(n, (9,), generator=generator)] *= 20
    for at, value in odd:
        values[at] = value
    return values


ODD = [(), [(200, math.nan), (201, math.inf), (202, -math.inf), (203, 1e38)], [(slice(0, 300), 2.0), (300, 9.0)]]


@pytest.mark.parametrize("odd", ODD, ids=["finite", "not finite", "constant"])
@pytest.mark.parametrize(("window", "threshold"), [(128, 6.0), (16, 3.0)])
def test_whole_and_step_by_step_equal_the_loop(odd, window, threshold):
    loss, norm = series(0, odd=odd), series(1)
    expected = [loop(values.tolist(), window, threshold) for values in (loss, norm)]
    assert spikes_in(loss, window, threshold).tolist() == expected[0]
    either = [a or b for a, b in zip(*expected, strict=True)]
    assert 0 < sum(expected[0]) < sum(either)  # both series add to it
    assert float(spike_share(loss, norm, window, threshold)) == pytest.approx(sum(either) / len(either), rel=1e-6)
    count = SpikeCount(window, threshold)
    for step, values in enumerate(zip(loss.tolist(), norm.tolist(), strict=True)):
        assert count.add(*values) == either[step]
        if step == 400:  # a run that is resumed
            saved, count = count.state_dict(), SpikeCount(window, threshold)
            count.load_state_dict(saved)
    assert count.share == pytest.approx(sum(either) / len(either))


def test_nothing_before_the_window_is_full():
    loss = torch.ones(128)
    loss[::2] = 2.0
    assert not spikes_in(torch.cat([loss[:127], torch.tensor([1e9])])).any()
    assert spikes_in(torch.cat([loss, torch.tensor([1e9])])).nonzero().tolist() == [[128]]
    count = SpikeCount()
    for value in loss[:127].tolist():
        count.add(value)
    assert math.isnan(count.share)
    count.add(1.0)
    assert count.share == 0.0
    assert spike_share(torch.zeros(0)).isnan()


def test_a_value_that_is_not_finite_does_not_hide_what_follows():
    loss = torch.ones(200)
    loss[::2] = 2.0
    loss[150], loss[170] = math.nan, 50.0
    assert spikes_in(loss).nonzero().tolist() == [[170]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spike_share(torch.zeros(3, 2)), r"values: found shape \[3, 2\], expected one value a step"),
        (lambda: spike_share(torch.tensor(1.0)), r"values: found shape \[\]"),
        (lambda: spike_share(torch.zeros(3), torch.zeros(2)), r"loss, gradient_norm: .* expected the same length"),
        (lambda: spike_share(torch.zeros(3), window=1), "window: found 1"),
        (lambda: SpikeCount(threshold=-1.0), "threshold: found -1"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
