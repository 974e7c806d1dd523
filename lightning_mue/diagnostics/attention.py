"""Attention diagnostics: Z-value, largest logit and entropy, a block of queries at a time (docs/theory.md section 6).

Shape legend: B batch, Hq query heads, Hkv key heads, G = Hq / Hkv, S query positions, N key positions, C queries of a block,
n keys that the block may see, R rows (B * Hq * C), k head dimension, V classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mue.checks import value_error
from lightning_mue.diagnostics.blocks import block_elements, scratch

#: Entries of `logits_summary` and `attention_summary`.
LOGITS_SIZE, ATTENTION_SIZE = 3, 4
#: A row whose largest logit is below this sees nothing: masks are minus infinity or a dtype's smallest number.
HIDDEN = -3e4
#: What a hidden logit is set to: finite, so that its weight 0 times it is 0.
_LEAST = -1e30
#: Queries of a block, where it can be chosen: with fewer, products with the keys are slow.
_QUERIES = 16


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
    rows_RV = logits.detach().reshape(-1, logits.shape[-1])
    if len(rows_RV) == 0:
        return torch.zeros(LOGITS_SIZE, dtype=torch.float32, device=logits.device)
    step = max(1, block_elements(logits.device) // rows_RV.shape[1])
    rows = []
    for block_RV in rows_RV.split(step):
        memory_RV = scratch(block_RV.numel(), logits.device).view_as(block_RV)
        rows.append(_of_rows(block_RV.float(), memory_RV)[:2])
    largest_R, logsumexp_R = torch.cat(rows, dim=1)
    return _summed(logsumexp_R, largest_R, None if weights is None else weights.reshape(-1) > 0)


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
    q_BHSk, k_BHNk, mask_BHSN = _as_heads(q.detach(), k.detach(), mask)
    B, Hq, S, _ = q_BHSk.shape
    N = k_BHNk.shape[2]
    if B * Hq * S * N == 0:
        return torch.zeros(ATTENTION_SIZE, dtype=torch.float32, device=q.device)
    most = block_elements(q.device)
    b = min(B, max(1, most // (Hq * N * _QUERIES)))
    c = min(S, max(1, most // (Hq * N * b)))
    keys = k_BHNk[:b].numel()
    memory = scratch(keys + 2 * b * Hq * c * N, q.device)
    logits, weights = memory[keys:].view(2, -1)
    found = []
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        for first in range(0, B, b):
            own = slice(first, first + b)
            q_bHSk, k_bHkN = q_BHSk[own].float(), k_BHNk[own].transpose(-1, -2)
            k_bHkN = memory[: k_bHkN.numel()].view(k_bHkN.shape).copy_(k_bHkN)
            mask_bHSN = None if mask_BHSN is None else mask_BHSN[own]
            for start in range(0, S, c):
                rows = slice(start, min(start + c, S))
                logits_Rn = _logits(q_bHSk, k_bHkN, scale, rows, offset if causal else None, mask_bHSN, logits)
                found.append(_of_rows(logits_Rn, weights[: logits_Rn.numel()].view_as(logits_Rn)))
    return _attention_summed(torch.cat(found, dim=1))


def _logits(
    q_BHSk: Tensor,
    k_BHkN: Tensor,
    scale: float,
    rows: slice,
    offset: int | None,
    mask_BHSN: Tensor | None,
    memory: Tensor,
) -> Tensor:
    """[R, n] logits of the queries of some rows (offset: of causal ones), in the given memory."""
    (B, Hq, _, width), N, C = q_BHSk.shape, k_BHkN.shape[3], rows.stop - rows.start
    n = N if offset is None else max(1, min(N, rows.stop + offset))
    q_brk = q_BHSk[:, :, rows].reshape(B * k_BHkN.shape[1], -1, width)  # b = B * Hkv, r = G * C
    logits_brn = memory[: q_brk.shape[0] * q_brk.shape[1] * n].view(*q_brk.shape[:2], n)
    torch.baddbmm(logits_brn, q_brk, k_BHkN.flatten(0, 1)[..., :n], beta=0, alpha=scale, out=logits_brn)
    logits_BHCn = logits_brn.view(B, Hq, C, n)
    if mask_BHSN is not None:
        part = mask_BHSN[:, :, rows, :n]
        if part.dtype == torch.bool:
            logits_BHCn.masked_fill_(~part, _LEAST)
        else:
            logits_BHCn.add_(part).clamp_(min=_LEAST)
    if offset is not None:
        seen = min(n, max(0, rows.start + offset + 1))  # by all of these queries
        last_C1 = torch.arange(rows.start, rows.stop, device=memory.device).add(offset).unsqueeze(1)
        logits_BHCn[..., seen:].masked_fill_(torch.arange(seen, n, device=memory.device) > last_C1, _LEAST)
    return logits_BHCn.view(-1, n)


def softmax_summary(logits: Tensor) -> Tensor:
    """`attention_summary` of logits [..., N] that exist already, a block of rows at a time."""
    rows_RN = logits.detach().reshape(-1, logits.shape[-1])
    if rows_RN.numel() == 0:
        return torch.zeros(ATTENTION_SIZE, dtype=torch.float32, device=logits.device)
    step = max(1, block_elements(logits.device) // rows_RN.shape[1])
    found = []
    for block_RN in rows_RN.split(step):
        x_RN, weights_RN = scratch(2 * block_RN.numel(), logits.device).view(2, *block_RN.shape)
        found.append(_of_rows(torch.clamp(block_RN.float(), min=_LEAST, out=x_RN), weights_RN))
    return _attention_summed(torch.cat(found, dim=1))


@torch.no_grad()
def _of_rows(x_RN: Tensor, memory_RN: Tensor) -> Tensor:
    """[3, R]: of each row of logits the largest, the logsumexp, and the mean under the softmax."""
    largest_R = x_RN.amax(-1)
    weights_RN = torch.softmax(x_RN, -1, out=memory_RN)
    logsumexp_R = largest_R - weights_RN.amax(-1).log()  # the largest logit has the largest weight
    return torch.stack([largest_R, logsumexp_R, weights_RN.mul_(x_RN).sum(-1)])


def _attention_summed(rows_3R: Tensor) -> Tensor:
    largest_R, logsumexp_R, mean_R = rows_3R
    seen_R = ~(largest_R <= HIDDEN)  # NaN counts as seen
    entropy = torch.where(seen_R, logsumexp_R - mean_R, 0.0).sum()
    return torch.cat([_summed(logsumexp_R, largest_R, seen_R), entropy.reshape(1)])


def merge_logits(a: Tensor, b: Tensor) -> Tensor:
    """The summary of two sets of logits together; zeros are neutral, also where all logits are negative."""
    largest = torch.where(a[1] == 0, b[2], torch.where(b[1] == 0, a[2], torch.maximum(a[2], b[2])))
    return torch.cat([a[:2] + b[:2], largest.reshape(1), a[3:] + b[3:]])


def _summed(logsumexp_R: Tensor, largest_R: Tensor, seen_R: Tensor | None) -> Tensor:
    if seen_R is None:
        rows = torch.full((), float(len(largest_R)), dtype=torch.float32, device=largest_R.device)
        return torch.stack([logsumexp_R.square().sum(), rows, largest_R.amax()])
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
