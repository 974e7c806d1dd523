"""What a plan needs to know of a model, as plain data: sizes, parameters, multipliers, and how a base's weights were drawn."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, get_args

from torch import nn

from lightning_mue.checks import require_choice, require_number, require_types, value_error
from lightning_mue.contract import declared_axes, is_router
from lightning_mue.names import clean_name
from lightning_mue.parameterizations.reading.initial.initializer import KINDS, Init
from lightning_mue.parameterizations.reading.initial.measuring import measure_module
from lightning_mue.parameterizations.reading.parameters import Form, ParameterInfo, Query, list_parameters
from lightning_mue.parameterizations.reading.roles.head import own_scales
from lightning_mue.parameterizations.reading.roles.queries import head_size, read_queries
from lightning_mue.parameterizations.reading.roles.role_names import in_experts, name_roles
from lightning_mue.parameterizations.reading.sites import Site, sites
from lightning_mue.parameterizations.reading.size_inference import read_transformer_lens
from lightning_mue.parameterizations.rules.axes import Axes
from lightning_mue.parameterizations.rules.roles import Role

#: Version of the format in which a base is saved.
VERSION = 1


@dataclass(frozen=True)
class ModelRecord:
    """A model, as far as a plan needs it.

    Attributes:
        model: Name of its class.
        sizes: The sizes that it declares, axis -> size; empty if it declares none.
        inferred: ``head_dim``, ``attention_scale``, ``top_k``, ``embedding_scale`` and ``logit_scale``, read from its modules'
            attributes.
        parameters: In order.
        sites: Forward multipliers that can be set.
        inits: Parameter name -> how it was drawn; empty if that was not measured.
        routing: Setting of routers -> values found.
        run: ``tokens`` and ``batch_tokens`` of the run, if known.
    """

    model: str
    sizes: Mapping[str, float]
    parameters: tuple[ParameterInfo, ...]
    sites: tuple[Site, ...]
    inferred: Mapping[str, float] = field(default_factory=dict)
    inits: Mapping[str, Init] = field(default_factory=dict)
    routing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    run: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only."""
        plain = asdict(self)
        plain["parameters"] = [_plain_parameter(info) for info in self.parameters]
        plain["sites"] = [{**asdict(site), "kinds": list(site.kinds)} for site in self.sites]
        plain["routing"] = {setting: list(found) for setting, found in self.routing.items()}
        return {"lightning_mue_base": VERSION, **plain}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ModelRecord:
        """The inverse of :meth:`to_dict`.

        Raises:
            AttributeError, KeyError, TypeError, ValueError: If it is something else, or was changed since.
        """
        plain = {key: value for key, value in plain.items() if key != "lightning_mue_base"}
        record = cls(
            **{
                **plain,
                "parameters": tuple(_parameter(entry) for entry in plain["parameters"]),
                "sites": tuple(Site(**{**site, "kinds": tuple(site["kinds"])}) for site in plain["sites"]),
                "inits": {name: Init(**init) for name, init in plain["inits"].items()},
                "routing": {setting: tuple(found) for setting, found in plain["routing"].items()},
            }
        )
        _check(record)
        return record


def _check(record: ModelRecord) -> None:
    """Refuses what `describe` cannot have found: a file may have been edited, or damaged."""
    queries = [info.query for info in record.parameters if info.query is not None]
    for part in (record, *record.parameters, *record.sites, *record.inits.values(), *queries):
        require_types(type(part).__init__, vars(part))  # type: ignore[misc]
    for key in ("sizes", "inferred", "run"):
        for name, size in getattr(record, key).items():
            require_number(f"{key}.{name}", size, at_least=0)
    for branch in [*(info.branch for info in record.parameters), *(site.branch for site in record.sites)]:
        if branch is not None and not (branch.keys() == {"A", "E", "a", "h"} and min(branch.values()) > 0):
            raise value_error("branch", found=dict(branch), expected="positive sizes A, E, a, h")
    names = [info.name for info in record.parameters]
    for info in record.parameters:
        require_choice(f"{info.name}.form", info.form, get_args(Form))
        numbers = (*info.shape, *info.fans, *((info.query and info.query.rows) or ()))
        if len(info.fans) != 2 or min((*numbers, info.groups), default=1) < 0 or names.count(info.name) > 1:
            raise value_error(
                info.name, found=f"shape {info.shape}, fans {info.fans}", expected="sizes, for each name once"
            )
    for name, init in record.inits.items():
        require_choice(name, name, names)
        require_choice(f"{name}.kind", init.kind, KINDS)
        require_number(f"{name}.value", init.value)
    for site in record.sites:
        require_number(site.path, site.value)


