"""How far the output of an attention is from the same attention in float64, on a sample of its queries.

Shape legend: B batch, Hq query heads, Hkv key heads, S query positions, N key positions, C sampled queries, k head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Entries of `attention_error_summary`; sequences and queries of each that are computed again.
ERROR_SIZE = 3
MOST_SEQUENCES, MOST_QUERIES = 4, 16


def attention_error_summary(
    q: Tensor, k: Tensor, v: Tensor, y: Tensor, scale: float, *, causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """The statistics of ``y - y*``, where y* is attention in float64, in a form that adds up over calls and ranks.

    At most `MOST_SEQUENCES` sequences and `MOST_QUERIES` queries of each, evenly spread, are computed again.

    Args:
        q: [B, Hq, S, k] queries, as attention sees them.
        k: [B, Hkv, N, k] keys; query head i reads key head ``i // (Hq / Hkv)``.
        v: [B, Hkv, N, *] values.
        y: [B, Hq, S, *] what attention made of them.
        scale: Factor on the logits.
        causal: Whether query s sees keys up to ``s + N - S`` only.
        mask: Extends to [B, Hq, S, N]. Boolean: True where a query sees a key. Else what is added to the logits.

    Returns:
        Float32 [3]: sums over entries of ``(y - y*)^2``, ``(y - y*) y*`` and ``y*^2``. Queries that see no key do not count.
    """
    exact = torch.float32 if q.device.type == "mps" else torch.float64  # which has no float64
    S, N = q.shape[2], k.shape[2]
    rows_B, rows_C = _spread(q.shape[0], MOST_SEQUENCES, q.device), _spread(S, MOST_QUERIES, q.device)
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], S, N)[rows_B][:, :, rows_C]
    k, v = (x[rows_B].to(exact).repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits_BHCN = scale * (q[rows_B][:, :, rows_C].to(exact) @ k.mT)
    if causal:
        last_C1 = (rows_C + (N - S)).unsqueeze(1)
        logits_BHCN = logits_BHCN.masked_fill(torch.arange(N, device=q.device) > last_C1, float("-inf"))
    if mask is not None:
        hide = mask.dtype == torch.bool
        logits_BHCN = logits_BHCN.masked_fill(~mask, float("-inf")) if hide else logits_BHCN + mask.to(exact)
    seen_BHC1 = ~(logits_BHCN.amax(-1, keepdim=True) <= -3e4)
    y_exact = torch.where(seen_BHC1, logits_BHCN.softmax(-1) @ v, 0.0)
    gap = torch.where(seen_BHC1, y[rows_B][:, :, rows_C].to(exact), 0.0) - y_exact
    return torch.stack([gap.square().sum(), (gap * y_exact).sum(), y_exact.square().sum()]).float()


def attention_errors(summary: Tensor) -> dict[str, float]:
    """Relative error (root mean square) and relative bias from a summary; empty if nothing was seen.

    The bias is the part of the error along the exact output: rounding to nearest has almost none, rounding away from zero a
    positive one.
    """
    if not summary[2] > 0 and torch.isfinite(summary).all():
        return {}
    return {
        "attention_error": float((summary[0] / summary[2]).sqrt()),
        "attention_bias": float((summary[1] / summary[2]).abs()),
    }


def _spread(n: int, most: int, device: torch.device) -> Tensor:
    """At most so many indices below n, evenly spread, with the last one."""
    taken = min(n, most)
    return (
        torch.linspace(n - 1, 0, taken, device=device).round().long()
        if taken > 1
        else torch.tensor([n - 1], device=device)
    )
