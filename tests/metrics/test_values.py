"""Every metric, fed in uneven batches, equals its definition in float64 over all of them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.metric_cases import CASES, SIZES, batches_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.text import Perplexity as TorchPerplexity

from lightning_mue import diagnostics, metrics

# Each batch is measured in float32 (1e-7 an operation, some thousand entries), and added up in float64.
TIGHT = 2e-6
cases = pytest.mark.parametrize("name", list(CASES))


def near(value, expected, rel=TIGHT):
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=rel)


def test_every_metric_is_tried():
    assert set(CASES) | {"SpikeScore"} == set(metrics.__all__)  # that one knows an order: test_spike_score.py


@cases
def test_uneven_batches_and_reset(name):
    make, draw, define = CASES[name]
    metric, batches = make(), batches_of(draw)
    for half in (batches, batches[:3], batches[2:]):
        for batch in half:
            metric.update(*batch)
        near(metric.compute(), define(half))
        metric.reset()


@cases
@pytest.mark.parametrize("full", [False, True])
def test_forward_gives_the_batch_and_keeps_the_whole(name, full):
    make, draw, define = CASES[name]
    metric, batches = make(dist_sync_on_step=full), batches_of(draw)  # which makes forward run update twice
    for batch, n in zip(batches, SIZES, strict=True):
        value = metric(*batch)
        near(value, define([batch])) if n else _nothing(value)
    near(metric.compute(), define(batches))


def _nothing(value):
    assert value.isnan()


@cases
def test_states_merge_in_any_order(name):
    make, draw, define = CASES[name]
    batches = batches_of(draw)
    parts = [make() for _ in batches]
    for part, batch in zip(parts, batches, strict=True):
        part.update(*batch)
    total = make()
    total.merge_state(parts[2])
    near(total.compute(), define(batches[2:3]))  # and what it computed is forgotten at the next merge
    for part in (parts[0], parts[3].metric_state, parts[1]):
        total.merge_state(part)
    near(total.compute(), define(batches))


@cases
def test_not_the_mean_over_batches(name):
    """Negative control: the batches differ so much that their mean is another figure."""
    _, draw, define = CASES[name]
    batches = [batch for batch, n in zip(batches_of(draw), SIZES, strict=True) if n]
    mean = sum(define([batch]) for batch in batches) / len(batches)
    assert abs(mean - define(batches)) > 0.01 * define(batches)


@cases
def test_nothing_is_nan_and_warned_of(name):
    metric = CASES[name][0]()
    with pytest.warns(UserWarning, match=r"compute.* was called before the ``update``"):
        assert metric.compute().isnan()
    metric.update(*CASES[name][1](0, 1))
    assert metric.compute().isnan()


@pytest.mark.parametrize("name", ["ZValue", "RouterEntropy", "OutputRMS", "Kurtosis", "CrossEntropy", "MaxViolation"])
def test_nan_is_not_hidden_and_reset_forgets_it(name):
    make, draw, define = CASES[name]
    metric = make()
    ill = [x.clone() if isinstance(x, torch.Tensor) else x for x in draw(6, 1)]
    ill[0] = ill[0].float()
    ill[0].flatten()[2] = math.nan
    if name == "CrossEntropy":
        ill[1].fill_(1)
    metric.update(*ill)
    metric.update(*draw(4, 2))
    assert metric.compute().isnan()
    metric.reset()
    metric.update(*draw(4, 2))
    near(metric.compute(), define([draw(4, 2)]))


@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(0, 64), max_size=6), offset=st.floats(-300, 300), seed=st.integers(0, 10**6))
def test_kurtosis_of_any_cut_is_that_of_the_whole(cuts, offset, seed):
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed)) + offset
    metric = metrics.Kurtosis()
    for part in torch.tensor_split(x, sorted(cuts)):
        metric.update(part)
    expected = (x.double() - x.double().mean()).pow(4).mean() / x.double().var(correction=0) ** 2
    # float32 rounds the batch's mean by 1e-7 of the offset; the 4th moment moves by its square, the 3rd by itself.
    near(metric.compute(), expected, rel=1e-4)


def test_sums_are_wider_than_float32():
    """Beyond 2^24 tokens a float32 count stands still; here 2^26 of them have been seen, one more batch follows."""
    metric = metrics.CrossEntropy()
    metric.merge_state({"nats": torch.tensor(2.0**26, dtype=torch.float64), "tokens": torch.tensor(2**26)})
    for _ in range(5):
        metric.update(torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64))
    assert metric.tokens.item() == 2**26 + 5
    assert metric.nats.item() == pytest.approx(2.0**26 + 5 * math.log(8), rel=1e-12)


def test_perplexity_is_that_of_torchmetrics_where_that_one_is_finite():
    x, targets = CASES["Perplexity"][1](30, 2)
    theirs, ours = TorchPerplexity(ignore_index=-100), metrics.Perplexity()
    for value in (x[:10], targets[:10]), (x[10:], targets[10:]):
        theirs.update(*value)
        ours.update(*value)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-5)
    wild = torch.tensor([[[0.0, 200.0], [0.0, 0.0]]]), torch.tensor([[0, 0]])
    theirs.update(*wild)
    ours.update(*wild)
    assert theirs.compute().isinf()
    assert ours.compute().isfinite()


def test_functions_of_tokens(monkeypatch):
    x, targets = CASES["CrossEntropy"][1](30, 2)
    expected = CASES["CrossEntropy"][2]([(x, targets)])
    monkeypatch.setattr(diagnostics.code_length, "CHUNK_ELEMENTS", 7 * 9)  # seven positions a chunk
    near(diagnostics.cross_entropy(x, targets), expected)
    near(diagnostics.perplexity(x, targets), expected.exp())
    near(diagnostics.bits_per_byte(x, targets, 4.0), expected / math.log(16))
    assert diagnostics.cross_entropy(x, torch.full_like(targets, -100)).isnan()
    x.requires_grad_()
    diagnostics.cross_entropy(x, targets).backward()
    slope = torch.autograd.grad(CASES["CrossEntropy"][2]([(x, targets)]), x)[0]
    torch.testing.assert_close(x.grad, slope, rtol=1e-5, atol=1e-8)
