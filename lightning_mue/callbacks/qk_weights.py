"""Finds attentions for `QKClip`: the rows of weights that make their queries and keys, and what cannot be bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_mue.callbacks.monitors.probes import find_modules
from lightning_mue.callbacks.monitors.seeing.torch_attention import QueryKeyRows, WeightRows, rows_of_torch
from lightning_mue.checks import listed
from lightning_mue.contract import is_attention_core
from lightning_mue.sharded import is_sharded

#: Names of the query and key weights, or of the linear layers that hold them, beside an attention core.
_PAIRS = (("w_q", "w_k"), ("q_proj", "k_proj"), ("wq", "wk"), ("to_q", "to_k"), ("query", "key"), ("q", "k"))


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
            around, rows = module, rows_of_torch(module)
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
