"""Residual branches: the modules whose outputs are added to the residual stream."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import takewhile

from torch import nn

from lightning_mue.callbacks.monitors.finding.attentions import find_attentions_of, round_queries
from lightning_mue.callbacks.monitors.finding.reading import Found, Reading, SearchResult, by_pattern, inside
from lightning_mue.contract import branch_kind
from lightning_mue.names import in_attention
from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.reading.roles.branches import open_branches
from lightning_mue.parameterizations.rules.roles import Role

_EXPERTS = (Role.EXPERT_UP, Role.EXPERT_DOWN, Role.SHARED_UP, Role.SHARED_DOWN)
_FFN = (Role.FFN_UP, Role.FFN_DOWN, *_EXPERTS)
_ENTERS = re.compile(r"(^|[._])(q|k|v|kv|qkv|query|key|value)(_?proj)?$", re.IGNORECASE)
#: Kind of a branch that is neither attention nor FFN: a state-space layer, a convolution.
OTHER = "mixer"


def find_branches(reading: Reading, patterns: str | Mapping[str, str] | None = None) -> SearchResult:
    """The branches: named by pattern, declared (``mue_branch``), and read, where these are not inside of one another.

    Args:
        reading: The model.
        patterns: A regular expression on names of modules, or kind -> regular expression.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    given = patterns if isinstance(patterns, Mapping) else {} if patterns is None else {"": patterns}
    found: dict[str, Found] = {}
    for kind, pattern in given.items():
        for name in by_pattern(reading, "branches", pattern):
            found[name] = Found(name, reading.modules[name], kind or _kind_by_name(name), "named")
    declared = [(name, str(branch_kind(m))) for name, m in reading.modules.items() if branch_kind(m) is not None]
    for name, named in declared:
        if name not in found:
            found[name] = Found(name, reading.modules[name], named, "mue_branch")
    missing = [reading.trouble] if reading.trouble else []
    first = list(found)
    for each in _read(reading, missing):
        if not inside(each.name, first) and not any(inside(name, [each.name]) for name in first):
            found.setdefault(each.name, each)
    for name in round_queries(
        reading
    ):  # where the reading shows no end, an attention returns its branch's output itself
        layer = reading.layer(f"{name}.x")
        known = any(each.kind == "attention" and inside(each.name, [layer]) for each in found.values())
        if layer and not known and not inside(name, list(found)):
            found[name] = Found(name, reading.modules[name], "attention", "query matrix")
    missing += [f"{i.path}: its role is not known" for i in _unknown(reading) if not inside(i.path, list(found))]
    order = {name: i for i, name in enumerate(reading.modules)}
    return SearchResult(sorted(found.values(), key=lambda each: order[each.name]), missing)


def _read(reading: Reading, missing: list[str]) -> Iterable[Found]:
    """The branches that the roles of parameters show."""
    ends = [info for info in reading.infos if "residual" in info.folds and info.role is not Role.BIAS]
    experts: dict[str, list[ParameterInfo]] = defaultdict(list)
    attentions = [name for name in find_attentions_of(reading).names() if reading.layer(f"{name}.x") != name != ""]
    for info in _unknown(reading):
        layer = reading.layer(info.name)
        if len(info.shape) == 3 and any(reading.layer(router.name) == layer for router in reading.of_role(Role.ROUTER)):
            experts[layer].append(info)
    for info in ends:
        layer = reading.layer(info.name)
        if info.role in (Role.EXPERT_DOWN, Role.SHARED_DOWN):
            experts[layer].append(info)
            continue
        name = reading.owner(info.path)
        if _ENTERS.search(info.path):  # the only matrix of known role: the output's is among experts
            name = name.rpartition(".")[0]
        if not name or name == layer:
            missing.append(f"{info.path}: its layer multiplies with the weight itself")
            continue
        kind = "attention" if inside(name, attentions) else _kind(reading, info, layer)
        yield Found(name, reading.modules[name], kind, "role", info)
    for layer, infos in experts.items():
        for name in _blocks(reading, layer, infos):
            yield Found(name, reading.modules[name], "ffn", "experts")
    for (layer, part), members in open_branches(reading.infos).items():
        yield from _open(reading, layer, part, members, missing)


def _unknown(reading: Reading) -> list[ParameterInfo]:
    """Matrices in layers whose role the reading could not tell."""
    return [i for i in reading.infos if i.role is None and sum(n > 1 for n in i.shape) > 1 and reading.layer(i.name)]


def _open(reading: Reading, layer: str, part: str, members: list[ParameterInfo], missing: list[str]) -> Iterable[Found]:
    """A branch whose last matrix is not known is the module that holds all of it, unless a norm behind it was found."""
    name = f"{layer}.{part}" if part and part != "(FFN)" else layer
    normed = any(
        "residual" in i.folds and i.role is Role.NORM and reading.layer(i.name) == layer for i in reading.infos
    )
    if normed:
        return
    if name == layer or name not in reading.modules:
        missing.append(f"{name}: which of its matrices ends the branch is not known")
        return
    kind = "ffn" if all(info.role in _FFN for info in members) else _kind_by_name(part)
    yield Found(name, reading.modules[name], kind, "the layer's child")


def _blocks(reading: Reading, layer: str, downs: list[ParameterInfo]) -> list[str]:
    """The modules that return the experts' outputs: the one around experts, shared experts and router, if it is not the layer."""
    routers = [i for i in reading.of_role(Role.ROUTER) if reading.layer(i.name) == layer]
    ups = [i for i in reading.of_role(Role.EXPERT_UP, Role.SHARED_UP) if reading.layer(i.name) == layer]
    routed = [info for info in (*downs, *ups) if info.role in (Role.EXPERT_DOWN, Role.EXPERT_UP)]
    whole = _around(reading, [*downs, *ups, *routers])
    if whole and whole != layer:
        return [whole]
    parts = [_around(reading, routed), *(_around(reading, [info]) for info in downs if info not in routed)]
    return [name for name in dict.fromkeys(parts) if name and name != layer]


def _around(reading: Reading, infos: list[ParameterInfo]) -> str:
    """The innermost module that holds parameters; for a list of modules, which is never called, the module that holds it."""
    columns = zip(*(info.path.split(".") for info in infos), strict=False)
    shared = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    name = reading.owner(".".join(shared))
    while name and not _is_called(reading, name):
        name = name.rpartition(".")[0]
    return name


def _is_called(reading: Reading, name: str) -> bool:
    """Not so a list, or another container, whose parts are called by what is around it."""
    return type(reading.modules[name]).forward is not nn.Module.forward


def _kind(reading: Reading, info: ParameterInfo, layer: str) -> str:
    rest = info.path[len(layer) + 1 :]
    if info.role in _FFN:
        return "ffn"
    beside = info.path.rpartition(".")[0]
    queries = [other.path for other in reading.infos if other.query is not None and reading.layer(other.name) == layer]
    around = any(path.rpartition(".")[0] == beside or (beside != layer and inside(path, [beside])) for path in queries)
    if in_attention(f"{rest}.x") or around:
        return "attention"
    return _kind_by_name(rest)


def _kind_by_name(name: str) -> str:
    words = name.lower()
    if "attn" in words or "attention" in words or in_attention(f"{name}.x"):
        return "attention"
    return "ffn" if any(word in words for word in ("mlp", "ffn", "feed", "ff", "moe", "expert")) else OTHER
