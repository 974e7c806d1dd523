"""Z-values against closed forms, and against a naive float64 loop over queries."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_mue.diagnostics import attention_z_value, z_value, zvalue

# float32 rounding of a logsumexp is about 1e-7 relative; the mean over positions does not add to it.
RELATIVE = 1e-6


def naive_attention(q, k, scale, causal=True):
    B, Hq, S, _ = q.shape
    group, offset = Hq // k.shape[1], k.shape[2] - S
    values = []
    for b in range(B):
        for h in range(Hq):
            for s in range(S):
                keys = k[b, h // group, : s + offset + 1] if causal else k[b, h // group]
                values.append((keys.double() @ q[b, h, s].double() * scale).logsumexp(0) ** 2)
    return torch.stack(values).mean().item()


@pytest.mark.parametrize("constant", [0.0, 2.5, -40.0])
@pytest.mark.parametrize("classes", [1, 7, 1000])
def test_constant_logits(constant, classes):
    expected = (constant + math.log(classes)) ** 2
    assert z_value(torch.full((3, 5, classes), constant)).item() == pytest.approx(expected, rel=RELATIVE)


def test_log_probabilities_have_no_z():
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(0))
    assert z_value(logits.log_softmax(-1)).item() < 1e-11
    assert z_value(logits).item() > 1  # the check bites


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_dim_and_reference(dim):
    logits = 5 * torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(1))
    expected = logits.double().logsumexp(dim).square().mean().item()
    assert z_value(logits, dim=dim).item() == pytest.approx(expected, rel=RELATIVE)


def test_mean_of_squares_is_not_square_of_mean():
    logits = torch.tensor([[0.0], [4.0]])
    assert z_value(logits).item() == 8.0


def test_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(37, 11, generator=generator)
    q, k = (torch.randn(2, heads, 13, 8, generator=generator) for heads in (4, 2))
    whole = z_value(logits).item(), attention_z_value(q, k, 0.3).item()
    monkeypatch.setattr(zvalue, "CHUNK_ELEMENTS", 2 * 4 * 13 * 3)  # three queries a chunk, the last chunk uneven
    assert (z_value(logits).item(), attention_z_value(q, k, 0.3).item()) == pytest.approx(whole, rel=RELATIVE)


def test_bfloat16_is_widened():
    logits = (100 * torch.randn(8, 32, generator=torch.Generator().manual_seed(3))).bfloat16()
    value = z_value(logits)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(logits.double().logsumexp(-1).square().mean().item(), rel=RELATIVE)


def test_nan_and_empty_and_masked():
    assert z_value(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]])).isnan()
    assert z_value(torch.empty(0, 5)).isnan()
    assert z_value(torch.tensor([[0.0, float("-inf")]])).item() == 0.0


@pytest.mark.parametrize("logits", [torch.tensor(1.0), torch.empty(3, 0)])
def test_z_value_refuses_no_classes(logits):
    with pytest.raises(ValueError, match=r"logits: found .*at least one class"):
        z_value(logits)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("S", "N"), [(1, 1), (7, 7), (3, 8)])
def test_attention_against_naive_loop(causal, heads, key_heads, S, N):
    generator = torch.Generator().manual_seed(heads * S)
    q = 3 * torch.randn(2, heads, S, 5, generator=generator)
    k = torch.randn(2, key_heads, N, 5, generator=generator)
    expected = naive_attention(q, k, 0.7, causal)
    assert attention_z_value(q, k, 0.7, causal=causal).item() == pytest.approx(expected, rel=RELATIVE)


def test_attention_negative_controls():
    generator = torch.Generator().manual_seed(4)
    q, k = (torch.randn(2, heads, 6, 5, generator=generator) for heads in (4, 2))
    value = attention_z_value(q, k, 0.7).item()
    for wrong in (naive_attention(q, k, 0.7, causal=False), naive_attention(q, k, 1.0)):
        assert abs(wrong - value) > 0.05 * value
    interleaved = attention_z_value(q[:, [0, 2, 1, 3]], k, 0.7).item()  # head i must not read key head i % Hkv
    assert abs(interleaved - value) > 1e-3 * value


def test_attention_of_zero_queries_counts_visible_keys():
    expected = sum(math.log(s) ** 2 for s in range(1, 6)) / 5
    q = torch.zeros(1, 2, 5, 4)
    assert attention_z_value(q, torch.randn(1, 1, 5, 4), 1.0).item() == pytest.approx(expected, rel=RELATIVE)


def test_attention_empty_and_nan():
    assert attention_z_value(torch.empty(0, 2, 3, 4), torch.empty(0, 1, 3, 4), 1.0).isnan()
    q, k = torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2)
    k[0, 0, 0, 0] = float("nan")
    assert attention_z_value(q, k, 1.0).isnan()


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        ((2, 4, 8), (2, 4, 8), "equal batch"),
        ((2, 4, 6, 8), (3, 4, 6, 8), "equal batch"),
        ((2, 4, 6, 8), (2, 4, 6, 9), "equal batch"),
        ((2, 4, 6, 8), (2, 3, 6, 8), "evenly"),
        ((2, 4, 6, 8), (2, 4, 5, 8), "query sees none"),
    ],
)
def test_attention_refuses_shapes(q, k, message):
    with pytest.raises(ValueError, match=message):
        attention_z_value(torch.zeros(q), torch.zeros(k), 1.0)
