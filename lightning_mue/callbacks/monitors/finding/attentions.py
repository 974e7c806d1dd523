"""Attentions: the modules inside which queries meet keys."""

from __future__ import annotations

from torch import nn

from lightning_mue.callbacks.monitors.finding.reading import Found, Reading, SearchResult, by_pattern, inside
from lightning_mue.contract import is_attention_core
from lightning_mue.parameterizations.rules.roles import Role


def find_attentions_of(reading: Reading, pattern: str | None = None) -> SearchResult:
    """The attentions: named by pattern, declared cores, torch's own, those round a query matrix, those called attention.

    Of modules inside each other the first kind in this list is taken, and the innermost of one kind.

    Raises:
        ValueError: If the pattern matches nothing.
    """
    names = by_pattern(reading, "attention", pattern) if pattern is not None else []
    found = {name: _found(reading, name, "named") for name in names}
    kinds = (
        ("mue_attention_core", [n for n, m in reading.modules.items() if is_attention_core(m)]),
        ("nn.MultiheadAttention", [n for n, m in reading.modules.items() if isinstance(m, nn.MultiheadAttention)]),
        ("query matrix", round_queries(reading)),
        ("class", [n for n, m in reading.modules.items() if _is_called_attention(m)]),
        ("query matrix of the layer", round_queries(reading, layers=True)),
    )
    for how, candidates in kinds:
        known = list(found)
        for name in candidates:
            clash = inside(name, known) or any(inside(other, [name]) for other in known)
            inner = any(other != name and inside(other, [name]) for other in candidates)
            if not clash and not inner:
                found[name] = _found(reading, name, how)
    order = {name: i for i, name in enumerate(reading.modules)}
    kept = sorted(found.values(), key=lambda each: order[each.name])
    missing = [f"{each.name}: keys that no weight makes" for each in kept if _has_extra_keys(each.module)]
    return SearchResult([each for each in kept if not _has_extra_keys(each.module)], missing)


def _found(reading: Reading, name: str, how: str) -> Found:
    return Found(name, reading.modules[name], "attention", how)


def _has_extra_keys(module: nn.Module) -> bool:
    torch_own = isinstance(module, nn.MultiheadAttention)
    return torch_own and (module.bias_k is not None or bool(module.add_zero_attn))


def round_queries(reading: Reading, *, layers: bool = False) -> list[str]:
    """Names of the modules that hold query matrices beside matrices of keys.

    ``layers``: whole layers instead, which hold them themselves; not those with a router, whose softmax is none of attention.
    """
    names = []
    routed = {reading.layer(info.name) for info in reading.of_role(Role.ROUTER)}
    for info in reading.infos:
        if info.query is None or len(info.shape) < 2 or info.role is Role.QK_NORM:
            continue
        owner = reading.owner(info.path)
        name = owner.rpartition(".")[0] if owner == info.path or reading.is_adapted(owner) else owner
        if name and (name == reading.layer(info.name)) == layers and not (layers and name in routed):
            names.append(name)
    return list(dict.fromkeys(names))


def _is_called_attention(module: nn.Module) -> bool:
    called = type(module).__name__.lower()
    owns = any(p.ndim > 1 for child in (module, *module.children()) for p in child.parameters(recurse=False))
    return owns and ("attention" in called or "attn" in called)
