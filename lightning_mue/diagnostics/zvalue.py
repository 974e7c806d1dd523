"""Z-values: how far logits are from normalized log-probabilities (docs/theory.md section 6).

Shape legend: B batch, Hq query heads, Hkv key/value heads, G = Hq / Hkv query heads a key head, S query positions,
N key positions, C query positions in a chunk, k head dimension, V classes, R rows of logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_mue.checks import value_error

#: Elements of the largest float32 temporary (64 MiB): logits are widened and scored a chunk at a time.
CHUNK_ELEMENTS = 1 << 24


def z_value(logits: Tensor, dim: int = -1) -> Tensor:
    """Mean over all positions of ``logsumexp(logits)^2``.

    Zero when the logits are log-probabilities. Growth over training precedes divergence in low precision, whether the
    logits belong to the vocabulary (the z-loss of PaLM, arXiv:2204.02311) or to a router (that of ST-MoE,
    arXiv:2202.08906).

    Args:
        logits: Floating point, any shape with the classes along ``dim``.
        dim: The dimension of the classes.

    Returns:
        Float32 scalar. NaN when there are no positions.

    Raises:
        ValueError: If ``logits`` has no dimension or no classes.
    """
    if logits.ndim == 0 or logits.shape[dim] == 0:
        raise value_error(
            "logits",
            found=f"shape {list(logits.shape)}",
            expected=f"at least one class along dim={dim}",
            do="Pass the logits themselves, not a loss.",
        )
    x_RV = logits.movedim(dim, -1).reshape(-1, logits.shape[dim])
    rows = max(1, CHUNK_ELEMENTS // x_RV.shape[1])
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    for chunk_RV in x_RV.split(rows):
        total = total + chunk_RV.float().logsumexp(dim=-1).square().sum()
    return total / x_RV.shape[0]


def attention_z_value(q: Tensor, k: Tensor, scale: float, causal: bool = True) -> Tensor:
    """Z-value of the attention logits ``scale * q k^T``, over the keys that each query may see.

    Queries are scored a chunk at a time, so the S x N matrix of logits never exists; with ``causal`` the keys after
    a chunk's last query are not even read. The work is that of one more attention forward in float32.

    Args:
        q: [B, Hq, S, k] queries, as attention sees them (after any rotation and normalization).
        k: [B, Hkv, N, k] keys. Query head i reads key head ``i // (Hq / Hkv)`` (grouped-query attention).
        scale: Factor on the logits, usually ``k ** -0.5``.
        causal: Whether query s sees keys up to s only. When N > S (a cached prefix) the last query sees all keys.

    Returns:
        Float32 scalar, the mean over batch, query heads and positions. NaN when there are none.

    Raises:
        ValueError: If the shapes do not fit, or a query would see no key.
    """
    _check_attention_shapes(q, k, causal)
    B, Hq, S, width = q.shape
    Hkv, N = k.shape[1], k.shape[2]
    total = torch.zeros((), dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return total / 0
    k_BHNk = k.float()
    positions_N = torch.arange(N, device=q.device)
    chunk = max(1, CHUNK_ELEMENTS // (B * Hq * N))
    for start in range(0, S, chunk):
        stop = min(start + chunk, S)
        visible = N - S + stop if causal else N
        q_BHrk = q[:, :, start:stop].float().reshape(B, Hkv, -1, width)  # r = G * C: the group shares its key head
        logits_BHrn = (q_BHrk @ k_BHNk[:, :, :visible].transpose(-1, -2)) * scale
        logits_BHGCn = logits_BHrn.unflatten(2, (Hq // Hkv, stop - start))
        if causal:
            last_C1 = torch.arange(start, stop, device=q.device).add(N - S).unsqueeze(1)
            logits_BHGCn = logits_BHGCn.masked_fill(positions_N[:visible] > last_C1, float("-inf"))
        total = total + logits_BHGCn.logsumexp(dim=-1).square().sum()
    return total / (B * Hq * S)


def attention_max_logits(
    q: Tensor, k: Tensor, scale: float, causal: bool = True, hidden: Tensor | None = None
) -> Tensor:
    """Largest attention logit of each query head, over the keys that each query may see; a block of queries at a time.

    Args:
        q: [B, Hq, S, k] queries, as attention sees them.
        k: [B, Hkv, N, k] keys; as for `attention_z_value`.
        scale: Factor on the logits.
        causal: Whether query s sees keys up to s only.
        hidden: Boolean, extends to [B, Hq, S, N]: keys that a query does not see, besides.

    Returns:
        Float32 [Hq]; minus infinity where no query sees a key.

    Raises:
        ValueError: As `attention_z_value`.
    """
    _check_attention_shapes(q, k, causal)
    B, Hq, S, width = q.shape
    Hkv, N = k.shape[1], k.shape[2]
    largest_H = torch.full((Hq,), float("-inf"), dtype=torch.float32, device=q.device)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        k_BHkN = k.float().transpose(-1, -2)
        seen = None if hidden is None else ~hidden.expand(B, Hq, S, N)
        positions_N = torch.arange(N, device=q.device)
        chunk = max(1, CHUNK_ELEMENTS // max(1, B * Hq * N))
        for start in range(0, S, chunk) if B else ():
            stop = min(start + chunk, S)
            q_BHrk = q[:, :, start:stop].float().reshape(B, Hkv, -1, width)
            logits_BHCN = ((q_BHrk @ k_BHkN) * scale).reshape(B, Hq, stop - start, N)
            if causal:
                last_C1 = torch.arange(start, stop, device=q.device).add(N - S).unsqueeze(1)
                logits_BHCN = logits_BHCN.masked_fill(positions_N > last_C1, float("-inf"))
            if seen is not None:
                logits_BHCN = logits_BHCN.masked_fill(~seen[:, :, start:stop], float("-inf"))
            largest_H = torch.maximum(largest_H, logits_BHCN.amax((0, 2, 3)))
    return largest_H


def _check_attention_shapes(q: Tensor, k: Tensor, causal: bool) -> None:
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        expected = (
            "q [batch, query heads, positions, head dimension] and k [batch, key heads, positions, head dimension] with equal "
            "batch and head dimension"
        )
        do = "Transpose heads before positions."
    elif k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        expected = f"query heads ({q.shape[1]}) that divide evenly among the key heads ({k.shape[1]})"
        do = "Check the order of the dimensions."
    elif k.shape[2] == 0 or (causal and k.shape[2] < q.shape[2]):
        expected = "a key for every query; some query sees none, so its logsumexp is undefined"
        do = "Pass at least as many key as query positions with causal=True, and at least one key otherwise."
    else:
        return
    raise value_error("q, k", found=f"shapes {list(q.shape)} and {list(k.shape)}", expected=expected, do=do)
