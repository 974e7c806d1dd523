"""Attention diagnostics: Z-value, largest logit and entropy, a block of queries at a time (docs/theory.md section 6).

Shape legend: B batch, Hq query heads, Hkv key heads, G = Hq / Hkv, S query positions, N key positions, C queries of a block,
n keys that the block may see, k head dimension, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mue.checks import value_error

#: Elements of the largest float32 temporary (64 MiB).
CHUNK_ELEMENTS = 1 << 24
#: Entries of `logits_summary` and `attention_summary`.
LOGITS_SIZE, ATTENTION_SIZE = 3, 4
#: A row whose largest logit is below this sees nothing: masks are minus infinity or a dtype's smallest number.
HIDDEN = -3e4


def logits_summary(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """The statistics of logits [..., V] for Z-value and largest logit, in a form that merges exactly.

    Args:
        logits: Of any floating dtype.
        weights: [...], 1 for positions that count and 0 for others; None: all count.

    Returns:
        Float32 [3]: sum of squared logsumexp, positions, largest logit. Zeros when there are no positions.

    Raises:
        ValueError: If there are no classes.
    """
    if logits.ndim == 0 or logits.shape[-1] == 0:
        found, do = f"shape {list(logits.shape)}", "Pass the logits themselves, not a loss."
        raise value_error("logits", found=found, expected="at least one class in the last dimension", do=do)
    rows_RV = logits.reshape(-1, logits.shape[-1])
    total = torch.zeros(LOGITS_SIZE, dtype=torch.float32, device=logits.device)
    if len(rows_RV) == 0:
        return total
    step = max(1, CHUNK_ELEMENTS // rows_RV.shape[1])
    for start in range(0, len(rows_RV), step):
        chunk_RV = rows_RV[start : start + step].float()
        seen_R = torch.ones(len(chunk_RV), dtype=torch.bool, device=logits.device)
        if weights is not None:
            seen_R = weights.reshape(-1)[start : start + step] > 0
        total = merge_logits(total, _summed(chunk_RV.logsumexp(-1), chunk_RV.amax(-1), seen_R))
    return total


def attention_summary(
    q: Tensor, k: Tensor, scale: float, *, causal: bool = False, offset: int = 0, mask: Tensor | None = None
) -> Tensor:
    """The statistics of the attention logits ``scale * q k^T + mask``; the S x N matrix never exists as a whole.

    Args:
        q: [..., Hq, S, k] queries, or [B, S, k] of one head, as attention sees them.
        k: [..., Hkv, N, k] keys; query head i reads key head ``i // (Hq / Hkv)``.
        scale: Factor on the logits.
        causal: Whether query s sees keys up to ``s + offset`` only.
        offset: See `causal`; ``N - S`` if the last query sees all keys.
        mask: Extends to [..., Hq, S, N]. Boolean: True where a query sees a key. Else what is added to the logits.

    Returns:
        Float32 [4]: sum over queries of the squared logsumexp, queries, largest logit, sum of the entropies of the softmax in
        nats. Queries that see no key do not count. Zeros when there are none.

    Raises:
        ValueError: If the shapes do not fit.
    """
    q_BHSk, k_BHNk, mask_BHSN = _as_heads(q, k, mask)
    B, Hq, S, _ = q_BHSk.shape
    N = k_BHNk.shape[2]
    total = torch.zeros(ATTENTION_SIZE, dtype=torch.float32, device=q.device)
    if B * Hq * S * N == 0:
        return total
    k_BHkN = k_BHNk.float().transpose(-1, -2)
    chunk = max(1, CHUNK_ELEMENTS // (B * Hq * N))
    for start in range(0, S, chunk):
        stop = min(start + chunk, S)
        n = max(1, min(N, stop + offset)) if causal else N
        q_BHrk = q_BHSk[:, :, start:stop].float().reshape(B, k_BHkN.shape[1], -1, q_BHSk.shape[3])  # r = G * C
        logits_BHCn = (q_BHrk @ k_BHkN[..., :n] * scale).reshape(B, Hq, stop - start, n)
        if causal:
            last_C1 = torch.arange(start, stop, device=q.device).add(offset).unsqueeze(1)
            logits_BHCn = logits_BHCn.masked_fill(torch.arange(n, device=q.device) > last_C1, float("-inf"))
        if mask_BHSN is not None:
            part = mask_BHSN[:, :, start:stop, :n]
            hide = part.dtype == torch.bool
            logits_BHCn = logits_BHCn.masked_fill(~part, float("-inf")) if hide else logits_BHCn + part.float()
        total = merge_attention(total, softmax_summary(logits_BHCn))
    return total


def softmax_summary(logits: Tensor) -> Tensor:
    """`attention_summary` of logits [..., N] that exist already, a block of rows at a time."""
    rows_RN = logits.reshape(-1, logits.shape[-1])
    total = torch.zeros(ATTENTION_SIZE, dtype=torch.float32, device=logits.device)
    if rows_RN.numel() == 0:
        return total
    for chunk_RN in rows_RN.split(max(1, CHUNK_ELEMENTS // rows_RN.shape[1])):
        x_RN = chunk_RN.float()
        largest_R1 = x_RN.amax(-1, keepdim=True)
        seen_R = ~(largest_R1.squeeze(-1) <= HIDDEN)  # NaN counts as seen
        weights_RN = (x_RN - largest_R1).exp()
        sum_R = weights_RN.sum(-1)
        logsumexp_R = largest_R1.squeeze(-1) + sum_R.log()
        mean_R = torch.where(weights_RN > 0, weights_RN * x_RN, 0.0).sum(-1) / sum_R
        entropy = torch.where(seen_R, logsumexp_R - mean_R, 0.0).sum()
        of_logits = _summed(logsumexp_R, largest_R1.squeeze(-1), seen_R)
        total = merge_attention(total, torch.cat([of_logits, entropy.reshape(1)]))
    return total


def merge_logits(a: Tensor, b: Tensor) -> Tensor:
    """The summary of two sets of logits together; zeros are neutral, also where all logits are negative."""
    largest = torch.where(a[1] == 0, b[2], torch.where(b[1] == 0, a[2], torch.maximum(a[2], b[2])))
    return torch.cat([a[:2] + b[:2], largest.reshape(1), a[3:] + b[3:]])


merge_attention = merge_logits


def _summed(logsumexp_R: Tensor, largest_R: Tensor, seen_R: Tensor) -> Tensor:
    rows = seen_R.sum()
    squares = torch.where(seen_R, logsumexp_R.square(), 0.0).sum()
    largest = torch.where(seen_R, largest_R, float("-inf")).amax()
    return torch.stack([squares, rows.float(), torch.where(rows > 0, largest, 0.0)])


def _as_heads(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """[B, heads, positions, k] of both, and the mask [B, Hq, S, N]."""
    if q.ndim < 3 or k.ndim != q.ndim or q.shape[-1] != k.shape[-1]:
        raise _misfit(q, k)
    if q.ndim == 3:
        q, k = q.unsqueeze(1), k.unsqueeze(1)
        mask = mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask
    batch = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3])
    Hq, Hkv = q.shape[-3], k.shape[-3]
    if Hq == 1 < Hkv:
        Hq = Hkv
    if Hkv == 0 or Hq % Hkv:
        raise _misfit(q, k)
    q_BHSk = q.expand(*batch, Hq, *q.shape[-2:]).reshape(-1, Hq, *q.shape[-2:])
    k_BHNk = k.expand(*batch, Hkv, *k.shape[-2:]).reshape(-1, Hkv, *k.shape[-2:])
    if mask is None:
        return q_BHSk, k_BHNk, None
    shape = (*batch, Hq, q.shape[-2], k.shape[-2])
    expanded = mask.expand(shape)
    return q_BHSk, k_BHNk, expanded if len(shape) == 4 else expanded.reshape(-1, *shape[-3:])


def _misfit(q: Tensor, k: Tensor) -> ValueError:
    found = f"shapes {list(q.shape)} and {list(k.shape)}"
    expected = "q [..., query heads, positions, head dimension] and k [..., key heads, positions, head dimension]"
    do = "The key heads must divide the query heads."
    return value_error("q, k", found=found, expected=expected, do=do)
