"""SpikeScore as a metric: any cut of a series, forward, merging, collections and what is refused."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from lightning_mue.diagnostics import spike_share
from lightning_mue.metrics import CrossEntropy, SpikeScore


def run(seed=0, n=400):
    generator = torch.Generator().manual_seed(seed)
    loss, norm = torch.randn(2, n, generator=generator, dtype=torch.float64).exp()
    for values in (loss, norm):
        values[torch.randint(n, (6,), generator=generator)] *= 50
    norm[n // 2] = torch.nan
    return loss, norm


@pytest.mark.parametrize("cuts", [[], [1, 2, 3, 130, 131, 260], [128, 256]])
@pytest.mark.parametrize("window", [128, 20])
def test_any_cut_of_a_series_is_the_whole(cuts, window):
    loss, norm = run()
    metric, expected = SpikeScore(window), spike_share(loss, norm, window)
    for _ in range(2):  # a second time, after reset
        for part in zip(torch.tensor_split(loss, cuts), torch.tensor_split(norm, cuts), strict=True):
            metric.update(*part)
        assert metric.compute() == expected > 0
        metric.reset()
    assert expected > spike_share(loss, window=window)  # the gradient norm has spikes of its own


def test_forward_step_by_step_copies_and_casts():
    """Forward gives the share of the step alone, held against those before it in no batch: none."""
    loss, norm = run(n=200)
    metric = SpikeScore(window=20)
    model = nn.Sequential(metric)
    for step in range(200):
        metric.update(float(loss[step]), norm[step].float() if step % 2 else norm[step])
        if step == 60:
            model.to(torch.bfloat16)
        if step == 100:
            metric = pickle.loads(pickle.dumps(copy.deepcopy(metric)))
    mixed = torch.where(torch.arange(200) % 2 == 1, norm.float().double(), norm)
    assert metric.compute() == spike_share(loss, mixed, 20)


def test_merging_adds_up_and_keeps_the_own_window():
    parts = [run(seed, 300) for seed in (1, 2)]
    one, other = SpikeScore(20), SpikeScore(20)
    one.update(*(series[:150] for series in parts[0]))
    other.update(*parts[1])
    one.merge_state(other)
    one.update(*(series[150:] for series in parts[0]))
    shares = [float(spike_share(*part, 20)) for part in parts]
    assert one.compute().item() == pytest.approx(sum(shares) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="Expected state variable"):
        one.merge_state(SpikeScore(21))


def test_in_a_collection_settings_do_not_mix():
    together = MetricCollection({"narrow": SpikeScore(20), "wide": SpikeScore(128), "nats": CrossEntropy()})
    loss, norm = run()
    predictions = {"logits": torch.zeros(1, 4), "targets": torch.zeros(1, dtype=torch.int64)}
    together.update(loss=loss, gradient_norm=norm, **predictions)
    values = together.compute()
    assert [values[name] for name in ("narrow", "wide")] == [spike_share(loss, norm, window) for window in (20, 128)]
    assert values["narrow"] != values["wide"]


@pytest.mark.filterwarnings("ignore:.*was called before the ``update``")
def test_nothing_is_nan():
    assert SpikeScore().compute().isnan()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SpikeScore().update(torch.zeros(2, 2)), r"loss, gradient_norm: found shapes \[2, 2\] and \[2, 2\]"),
        (lambda: SpikeScore().update(torch.zeros(3), 1.0), r"found shapes \[3\] and \[1\]"),
        (lambda: SpikeScore(window=0), "window: found 0"),
        (lambda: SpikeScore(threshold=0.0), "threshold: found 0"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
