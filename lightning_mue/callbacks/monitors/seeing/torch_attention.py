"""Queries, keys and masks of ``nn.MultiheadAttention``, made again from its inputs and weights.

Shape legend: N heads, k head dimension, B batch, S query positions, T key positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_ARGUMENTS = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)


class WeightRows(NamedTuple):
    """Rows of a weight, or of a bias, that make queries or keys."""

    tensor: Tensor
    start: int
    stop: int


class QueryKeyRows(NamedTuple):
    """The rows of an attention's queries and keys."""

    queries: tuple[WeightRows, ...]
    keys: tuple[WeightRows, ...]


def given_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}


def rows_of_torch(module: nn.MultiheadAttention) -> QueryKeyRows | None:
    """The rows that make queries and keys; None if it has a key that no weight makes."""
    d = module.embed_dim
    if module.bias_k is not None:
        return None
    biases = [] if module.in_proj_bias is None else [module.in_proj_bias]
    if module.in_proj_weight is not None:
        q, k = ([WeightRows(module.in_proj_weight, start, start + d)] for start in (0, d))
    else:
        q, k = ([WeightRows(weight, 0, d)] for weight in (module.q_proj_weight, module.k_proj_weight))
    return QueryKeyRows((*q, *(WeightRows(b, 0, d) for b in biases)), (*k, *(WeightRows(b, d, 2 * d) for b in biases)))


def torch_heads(module: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries `[B, N, S, k]` and keys `[B, N, T, k]` in float32."""
    rows = rows_of_torch(module)
    assert rows is not None
    heads = []
    for x, made in ((query, rows.queries), (key, rows.keys)):
        x = x.unsqueeze(0) if x.ndim == 2 else x if module.batch_first else x.transpose(0, 1)
        weight, *bias = (each.tensor.detach()[each.start : each.stop].float() for each in made)
        y = F.linear(x.detach().float(), weight, *bias)
        heads.append(y.unflatten(-1, (module.num_heads, -1)).transpose(1, 2))
    return heads[0], heads[1]


def added_mask(given: dict[str, Any], q: Tensor, k: Tensor) -> Tensor | None:
    """What the masks of a call add to the logits, float32, of a shape that extends to `[B, N, S, T]`; None without masks."""
    total = None
    for name in ("attn_mask", "key_padding_mask"):
        mask = given.get(name)
        if mask is None:
            continue
        added = _added(mask)
        if name == "key_padding_mask":
            added = added.view(-1, 1, 1, k.shape[2])
        elif added.ndim == 3:
            added = added.unflatten(0, (q.shape[0], q.shape[1]))
        total = added if total is None else total + added
    return total


def hidden_keys(module: Any, given: dict[str, Any], q: Tensor, k: Tensor) -> Tensor | None:
    """Which keys a query does not see, boolean, of a shape that extends to `[B, N, S, T]`."""
    added = added_mask(given, q, k)
    return None if added is None else added == float("-inf")


def _added(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.detach().float()
    return torch.zeros(mask.shape, dtype=torch.float32, device=mask.device).masked_fill(mask, float("-inf"))