def _plain_parameter(info: ParameterInfo) -> dict[str, Any]:
    plain = {**asdict(info), "shape": list(info.shape), "fans": list(info.fans), "folds": sorted(info.folds)}
    plain["also"] = list(info.also)
    if info.query is not None and info.query.rows is not None:
        plain["query"]["rows"] = list(info.query.rows)
    return {**plain, "role": info.role.value if info.role is not None else None}


def _parameter(plain: Mapping[str, Any]) -> ParameterInfo:
    role = Role(plain["role"]) if plain["role"] is not None else None
    shape, fans = tuple(plain["shape"]), tuple(plain["fans"])
    query = Query(**plain["query"]) if plain.get("query") else None  # bases that older versions wrote hold none
    if query is not None and query.rows is not None:
        query = replace(query, rows=(query.rows[0], query.rows[1], query.rows[2]))
    folds, also = frozenset(plain["folds"]), tuple(plain.get("also", ()))
    known = {"role": role, "shape": shape, "fans": fans, "folds": folds, "query": query, "also": also}
    return ParameterInfo(**{**plain, **known})


def describe(
    model: nn.Module,
    roles: Mapping[str, str] | None = None,
    multipliers: Mapping[str, str] | None = None,
    *,
    measure: bool = False,
) -> ModelRecord:
    """Reads a module, also on ``meta``; for ``roles`` and ``multipliers`` see :func:`lightning_mue.plan`.

    With ``measure`` also how its parameters were drawn, which must be freshly initialized.

    Raises:
        ValueError: For a pattern that matches nothing, or sizes by names that are no axes.
    """
    infos = read_queries(model, name_roles(read_transformer_lens(list_parameters(model, roles))))
    known = {info.name for info in infos}
    inits = measure_module(model) if measure else {}
    return ModelRecord(
        model=type(model).__name__,
        sizes=_declared_sizes(model),
        parameters=tuple(infos),
        sites=tuple(sites(model, multipliers)),
        inferred={**_attributes(model, infos), **own_scales(model)},
        inits={name: init for name, init in inits.items() if name in known},
        routing=_routing(model),
    )


def _declared_sizes(module: nn.Module) -> dict[str, float]:
    """The sizes that a module declares by its method ``mue_axes``; empty if it has none."""
    sizes = declared_axes(module)
    known = [f.name for f in fields(Axes)]
    if unknown := sorted(set(sizes) - set(known)):
        found = f"{', '.join(unknown)}, declared by {type(module).__name__}"
        raise value_error("mue_axes", found=found, expected=f"axes among {', '.join(known)}")
    return sizes


_TOP_K = ("top_k", "topk", "num_experts_per_tok", "n_activated_experts", "moe_top_k")
#: The same in a module's ``config``, where ``top_k`` may be a setting of text generation.
_CONFIG_TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "n_expert_per_token",
    "n_activated_experts",
    "moe_top_k",
)


def _attributes(module: nn.Module, infos: list[ParameterInfo]) -> dict[str, float]:
    """Reads what the shapes do not show: size and scale of an attention head, and the number of experts that a token uses."""
    roles = (Role.ROUTER, Role.EXPERT_UP, Role.EXPERT_DOWN)
    stacks = {info.name for info in infos if info.role is None and info.form == "raw" and len(info.shape) == 3}
    experts = [i.name for i in infos if i.role in roles or in_experts(i.path) or i.name in stacks]
    around = {""} | {name[: dot.start()] for name in experts for dot in re.finditer(r"\.", name)} if experts else set()
    found: dict[str, float] = {}
    for name, child in module.named_modules():
        if clean_name(name) in around and (top_k := _top_k(child)):
            found["top_k"] = top_k  # the innermost comes last
    queries = [info.query for info in infos if info.query is not None and info.query.head_dim is not None]
    if head := queries[0].head_dim if queries else head_size(module):
        found["head_dim"] = head
    if queries and queries[0].scale is not None:
        found["attention_scale"] = queries[0].scale
    return found


def _top_k(module: nn.Module) -> int | None:
    return _number(module, (*_TOP_K, *_CONFIG_TOP_K), int) or _number(
        getattr(module, "config", None), _CONFIG_TOP_K, int
    )


def _number(module: Any, names: tuple[str, ...], kind: type) -> Any:
    return next((value for name in names if type(value := getattr(module, name, None)) is kind), None)


def _routing(model: nn.Module) -> dict[str, tuple[str, ...]]:
    routers = [module for module in model.modules() if is_router(module)]
    found = {s: {str(getattr(r, s)) for r in routers if hasattr(r, s)} for s in ("scoring", "gate")}
    return {setting: tuple(sorted(values)) for setting, values in found.items() if values}
