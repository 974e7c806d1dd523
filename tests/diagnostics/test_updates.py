"""Update diagnostics against plain formulas, and what the even sample must and must not see."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mue.diagnostics import (
    angular_step,
    even_sample,
    gradient_noise,
    small_second_moments,
    update_ratio,
    update_rms,
    update_summary,
    weight_rms,
)
from lightning_mue.diagnostics.updates import UPDATE_SIZE

#: Sums in float32 over some thousand terms.
TIGHT = 1e-5


def pair(*shape, seed=0, step=0.01):
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(shape, generator=generator)
    return before, before + step * torch.randn(shape, generator=generator)


def ratio(before, after):
    before, after = before.double(), after.double()
    return ((after - before).square().mean() / before.square().mean()).sqrt().item()


@pytest.mark.parametrize("shape", [(), (7,), (5, 6), (3, 4, 5)])
def test_update_ratio_is_the_formula(shape):
    before, after = pair(*shape)
    assert update_ratio(before, after).item() == pytest.approx(ratio(before, after), rel=TIGHT)


def test_bfloat16_weights_are_compared_in_float32():
    before, after = (x.bfloat16() for x in pair(64, 64, step=0.1))
    found = update_ratio(before, after)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(ratio(before, after), rel=TIGHT)


def test_summaries_of_shards_add_up():
    before, after = pair(10, 8)
    parts = [update_summary(b, a) for b, a in zip(before.split([3, 7]), after.split([3, 7]), strict=True)]
    empty = update_summary(torch.empty(0, 8), torch.empty(0, 8))
    total = parts[0] + parts[1] + empty
    assert torch.equal(empty, torch.zeros(UPDATE_SIZE))
    assert (update_rms(total) / weight_rms(total)).item() == pytest.approx(ratio(before, after), rel=TIGHT)


def test_nan_is_not_hidden_and_zero_weights_are_infinite():
    before, after = pair(4)
    after[1] = math.nan
    assert update_ratio(before, after).isnan()
    assert update_ratio(torch.zeros(4), torch.ones(4)).isinf()
    assert update_ratio(torch.empty(0), torch.empty(0)).isnan()


def test_few_elements_are_all_taken_and_copied():
    x = torch.arange(12.0).view(3, 4)
    sample = even_sample(x, 12)
    assert torch.equal(sample, x.flatten())
    sample.zero_()
    assert x.any()


@pytest.mark.parametrize("shape", [(64, 64), (8, 32, 16), (300, 7), (4096,), (5, 1000)])
def test_sample_is_bounded_and_spread_over_every_part(shape):
    limit = 512
    index = torch.arange(math.prod(shape)).view(shape)
    taken = even_sample(index, limit)
    assert limit // 3 < len(taken) <= limit
    assert torch.equal(taken, even_sample(index, limit))
    if len(shape) > 1:
        assert len(set((taken % shape[-1]).tolist())) == min(shape[-1], len(taken))  # no column is left out
        assert len(set((taken // shape[-1]).tolist())) > 0.5 * min(index[..., 0].numel(), len(taken))
    if len(shape) == 3:
        assert len(set((taken // (shape[-1] * shape[-2])).tolist())) == shape[0]  # every expert


def test_sample_sees_a_column_that_a_plain_stride_would_miss():
    before = torch.ones(64, 64)
    after = before.clone()
    after[:, 1] += 1  # 64 x 64 in 512 elements is every 8th: columns 0, 8, 16, ... only
    seen = update_rms(update_summary(even_sample(before, 512), even_sample(after, 512))).item()
    assert seen == pytest.approx(1 / 8, rel=0.1)
    assert not (after.flatten()[::8] - before.flatten()[::8]).any()


def test_sample_gives_the_rms_to_its_standard_error():
    before, after = pair(400, 300, seed=3)
    limit = 4096
    found = update_ratio(even_sample(before, limit), even_sample(after, limit)).item()
    # Two independent RMS of n normal draws: relative standard error sqrt(2) / sqrt(2 n); five of them.
    assert found == pytest.approx(ratio(before, after), rel=5 / (limit / 1.5) ** 0.5)


@pytest.mark.parametrize("step", [1e-6, 1e-3, 0.3, 3.0])
def test_angle_keeps_its_digits(step):
    before, after = pair(50, 40, step=step)
    x, y = before.double().flatten(), after.double().flatten()
    unit = x / x.norm(), y / y.norm()
    expected = 2 * math.atan2((unit[0] - unit[1]).norm(), (unit[0] + unit[1]).norm())
    # A change of 1e-6 is 8 roundings of a float32 weight; the after weights are the rounded ones in both.
    assert angular_step(update_summary(before, after)).item() == pytest.approx(expected, rel=2e-5)
    cosine = torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0)
    if step == 1e-6:
        assert cosine.clamp(max=1).arccos().item() != pytest.approx(expected, rel=0.1)  # why it is not the arccosine


def test_angle_of_shards_adds_up_and_of_a_rescaled_weight_is_zero():
    before, after = pair(10, 8)
    total = sum(update_summary(b, a) for b, a in zip(before.split([3, 7]), after.split([3, 7]), strict=True))
    assert angular_step(total).item() == pytest.approx(angular_step(update_summary(before, after)).item(), rel=TIGHT)
    assert angular_step(update_summary(before, 0.9 * before)).item() < 1e-4  # of a relative change of 0.1
    assert angular_step(update_summary(before, -before)).item() == pytest.approx(math.pi, abs=1e-3)
    assert angular_step(update_summary(torch.zeros(4), torch.ones(4))).isnan()


def test_memory_order_does_not_change_what_is_sampled():
    x = torch.randn(30, 40, 5)
    turned = x.permute(2, 0, 1)
    assert torch.equal(even_sample(turned, 10**6), x.flatten())  # without a copy of the whole in another order
    assert torch.equal(even_sample(turned, 100), even_sample(x, 100))


def test_second_moments_below_eps_are_counted_where_there_are_any():
    v = torch.tensor([0.0, 1e-20, 1e-16, 2e-16, 1.0])
    eps, beta, step = 1e-8, 0.999, 3
    threshold = eps**2 * (1 - beta**step)
    root = (v.double() / (1 - beta**step)).sqrt()
    expected = [((root <= eps) & (root > 0)).sum().item(), (root > 0).sum().item()]
    assert small_second_moments(v, threshold).tolist() == expected == [1, 4]
    assert small_second_moments(v, torch.tensor(threshold)).tolist() == expected


def test_gradient_noise_is_unbiased():
    """Of gradients with a known mean and covariance, drawn afresh."""
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.linspace(-1, 1, 20, dtype=torch.float64), torch.linspace(0.5, 3, 20, dtype=torch.float64)
    samples = mean + std * torch.randn(4000, 24, 20, dtype=torch.float64, generator=generator)
    small = samples[:, :4].mean(1).square().sum(-1).mean().item()
    large = samples.mean(1).square().sum(-1).mean().item()
    true, noise = gradient_noise(small, large, 4, 24)
    assert true == pytest.approx(mean.square().sum().item(), rel=0.03)
    assert noise == pytest.approx(std.square().sum().item(), rel=0.03)
    assert large != pytest.approx(mean.square().sum().item(), rel=0.3)  # what a plain norm would say
