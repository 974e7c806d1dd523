"""Forward multipliers: set on the modules that expose them, folded into the weights where none does.

A module exposes multipliers through ``mue_multipliers``, a mapping kind -> attribute name, e.g.
``{"ffn": "output_multiplier", "route": "route_scale"}``. The attributes are plain floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from lightning_mue.parameterizations.modules import BaseIndex, branch_ratios, clean_name
from lightning_mue.parameterizations.monomial import parse
from lightning_mue.parameterizations.roles import Role
from lightning_mue.parameterizations.table import Kind, Parameterization

#: The value that a kind has in a base without it: a dense FFN is an MoE of one expert with route scale 1.
_ABSENT = {"route": 1.0, "ffn": 1.0}
DOWN_ROLES = frozenset({Role.FFN_DOWN, Role.EXPERT_DOWN, Role.SHARED_DOWN})


def exposed(module: nn.Module) -> Iterator[tuple[str, str, nn.Module, str]]:
    """Yields (dotted path of the attribute, kind, module, attribute name) for every multiplier in a module tree."""
    for name, child in module.named_modules():
        if hasattr(child, "_orig_mod"):
            continue  # torch.compile's wrapper shows the attributes of the module inside it, which comes next
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
        (dotted path -> value to set; kind -> the base's own value, for the kinds of an FFN's output that no module of the
        target exposes and that are therefore folded into its down matrices).

    Raises:
        ValueError: If a multiplier other than 1 is needed that the model neither exposes nor can have folded.
    """
    base_sites = list(exposed(base))
    sites = list(exposed(model))
    counterparts = _Counterparts(sites, base_sites)
    values: dict[str, float] = {}
    for path, kind, child, attribute in sites:
        if kind in rule.multipliers:
            old = counterparts.find(path, kind, child)
            start = float(getattr(*old)) if old is not None else _ABSENT.get(kind, float(getattr(child, attribute)))
            local = {**ratios, **branch_ratios(child, old[0] if old is not None else None)}
            values[path] = start * parse(rule.multipliers[kind]).evaluate(local, alpha)
    present = {kind for _, kind, _, _ in sites}
    folded = {}
    for kind, cell in rule.multipliers.items():
        if kind in present:
            continue
        if kind in _ABSENT:
            folded[kind] = next(
                (float(getattr(child, name)) for _, k, child, name in base_sites if k == kind), _ABSENT[kind]
            )
        elif parse(cell).evaluate(ratios, alpha) != 1.0:
            raise ValueError(
                f"rule={rule.name!r} needs a {kind} multiplier of {parse(cell).evaluate(ratios, alpha):g} ({cell}), but no "
                f"module of {type(model).__name__} exposes one. Give the module that applies it a float attribute and declare "
                f"it, e.g. mue_multipliers = {{'{kind}': '{kind}_multiplier'}}."
            )
    return values, folded


_Site = tuple[str, str, nn.Module, str]


class _Counterparts:
    """Finds a site's counterpart in the base: a module that exposes the same kinds (dense or MoE alike), else this kind."""

    def __init__(self, sites: list[_Site], base_sites: list[_Site]) -> None:
        self._paths, self._base_sites = [site[0] for site in sites], base_sites
        # One index a group of sites, not one a site: a deep model has thousands of them.
        self._groups: dict[tuple[str, frozenset[str] | None], tuple[dict[str, tuple[nn.Module, str]], BaseIndex]] = {}

    def find(self, path: str, kind: str, child: nn.Module) -> tuple[nn.Module, str] | None:
        """(module of the base, attribute name) for the site at a path, or None if the base exposes no such kind."""
        for kinds in (frozenset(child.mue_multipliers), None):  # type: ignore[arg-type]
            candidates, index = self._group(kind, kinds)
            name = index.match(path)
            if name is not None:
                return candidates[name]
            if candidates:
                return next(iter(candidates.values()))
        return None

    def _group(self, kind: str, kinds: frozenset[str] | None) -> tuple[dict[str, tuple[nn.Module, str]], BaseIndex]:
        """The base's sites of a kind, on modules that expose just these kinds (None: any), with their index."""
        if (kind, kinds) not in self._groups:
            candidates = {
                path: (module, attribute)
                for path, its_kind, module, attribute in self._base_sites
                if its_kind == kind and kinds in (None, frozenset(module.mue_multipliers))  # type: ignore[arg-type]
            }
            index = BaseIndex(candidates, self._paths, [site[0] for site in self._base_sites])
            self._groups[kind, kinds] = candidates, index
        return self._groups[kind, kinds]


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
