"""Values of the forward multipliers: set on the modules that expose them, folded into the weights where none does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_mue.parameterizations.planning.counterparts import BaseIndex
from lightning_mue.parameterizations.planning.tied import TiedHead
from lightning_mue.parameterizations.reading.folding import why_not_foldable
from lightning_mue.parameterizations.reading.parameters import ParameterInfo, branch_ratios
from lightning_mue.parameterizations.reading.record import ModelRecord
from lightning_mue.parameterizations.reading.sites import Site
from lightning_mue.parameterizations.rules.kinds import Kind
from lightning_mue.parameterizations.rules.monomial import parse
from lightning_mue.parameterizations.rules.table import Parameterization, not_covered

#: Kinds: of a residual branch, of attention logits, of an FFN's or MoE's output, of its routed part, of the logits.
MULTIPLIER_KINDS = ("residual", "attention", "ffn", "route", "output")
#: The value that a kind has in a base without it: a dense FFN is an MoE of one expert with route scale 1.
_ABSENT = {"route": 1.0, "ffn": 1.0}

_REMEDY = {
    "attention": "Keep the head dimension as at the base (more heads, not larger ones). Or: ",
    "residual": "Name the last matrix of each branch by pattern, e.g. roles: {'blocks.*out': ffn_down}. Or: ",
}


def site_values(
    rule: Parameterization,
    target: ModelRecord,
    base: ModelRecord,
    ratios: Mapping[str, float],
    alpha: float,
    tied: TiedHead | None = None,
) -> dict[str, float]:
    """The multipliers that are set, dotted path of the attribute -> value; ``ratios`` are those of the whole model."""
    counterparts = _Counterparts(target.sites, base.sites)
    values: dict[str, float] = {}
    for site in target.sites:
        if site.kind in rule.multipliers:
            old = counterparts.find(site)
            start = old.value if old is not None else _ABSENT.get(site.kind, site.value)
            local = {**ratios, **branch_ratios(site.branch, old.branch if old is not None else None)}
            values[site.path] = start * parse(rule.multipliers[site.kind]).evaluate(local, alpha)
        elif site.kind == "output" and tied is not None and tied.serves(site):
            old = counterparts.find(site)
            values[site.path] = tied.value * (old.value if old is not None else 1.0)
    return values


def folded_cells(
    rule: Parameterization,
    target: ModelRecord,
    base: ModelRecord,
    infos: list[ParameterInfo],
    ratios: Mapping[str, float],
    alpha: float,
    tied: TiedHead | None = None,
) -> dict[str, tuple[float, str]]:
    """The multipliers that nothing in the target exposes and that are therefore folded into weights.

    Returns:
        Kind -> (the base's own value, cell that multiplies it). The scale of undeclared attention logits is read from the
        attention modules, else taken to be ``head_dim^-1/2``; the remaining factor is folded.

    Raises:
        NotCoveredError: If one other than 1 is needed where it cannot be folded.
    """
    present = {site.kind for site in target.sites}
    folded: dict[str, tuple[float, str]] = {}
    for kind, cell in rule.multipliers.items():
        if kind in present:
            continue
        start = next((site.value for site in base.sites if site.kind == kind), 1.0)
        if kind == "attention":  # beyond the modules' own scales
            scales = [record.inferred.get("attention_scale") for record in (base, target)]
            start, cell = (scales[0] / scales[1], cell) if all(scales) else (1.0, f"{cell} k^1/2")  # type: ignore[operator]
        value = start * parse(cell).evaluate(ratios, alpha)
        reason = None if kind in _ABSENT or value == 1.0 else why_not_foldable(infos, kind)
        if reason is not None:
            raise not_covered(
                found=f"{rule.name!r}, which needs the {kind} multiplier {cell} = {value:g}",
                expected=f"a module of {target.model} that exposes one, or weights to fold it into ({reason})",
                do=f"{_REMEDY.get(kind, '')}Name the attribute that holds it, e.g. multipliers: {{{kind}: '{kind}_multiplier$'}}; "
                f"or declare it on the module that applies it, mue_multipliers = {{'{kind}': '{kind}_multiplier'}}.",
            )
        folded[kind] = (start, cell)
    if tied is not None and not any(site.kind == "output" and tied.serves(site) for site in target.sites):
        value = tied.value * next((site.value for site in base.sites if site.kind == "output"), 1.0)
        if value != 1.0:
            tied.refuse_unless_foldable(rule, infos, value)
            folded["output"] = (value, "1")
    return folded


class _Counterparts:
    """Finds a site's counterpart in the base: a module that exposes the same kinds (dense or MoE alike), else this kind."""

    def __init__(self, target: tuple[Site, ...], base: tuple[Site, ...]) -> None:
        self._paths, self._base = [site.path for site in target], base
        # One index for each group of sites, not for each site: a deep model has thousands.
        self._groups: dict[tuple[str, tuple[str, ...] | None], tuple[dict[str, Site], BaseIndex]] = {}

    def find(self, site: Site) -> Site | None:
        """The base's site for one of the target, or None if the base exposes no such kind."""
        for kinds in (site.kinds, None):
            candidates, index = self._group(site.kind, kinds)
            if (name := index.match(site.path)) is not None:
                return candidates[name]
            if candidates:
                return next(iter(candidates.values()))
        return None

    def _group(self, kind: str, kinds: tuple[str, ...] | None) -> tuple[dict[str, Site], BaseIndex]:
        """The base's sites of a kind, on modules that expose just these kinds (None: any), with their index."""
        if (kind, kinds) not in self._groups:
            candidates = {s.path: s for s in self._base if s.kind == kind and kinds in (None, s.kinds)}
            index = BaseIndex(candidates, self._paths, [s.path for s in self._base])
            self._groups[kind, kinds] = candidates, index
        return self._groups[kind, kinds]


def fold(cells: dict[str, Any], m: float, kind: Kind) -> dict[str, Any]:
    """Moves a forward multiplier m into a weight, so that the function trains alike (docs/theory.md section 2).

    Returns:
        The cells (factors ``init``, ``lr``, ``wd`` and ``eps`` of a parameter with this kind of update) with m folded in.
    """
    if m == 1.0:
        return cells
    factors = {
        "adamw": {"init": m, "lr": m, "wd": 1 / m, "eps": 1 / m},
        "sgd": {"init": m, "lr": m**2, "wd": m**-2},
        # The step is relative to the radius, which the init sets.
        "sphere": {"init": m},
        "adam_sphere": {"init": m, "eps": 1 / m},
        # The size of a step is the learning rate alone.
        "muon": {"init": m, "lr": m, "wd": 1 / m},
    }[kind]
    return {name: value * factors.get(name, 1.0) for name, value in cells.items()}
