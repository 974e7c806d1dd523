"""attention_error_summary: an exact attention has no error, another's is that of all its queries, masked ones do not count."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lightning_mue.diagnostics.attention_error import attention_error_summary, attention_errors


def drawn(seed, *, heads=4, key_heads=2, queries=12, keys=12):
    torch.manual_seed(seed)
    q = torch.randn(3, heads, queries, 8)
    return q, torch.randn(3, key_heads, keys, 8), torch.randn(3, key_heads, keys, 8)


def exact(q, k, v, mask=None, causal=True):
    """By torch in float64, whose causal mask is aligned at the first positions: here both ends are the same."""
    q, k, v = (x.double() for x in (q, k, v))
    mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=0.3, enable_gqa=True)


def errors(q, k, v, y, **options):
    return attention_errors(attention_error_summary(q, k, v, y, 0.3, **options))


@pytest.mark.parametrize("seed", range(2))
def test_error_and_bias_are_those_of_the_whole_output(seed):
    q, k, v = drawn(seed)  # 12 queries of 3 sequences: all are in the sample
    y = exact(q, k, v)
    off = y * 1.03 + 0.02 * torch.randn_like(y)
    found = errors(q, k, v, off, causal=True)
    gap = off - y
    assert found["attention_error"] == pytest.approx((gap.square().sum() / y.square().sum()).sqrt().item(), rel=1e-5)
    assert found["attention_bias"] == pytest.approx((gap * y).sum().abs().item() / y.square().sum().item(), rel=1e-4)
    assert found["attention_bias"] == pytest.approx(0.03, rel=0.2)
    assert errors(q, k, v, y.float(), causal=True)["attention_error"] < 1e-6
    assert (
        errors(q, k, v, y.float())["attention_error"] > 0.1
    )  # control: without the causal mask it is another attention


@pytest.mark.parametrize("boolean", [True, False])
def test_masks(boolean):
    q, k, v = drawn(3)
    mask = torch.rand(3, 1, 12, 12) < 0.6
    mask[0, 0, 5] = False  # a query that sees nothing
    mask = mask if boolean else torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))
    y = exact(q, k, v, mask, causal=False)
    y[0, :, 5] = 7.0
    assert errors(q, k, v, y, mask=mask)["attention_error"] < 1e-6


def test_the_sample_of_long_sequences_ends_with_the_last_query():
    q, k, v = drawn(4, queries=40, keys=40)
    y = exact(q, k, v)
    y[:, :, -1] *= 2
    assert errors(q, k, v, y, causal=True)["attention_bias"] > 1e-3


def test_what_is_not_finite_is_not_hidden():
    q, k, v = drawn(5)
    y = exact(q, k, v)
    y[0, 0, -1, 0] = float("nan")
    assert not errors(q, k, v, y, causal=True)["attention_error"] < 1e9
    assert errors(q, k, torch.zeros_like(v), torch.zeros_like(y), causal=True) == {}
