"""Heads: the modules whose outputs are the logits over the vocabulary or the classes."""

from __future__ import annotations

import re

from lightning_mue.callbacks.monitors.finding.reading import Found, Reading, SearchResult, by_pattern
from lightning_mue.contract import declared_roles, returns_lm_logits, role_of_output
from lightning_mue.names import is_embedding, is_head
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, module_form
from lightning_mue.parameterizations.rules.roles import Role

#: Names of projections into a space in which images and texts are compared (CLIP), or in front of a head.
_PROJECTION = re.compile(r"(^|[._])(proj|project\w*|projection|projector)$", re.IGNORECASE)


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
    heads = _without_projections(reading, list(found.values())) or _by_name(reading) or _last_linear(reading)
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


def _without_projections(reading: Reading, heads: list[Found]) -> list[Found]:
    """Without a linear layer in front of another head, one with a single output, and projections into a space of embeddings."""
    fans = {each.name: each.info.fans for each in heads if each.info is not None}
    vocabularies = _table_rows(reading)
    kept = []
    for each in heads:
        leaves = fans.get(each.name, (0, 2))[1]
        in_front = any(name != each.name and other[0] == leaves < other[1] for name, other in fans.items())
        projects = bool(_PROJECTION.search(each.name)) and not is_head(each.name) and leaves not in vocabularies
        if leaves > 1 and not in_front and not projects:
            kept.append(each)
    return kept


def _table(reading: Reading) -> list[Found]:
    """The largest look-up table, which a model of layers without a head may multiply with."""
    tables = [info for info in reading.of_role(Role.EMBEDDING) if info.form == "embedding" and reading.owner(info.path)]
    tables = [info for info in tables if "pos" not in info.name.lower()] or tables
    largest = max(tables, key=lambda info: info.shape[0], default=None)
    if largest is None or not any(reading.layer(info.name) for info in reading.infos):
        return []
    name = reading.owner(largest.path)
    return [Found(name, reading.modules[name], "head", "the table, if the model multiplies with it", largest)]


def _by_name(reading: Reading) -> list[Found]:
    """Linear layers called a head, or the last one of a sequence that is (``classifier.2``)."""
    last = {re.sub(r"(\.\d+)+$", "", name): name for name in _linear(reading)}
    names = [n for n in _linear(reading) if is_head(n)] or [name for stem, name in last.items() if is_head(stem)]
    outermost = min((name.count(".") for name in names), default=0)  # blocks may have an "output" of their own
    return [Found(n, reading.modules[n], "head", "name") for n in names if n.count(".") == outermost]


def _last_linear(reading: Reading) -> list[Found]:
    """The last linear layer, if it has one output for each row of the token table."""
    last = next(reversed(_linear(reading)), None)
    if last is None or getattr(reading.modules[last], "out_features", None) not in _table_rows(reading):
        return []
    return [Found(last, reading.modules[last], "head", "the last linear layer, as wide as the vocabulary")]


def _table_rows(reading: Reading) -> set[int]:
    return {info.shape[0] for info in reading.infos if info.form == "embedding"}


def _linear(reading: Reading) -> list[str]:
    return [name for name, module in reading.modules.items() if module_form(module) == "linear"]
