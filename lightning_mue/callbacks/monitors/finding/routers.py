"""Routers: the modules whose weights score the experts."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_mue.callbacks.monitors.finding.reading import Found, Reading, SearchResult, by_pattern, inside
from lightning_mue.contract import is_router
from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.rules.roles import Role

_TOP_K: tuple[str, ...] = (
    "top_k",
    "topk",
    "num_experts_per_tok",
    "num_experts_per_token",
    "n_expert_per_token",
    "n_activated_experts",
)
_TOP_K += ("n_activated_experts", "moe_top_k", "moe_k", "num_selects")


def find_routers(reading: Reading, pattern: str | None = None) -> SearchResult:
    """The routers: named by pattern, declared (``mue_router``), and those whose weight has the role of a router.

    The gate of a shared expert, which has one output, is none.

    Raises:
        ValueError: If the pattern matches nothing that has a weight of two dimensions.
    """
    found: dict[str, Found] = {}
    if pattern is not None:
        for name in by_pattern(reading, "routers", pattern, lambda m: is_router(m) or _weight(m) is not None):
            info = next(
                (i for i in reading.infos if i.path == name or i.path == f"{name}.{_weight(reading.modules[name])}"),
                None,
            )
            found[name] = Found(name, reading.modules[name], "router", "named", info)
    for name, module in reading.modules.items():
        if is_router(module) and name not in found:
            found[name] = Found(name, module, "router", "mue_router")
    first, missing = list(found), []
    for info in reading.of_role(Role.ROUTER):
        name = reading.owner(info.path)
        if len(info.shape) != 2 or n_experts(info) < 2 or inside(name, first):
            continue
        if name in found:
            missing.append(f"{info.path}: a second router of one module")
            continue
        found[name] = Found(name, reading.modules[name], "router", "role", info)
    return SearchResult(list(found.values()), missing)


def n_experts(info: ParameterInfo) -> int:
    """Number of experts that a router's weight scores."""
    return info.fans[1]


def weight_name(router: Found) -> str:
    """The attribute that holds a router's weight; empty for one inside an adapter, of whose output it makes only a part."""
    assert router.info is not None
    if hasattr(router.module, "base_layer"):
        return ""
    names = (router.info.name, *router.info.also)
    return next((name for name in names if name.startswith(f"{router.name}.")), names[0]).rpartition(".")[2]


def router_scopes(router: Found, reading: Reading) -> list[nn.Module]:
    """The modules in which a router's choice is made: itself, the one round it, and those round that within its layer."""
    scopes, layer, name = [router.module], reading.layer(f"{router.name}.x"), router.name
    while "." in name and (len(scopes) == 1 or inside(name, [layer] if layer else [])):
        name = name.rpartition(".")[0]
        if name != layer or len(scopes) == 1:
            scopes.append(reading.modules[name])
    return scopes


def _weight(module: nn.Module) -> str | None:
    return next((name for name, p in module.named_parameters(recurse=False) if p.ndim == 2), None)


def top_k_near(reading: Reading, name: str) -> int | None:
    """How many experts a token uses, by the attributes and configurations of the modules round a router; None if none says it."""
    while True:
        module: Any = reading.modules.get(name)
        for source in (module, getattr(module, "config", None), getattr(module, "args", None)):
            value = next((v for key in _TOP_K if type(v := getattr(source, key, None)) is int), None)
            if value is not None and (source is module or value > 0):
                return value
        if not name:
            return None
        name = name.rpartition(".")[0]
