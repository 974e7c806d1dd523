"""Heads: the modules whose outputs are the logits over the vocabulary or the classes."""

from __future__ import annotations

from lightning_mue.callbacks.monitors.finding.reading import Found, Reading, SearchResult, by_pattern
from lightning_mue.contract import declared_roles, returns_lm_logits, role_of_output
from lightning_mue.names import is_embedding, is_head
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, module_form
from lightning_mue.parameterizations.rules.roles import Role


def find_heads(reading: Reading, pattern: str | None = None) -> SearchResult:
    """The heads: by pattern, else declared, else by the role of their weight, else by a head's name.

    A tied weight that no linear layer holds is found by what multiplies with it: ``Found.module`` is then the look-up table,
    and ``how`` is "tied to the table". A model that declares outputs, none of them LM logits, has no head: an image generator.

    Raises:
        ValueError: If the pattern matches nothing.
    """
    if pattern is not None:
        names = by_pattern(reading, "lm_logits", pattern)
        return SearchResult([Found(name, reading.modules[name], "head", "named") for name in names])
    outputs = {role_of_output(module) for module in reading.modules.values()} - {None}
    if outputs and "lm_logits" not in outputs:
        return SearchResult([], [])
    for how, matches in (("mue_role_of_output", returns_lm_logits), ("mue_roles", _owns_unembedding)):
        names = [name for name, module in reading.modules.items() if matches(module)]
        if names:
            return SearchResult([Found(name, reading.modules[name], "head", how) for name in names])
    found = {each.name: each for info in reading.of_role(Role.UNEMBEDDING) if (each := _of_role(reading, info))}
    heads = list(found.values()) or _by_name(reading)
    if heads:
        return SearchResult(heads)
    return SearchResult(_table(reading), ["a head: no parameter is an unembedding"])


def _owns_unembedding(module: object) -> bool:
    roles = declared_roles(module)
    own = {name for name, _ in module.named_parameters(recurse=False)}  # type: ignore[attr-defined]
    return any(role == Role.UNEMBEDDING and name in own for name, role in roles.items())


def _of_role(reading: Reading, info: ParameterInfo) -> Found | None:
    if len(info.shape) < 2:
        return None
    owners = [reading.owner(name.rpartition(".")[0]) for name in (info.name, *info.also)]
    called = [name for name in owners if name and module_form(reading.modules[name]) != "embedding"]
    if called:
        return Found(called[-1], reading.modules[called[-1]], "head", "role", info)
    if info.tied and owners[0]:
        tables = [name for name in owners if is_embedding(name)] or owners
        return Found(tables[-1], reading.modules[tables[-1]], "head", "tied to the table", info)
    return None


def _table(reading: Reading) -> list[Found]:
    """The largest look-up table, which a model of layers without a head may multiply with."""
    tables = [info for info in reading.of_role(Role.EMBEDDING) if info.form == "embedding" and reading.owner(info.path)]
    largest = max(tables, key=lambda info: info.shape[0], default=None)
    if largest is None or not any(reading.layer(info.name) for info in reading.infos):
        return []
    name = reading.owner(largest.path)
    return [Found(name, reading.modules[name], "head", "the table, if the model multiplies with it", largest)]


def _by_name(reading: Reading) -> list[Found]:
    names = [name for name, module in reading.modules.items() if module_form(module) == "linear" and is_head(name)]
    outermost = min((name.count(".") for name in names), default=0)  # blocks may have an "output" of their own
    return [Found(n, reading.modules[n], "head", "name") for n in names if n.count(".") == outermost]
