"""Finds attentions for `QKClip`: the rows of weights that make their queries and keys, and what cannot be bounded.

Shape legend: N query heads, M key heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_mue.callbacks.monitors.probes import find_modules
from lightning_mue.callbacks.monitors.seeing.torch_attention import QueryKeyRows, WeightRows, rows_of_torch
from lightning_mue.checks import listed
from lightning_mue.contract import is_attention_core
from lightning_mue.sharded import is_sharded

#: Names of the query and key weights, or of the linear layers that hold them, beside an attention core.
_PAIRS = (("w_q", "w_k"), ("q_proj", "k_proj"), ("wq", "wk"), ("to_q", "to_k"), ("query", "key"), ("q", "k"))


#: Names of the matrix that makes the queries of a latent attention; the first one there is.
_LATENT_QUERIES = ("q_b_proj", "q_proj")


class LatentSizes(NamedTuple):
    """Sizes of a head of a latent attention (MLA of DeepSeek): not rotated, rotated, and values."""

    nope: int
    rope: int
    value: int


class AttentionWeights(NamedTuple):
    """What makes queries and keys of an attention.

    The rows of a latent attention's keys also make values, and the rotated part of its keys is one for all heads: only the
    queries of that part can follow the factor of a head.
    """

    rows: QueryKeyRows
    latent: LatentSizes | None = None

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of query rows and of key rows."""
        queries, keys = self.rows.queries[0], self.rows.keys[0]
        return queries.stop - queries.start, keys.stop - keys.start

    def has_heads(self, n_heads: int, width: int | None = None) -> bool:
        """Whether the rows are those of so many query heads, of this width if it is known."""
        queries, keys = self.sizes
        own = queries // max(1, n_heads)
        known = own * n_heads == queries and width in (None, own)
        return known and (self.latent.nope + self.latent.rope == own if self.latent else keys % own == 0)

    def row_factors(self, factor_N: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the query rows and of the key rows that multiply the logits of each head by its own."""
        if self.latent is not None:
            root_N = factor_N.sqrt()
            nope, rope, value = self.latent
            queries = _in_heads((root_N, nope), (factor_N, rope))
            return queries, _in_heads((root_N, nope), (torch.ones_like(root_N), value))
        rows, key_rows = self.sizes
        width = rows // len(factor_N)
        n_keys = key_rows // width
        key_M = factor_N.view(n_keys, -1).amin(-1).sqrt()
        query_N = factor_N / key_M.repeat_interleave(len(factor_N) // n_keys)
        return _in_heads((query_N, width)), _in_heads((key_M, width))


def _in_heads(*parts: tuple[Tensor, int]) -> Tensor:
    """A factor for each row of a weight whose rows are heads of these parts."""
    return torch.cat([factor.unsqueeze(1).expand(-1, size) for factor, size in parts], 1).flatten()


def find_attentions(model: nn.Module) -> tuple[list[tuple[str, nn.Module, AttentionWeights]], list[str]]:
    """Return the attentions whose logits can be measured and bounded, and what is left out and why.

    Those are declared cores, ``nn.MultiheadAttention``, and any class called attention that holds its query and key matrices.
    """
    modules = find_modules(model, lambda _: True)
    found, left_out, seen = list[Any](), list[str](), set[str]()
    for name, module in modules.items():
        around = modules[name.rpartition(".")[0]] if is_attention_core(module) else module
        if is_attention_core(module):
            seen.add(name.rpartition(".")[0])
        elif isinstance(module, nn.MultiheadAttention):
            seen |= {name, *(f"{name}.{child}" for child, _ in module.named_modules())}
        else:
            continue
        _sort(name, module, around, found, left_out)
    for name, module in modules.items():
        if _is_other(module) and not any(s == name or s.startswith(f"{name}.") for s in seen):
            _sort(name, module, module, found, left_out)
    return found, left_out


def _sort(name: str, module: nn.Module, around: nn.Module, found: list[Any], left_out: list[str]) -> None:
    weights = _weights_of(around)
    reason = _refusal(around, weights)
    if reason is None:
        found.append((name, module, weights))
    else:
        left_out.append(f"{name} ({reason})")


def _is_other(module: nn.Module) -> bool:
    owns = any(p.ndim > 1 for child in (module, *module.children()) for p in child.parameters(recurse=False))
    called = type(module).__name__.lower()
    return owns and ("attention" in called or "attn" in called) and not isinstance(module, nn.MultiheadAttention)


def _refusal(around: nn.Module, weights: AttentionWeights | None) -> str | None:
    norms = [n for n, m in around.named_children() if "norm" in n.lower() and not isinstance(m, nn.Identity)]
    # Latent attentions normalize what goes into their query and key matrices.
    norms = [n for n in norms if weights is None or weights.latent is None or not n.endswith("_a_layernorm")]
    if any(n.lower().replace("_", "").startswith(("q", "k", "norm")) and "out" not in n for n in norms):
        return f"normalized by {listed(norms)}, its logits do not follow the weights"
    if weights is None:
        return "no pair of query and key weights was found beside it"
    if isinstance(getattr(around, "sinks", None), Tensor):
        return "its heads have sinks, whose logits no query makes"
    tensors = [each.tensor for rows in weights.rows for each in rows]
    if any(is_sharded(tensor) for tensor in tensors):
        return "its weights are sharded over ranks"
    return None if all(tensor.requires_grad for tensor in tensors) else "its weights are not trained"


def _weights_of(attention: nn.Module) -> AttentionWeights | None:
    if isinstance(attention, nn.MultiheadAttention):
        rows = rows_of_torch(attention)
        return None if rows is None else AttentionWeights(rows)
    if hasattr(attention, "kv_b_proj"):
        return _latent(attention)
    for names in _PAIRS:
        both = [tuple(_own_rows(getattr(attention, name, None))) for name in names]
        if all(both):
            return AttentionWeights(QueryKeyRows(*both))
    return None


def _latent(attention: Any) -> AttentionWeights | None:
    """Those of an MLA; None unless its matrices have the rows that its sizes say."""
    sizes = [getattr(attention, name, 0) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
    made = [each for name in _LATENT_QUERIES if (each := getattr(attention, name, None)) is not None]
    queries, keys = (tuple(_own_rows(each)) for each in (made[0] if made else None, attention.kv_b_proj))
    if not queries or not keys or not all(sizes):
        return None
    nope, rope, value = sizes
    if queries[0].stop % (nope + rope) or queries[0].stop // (nope + rope) != keys[0].stop / (nope + value):
        return None
    return AttentionWeights(QueryKeyRows(queries, keys), LatentSizes(nope, rope, value))


def _own_rows(held: Any) -> Iterator[WeightRows]:
    tensors = [held] if isinstance(held, Tensor) else [held.weight, held.bias] if isinstance(held, nn.Linear) else []
    yield from (WeightRows(tensor, 0, len(tensor)) for tensor in tensors if tensor is not None)
