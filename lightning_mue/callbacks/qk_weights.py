"""Finds attentions for `QKClip`: the rows of weights that make their queries and keys, and what cannot be bounded.

Shape legend: N heads, k head dimension, B batch, S query positions, T key positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_mue.callbacks.monitors.probes import find_modules
from lightning_mue.checks import listed
from lightning_mue.contract import is_attention_core
from lightning_mue.sharded import is_sharded

#: Names of the query and key weights, or of the linear layers that hold them, beside an attention core.
_PAIRS = (("w_q", "w_k"), ("q_proj", "k_proj"), ("wq", "wk"), ("to_q", "to_k"), ("query", "key"), ("q", "k"))


class WeightRows(NamedTuple):
    """Rows of a weight, or of a bias, that make queries or keys."""

    tensor: Tensor
    start: int
    stop: int


class QueryKeyRows(NamedTuple):
    """The rows of an attention's queries and keys."""

    queries: tuple[WeightRows, ...]
    keys: tuple[WeightRows, ...]


def find_attentions(model: nn.Module) -> tuple[list[tuple[str, nn.Module, QueryKeyRows]], list[str]]:
    """Return the attentions whose logits can be measured and bounded, and what is left out and why."""
    modules = find_modules(model, lambda _: True)
    found, left_out, seen = [], [], set[str]()
    for name, module in modules.items():
        if is_attention_core(module):
            parent = name.rpartition(".")[0]
            around = modules[parent]
            seen.add(parent)
            rows = _rows_beside(around)
        elif isinstance(module, nn.MultiheadAttention):
            around, rows = module, _rows_of_torch(module)
            seen |= {name, *(f"{name}.{child}" for child, _ in module.named_modules())}
        else:
            continue
        reason = _refusal(around, rows)
        if reason is None and rows is not None:
            found.append((name, module, rows))
        else:
            left_out.append(f"{name} ({reason})")
    others = [
        n for n, m in modules.items() if _is_other(n, m) and not any(s == n or s.startswith(f"{n}.") for s in seen)
    ]
    return found, left_out + [f"{name} (its logits cannot be seen)" for name in others]


def _is_other(name: str, module: nn.Module) -> bool:
    owns = any(p.ndim > 1 for child in (module, *module.children()) for p in child.parameters(recurse=False))
    called = type(module).__name__.lower()
    return owns and ("attention" in called or "attn" in called) and not isinstance(module, nn.MultiheadAttention)


def _refusal(around: nn.Module, rows: QueryKeyRows | None) -> str | None:
    norms = [n for n, m in around.named_children() if "norm" in n.lower() and not isinstance(m, nn.Identity)]
    if any(n.lower().replace("_", "").startswith(("q", "k", "norm")) and "out" not in n for n in norms):
        return f"normalized by {listed(norms)}, its logits do not follow the weights"
    if rows is None:
        return "no pair of query and key weights was found beside it"
    tensors = [each.tensor for each in (*rows.queries, *rows.keys)]
    if any(is_sharded(tensor) for tensor in tensors):
        return "its weights are sharded over ranks"
    return None if all(tensor.requires_grad for tensor in tensors) else "its weights are not trained"


def _rows_beside(attention: nn.Module) -> QueryKeyRows | None:
    for names in _PAIRS:
        both = [tuple(_own_rows(getattr(attention, name, None))) for name in names]
        if all(both):
            return QueryKeyRows(*both)
    return None


def _own_rows(held: Any) -> Iterator[WeightRows]:
    tensors = [held] if isinstance(held, Tensor) else [held.weight, held.bias] if isinstance(held, nn.Linear) else []
    yield from (WeightRows(tensor, 0, len(tensor)) for tensor in tensors if tensor is not None)


def _rows_of_torch(module: nn.MultiheadAttention) -> QueryKeyRows | None:
    d = module.embed_dim
    if module.bias_k is not None:
        return None  # a key that no weight makes
    biases = [] if module.in_proj_bias is None else [module.in_proj_bias]
    if module.in_proj_weight is not None:
        q, k = ([WeightRows(module.in_proj_weight, start, start + d)] for start in (0, d))
    else:
        q, k = ([WeightRows(weight, 0, d)] for weight in (module.q_proj_weight, module.k_proj_weight))
    return QueryKeyRows((*q, *(WeightRows(b, 0, d) for b in biases)), (*k, *(WeightRows(b, d, 2 * d) for b in biases)))


def torch_heads(module: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Queries `[B, N, S, k]` and keys `[B, N, T, k]` in float32."""
    rows = _rows_of_torch(module)
    assert rows is not None
    heads = []
    for x, made in ((query, rows.queries), (key, rows.keys)):
        x = x.unsqueeze(0) if x.ndim == 2 else x if module.batch_first else x.transpose(0, 1)
        weight, *bias = (each.tensor.detach()[each.start : each.stop].float() for each in made)
        y = F.linear(x.detach().float(), weight, *bias)
        heads.append(y.unflatten(-1, (module.num_heads, -1)).transpose(1, 2))
    return heads[0], heads[1]


def hidden_keys(module: Any, given: dict[str, Any], q: Tensor, k: Tensor) -> Tensor | None:
    """Which keys a query does not see, boolean, of a shape that extends to `[B, N, S, T]`."""
    mask, padding = given.get("attn_mask"), given.get("key_padding_mask")
    hidden = None
    if mask is not None:
        hidden = mask if mask.dtype == torch.bool else mask == float("-inf")
        hidden = hidden.unflatten(0, (q.shape[0], q.shape[1])) if hidden.ndim == 3 else hidden
    if padding is not None:
        padded = (padding if padding.dtype == torch.bool else padding == float("-inf")).view(-1, 1, 1, k.shape[2])
        hidden = padded if hidden is None else hidden | padded
    return hidden
