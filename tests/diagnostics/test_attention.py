"""Summaries of attention logits against a float64 matrix: blocks, masks, grouped heads, hidden keys, memory that is used again."""

from __future__ import annotations

import pytest
import torch

from lightning_mue.diagnostics import attention
from lightning_mue.diagnostics.attention import attention_summary, logits_summary, softmax_summary
from lightning_mue.diagnostics.blocks import scratch


def reference(logits_BHSN):
    """[sum of squared logsumexp, queries, largest, sum of entropies] of float64 logits; minus infinity is hidden."""
    rows_RN = logits_BHSN.double().flatten(0, -2)
    rows_RN = rows_RN[rows_RN.amax(-1) > -3e4]
    p_RN = rows_RN.softmax(-1)
    entropy = torch.special.entr(p_RN).sum()
    return torch.stack(
        [rows_RN.logsumexp(-1).square().sum(), torch.tensor(float(len(rows_RN))), rows_RN.amax(), entropy]
    )


def masks(B, Hq, S, N):
    boolean = torch.rand(B, 1, S, N) < 0.6
    boolean[0, :, 2] = False  # a query that sees nothing
    added = torch.randn(B, Hq, S, N).masked_fill(torch.rand(B, Hq, S, N) < 0.3, float("-inf"))
    least = torch.zeros(1, 1, S, N).masked_fill(torch.rand(S, N) < 0.3, torch.finfo(torch.float32).min)
    return {"none": None, "boolean": boolean, "added": added, "least": least}


@pytest.mark.parametrize("elements", [1, 70, 1 << 19], ids=["a query", "some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["none", "boolean", "added", "least"])
@pytest.mark.parametrize("causal", [False, True])
def test_against_the_whole_matrix(monkeypatch, elements, dtype, name, causal):
    monkeypatch.setattr(attention, "block_elements", lambda device: elements)
    B, Hq, Hkv, S, N, k = 3, 4, 2, 7, 9, 5
    q, keys = torch.randn(B, S, Hq, k, dtype=dtype).transpose(1, 2), torch.randn(B, Hkv, N, k, dtype=dtype)
    mask = masks(B, Hq, S, N)[name]
    logits = q.double() @ keys.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.7
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    if causal:
        logits = logits.masked_fill(torch.arange(N) > torch.arange(S).unsqueeze(1) + N - S, float("-inf"))
    scratch(100, q.device).fill_(float("nan"))  # what was in the memory does not matter
    found = attention_summary(q.requires_grad_(), keys, 0.7, causal=causal, offset=N - S, mask=mask)
    # Float32 sums of some hundred terms of size 1.
    torch.testing.assert_close(found.double(), reference(logits), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found.double(), reference(1.01 * logits), rtol=1e-4)
    torch.testing.assert_close(softmax_summary(logits.float()), found, rtol=1e-5, atol=1e-5)


def test_sharp_logits_and_rows_of_a_head():
    """Nearly all of the weight on one key, where an entropy is a small difference of large numbers."""
    logits = 40 * torch.randn(50, 300)
    torch.testing.assert_close(softmax_summary(logits).double(), reference(logits), rtol=1e-5, atol=2e-4)
    of_head = logits_summary(logits, torch.arange(50) < 20)
    torch.testing.assert_close(of_head.double(), reference(logits[:20])[:3], rtol=1e-6, atol=0)


def test_nan_is_not_hidden_and_autocast_changes_nothing():
    q = torch.randn(2, 2, 4, 8)
    plain = attention_summary(q, q, 0.3, causal=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention_summary(q, q, 0.3, causal=True), plain)
    with torch.inference_mode():
        attention_summary(torch.randn(1, 1, 90, 8), torch.randn(1, 1, 90, 8), 0.3)
    assert torch.equal(attention_summary(q, q, 0.3, causal=True), plain)
    q[0, 0, 1, 1] = float("nan")
    assert attention_summary(q, q, 0.3, causal=True)[[0, 3]].isnan().all()
