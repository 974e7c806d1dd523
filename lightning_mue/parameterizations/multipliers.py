"""Forward multipliers: set on the modules that expose them, folded into the weights where none does.

A module exposes multipliers through ``mue_multipliers``, a mapping kind -> attribute name, e.g.
``{"ffn": "output_multiplier", "route": "route_scale"}``. The attributes are plain floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_mue.parameterizations.modules import BaseIndex, clean_name, trainable_parameters
from lightning_mue.parameterizations.monomial import parse
from lightning_mue.parameterizations.roles import Role
from lightning_mue.parameterizations.table import Kind, Parameterization

#: The value that a kind has in a base without it: a dense FFN is an MoE of one expert with route scale 1.
_ABSENT = {"route": 1.0, "ffn": 1.0}
_DOWN_ROLES = frozenset({Role.FFN_DOWN, Role.EXPERT_DOWN, Role.SHARED_DOWN})


def active_width(branch: nn.Module) -> float:
    """The active FFN width A that an FFN or MoE branch declares."""
    return float(branch.active_width)  # type: ignore[arg-type]


def exposed(module: nn.Module) -> Iterator[tuple[str, str, nn.Module, str]]:
    """Yields (dotted path of the attribute, kind, module, attribute name) for every multiplier in a module tree."""
    for name, child in module.named_modules():
        for kind, attribute in getattr(child, "mue_multipliers", {}).items():
            clean = clean_name(name)
            yield f"{clean}.{attribute}" if clean else attribute, kind, child, attribute


def read_multipliers(module: nn.Module) -> dict[str, float]:
    """The values of all exposed multipliers by dotted path, e.g. to go into a checkpoint."""
    return {path: float(getattr(child, attribute)) for path, _, child, attribute in exposed(module)}


def set_multipliers(module: nn.Module, values: Mapping[str, float]) -> None:
    """Sets exposed multipliers by dotted path.

    Raises:
        ValueError: If a path is not exposed by the module.
    """
    sites = {path: (child, attribute) for path, _, child, attribute in exposed(module)}
    unknown = sorted(set(values) - set(sites))
    if unknown:
        raise ValueError(
            f"multipliers: {unknown} are not exposed by {type(module).__name__}; it exposes {sorted(sites)}."
        )
    for path, value in values.items():
        child, attribute = sites[path]
        setattr(child, attribute, float(value))


def multiplier_sites(
    rule: Parameterization, model: nn.Module, base: nn.Module, ratios: Mapping[str, float], alpha: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Computes the multipliers of the target.

    Args:
        rule: The rule, whose ``multipliers`` give a cell a kind.
        model: The target.
        base: The base.
        ratios: Symbol -> ratio target/base of the whole model.
        alpha: Depth exponent.

    Returns:
        (dotted path -> value to set, parameter name -> multiplier to fold into it).

    Raises:
        ValueError: If a multiplier other than 1 is needed that the model neither exposes nor can have folded.
    """
    base_sites = {path: (kind, child, attribute) for path, kind, child, attribute in exposed(base)}
    sites = list(exposed(model))
    index = BaseIndex(base_sites, [path for path, *_ in sites])
    values: dict[str, float] = {}
    for path, kind, child, attribute in sites:
        if kind not in rule.multipliers:
            continue
        old = _base_site(path, kind, base_sites, index)
        local = dict(ratios)
        if old is not None and hasattr(child, "active_width") and hasattr(old[0], "active_width"):
            local["A"] = active_width(child) / active_width(old[0])
        start = float(getattr(*old)) if old is not None else _ABSENT.get(kind, float(getattr(child, attribute)))
        values[path] = start * parse(rule.multipliers[kind]).evaluate(local, alpha)
    present = {kind for _, kind, _, _ in sites}
    return values, _folded(rule, model, present, ratios, alpha)


def _base_site(
    path: str, kind: str, base_sites: Mapping[str, tuple[str, nn.Module, str]], index: BaseIndex
) -> tuple[nn.Module, str] | None:
    name = index.match(path)
    if name is not None and base_sites[name][0] == kind:
        return base_sites[name][1:]
    same_kind = sorted(p for p, (k, _, _) in base_sites.items() if k == kind)
    return base_sites[same_kind[0]][1:] if same_kind else None


def _folded(
    rule: Parameterization, model: nn.Module, present: set[str], ratios: Mapping[str, float], alpha: float
) -> dict[str, float]:
    """What must be folded because no module exposes it; only the FFN output can be: it ends in one linear map."""
    folded: dict[str, float] = {}
    for kind, cell in rule.multipliers.items():
        value = parse(cell).evaluate(ratios, alpha)
        if kind in present or value == 1.0:
            continue
        downs = [info.name for info in trainable_parameters(model) if info.role in _DOWN_ROLES]
        if kind in ("ffn", "route") and downs:
            for name in downs:
                folded[name] = folded.get(name, 1.0) * value
            continue
        raise ValueError(
            f"rule={rule.name!r} needs a {kind} multiplier of {value:g} ({cell}), but no module of {type(model).__name__} "
            f"exposes one. Give the module that applies it a float attribute and declare it, e.g. mue_multipliers = "
            f"{{'{kind}': '{kind}_multiplier'}}."
        )
    return folded


def fold(cells: dict[str, Any], multiplier: float, kind: Kind) -> dict[str, Any]:
    """Moves a forward multiplier m into a weight, so that the function trains alike (theory.md section 2).

    Args:
        cells: Factors ``init``, ``lr``, ``wd`` and ``eps``.
        multiplier: The forward multiplier m.
        kind: The update of the parameter.

    Returns:
        The factors with m folded in.
    """
    if multiplier == 1.0:
        return cells
    m = multiplier
    factors = {
        "adamw": {"init": m, "lr": m, "wd": 1 / m, "eps": 1 / m},
        "sgd": {"init": m, "lr": m**2, "wd": m**-2},
        # The step is relative to the radius, which the init sets.
        "sphere": {"init": m},
        "adam_sphere": {"init": m, "eps": 1 / m},
    }[kind]
    return {name: value * factors.get(name, 1.0) for name, value in cells.items()}
