"""Values of the forward multipliers: set on the modules that expose them, folded into the weights where none does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_mue.parameterizations.planning.counterparts import BaseIndex
from lightning_mue.parameterizations.planning.match import Pair
from lightning_mue.parameterizations.planning.tied import TiedHead
from lightning_mue.parameterizations.reading.parameters import Query, branch_ratios, some
from lightning_mue.parameterizations.reading.record import ModelRecord
from lightning_mue.parameterizations.reading.roles.folding import why_not_foldable, without_query
from lightning_mue.parameterizations.reading.sites import Site
from lightning_mue.parameterizations.rules.kinds import Kind
from lightning_mue.parameterizations.rules.monomial import parse
from lightning_mue.parameterizations.rules.table import Parameterization, not_covered

#: Kinds: of a residual branch, of attention logits, of an FFN's or MoE's output, of its routed part, of the logits.
MULTIPLIER_KINDS = ("residual", "attention", "ffn", "route", "output")
#: The value that a kind has in a base without it: a dense FFN is an MoE of one expert with route scale 1.
_ABSENT = {"route": 1.0, "ffn": 1.0}

#: Differences from 1 that come from rounding, not from sizes.
_ROUNDING = 1e-12

_REMEDY = {
    "attention": "Keep the head dimension as at the base (more heads, not larger ones). Or store the whole scale of the logits "
    "(head_dim**-0.5) as a float attribute of the attention module, and: ",
    "residual": "Name the matrix whose output is added to the residual stream (no gate or norm behind it) by pattern, "
    "e.g. roles: {'blocks.*out.weight': ffn_down}. Or: ",
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
    pair: Pair,
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
        if kind == "attention":
            folded |= _folded_attention(rule, target, base, pair, ratios, alpha)
            continue
        if kind in present:
            continue
        start = next((site.value for site in base.sites if site.kind == kind), 1.0)
        value = start * parse(cell).evaluate(ratios, alpha)
        reason = None if kind in _ABSENT or value == 1.0 else why_not_foldable(pair.infos, kind)
        if reason is not None:
            raise _not_foldable(rule, target, kind, f"{cell} = {value:g}", reason)
        folded[kind] = (start, cell)
    if tied is not None and not any(site.kind == "output" and tied.serves(site) for site in target.sites):
        value = tied.value * next((site.value for site in base.sites if site.kind == "output"), 1.0)
        if value != 1.0:
            tied.refuse_unless_foldable(rule, pair.infos, value)
            folded["output"] = (value, "1")
    return folded


def _folded_attention(
    rule: Parameterization,
    target: ModelRecord,
    base: ModelRecord,
    pair: Pair,
    ratios: Mapping[str, float],
    alpha: float,
) -> dict[str, tuple[float, str]]:
    """The entry of `folded_cells` for attention logits; single attentions may have another value (`logit_multiplier`)."""
    cell = rule.multipliers["attention"]
    bare = without_query(pair.infos, pair.scaled_attentions)
    if not (bare or any("attention" in info.folds for info in pair.infos)):
        return {}
    scales = [record.inferred.get("attention_scale") for record in (base, target)]
    # Beyond the modules' own scales.
    start, cell = (scales[0] / scales[1], cell) if all(scales) else (1.0, f"{cell} k^1/2")  # type: ignore[operator]
    value = start * parse(cell).evaluate(ratios, alpha)
    if bare and abs(value - 1) > _ROUNDING:
        reason = f"which weights make the queries is not known among {some(bare, 3)}"
        raise _not_foldable(rule, target, "attention", f"{rule.multipliers['attention']}, here {value:g}", reason)
    return {"attention": (start, cell)}


def _not_foldable(rule: Parameterization, target: ModelRecord, kind: str, value: str, reason: str) -> Exception:
    return not_covered(
        found=f"{rule.name!r}, which needs the {kind} multiplier {value}",
        expected=f"a module of {target.model} that exposes one, or weights to fold it into ({reason})",
        do=f"{_REMEDY.get(kind, '')}Name the attribute that holds it, e.g. multipliers: {{{kind}: '{kind}_multiplier$'}}; "
        f"or declare it on the module that applies it, mue_multipliers = {{'{kind}': '{kind}_multiplier'}}.",
    )


def logit_multiplier(
    rule: Parameterization, query: Query | None, old: Query | None, ratios: Mapping[str, float], alpha: float
) -> float | None:
    """What multiplies one attention's logits beyond the module's own scale, over the base's; None if its heads are not known."""
    if query is None or old is None or not query.head_dim or not old.head_dim:
        return None
    k = query.head_dim / old.head_dim
    own, base_own = (q.scale or q.head_dim**-0.5 for q in (query, old))  # type: ignore[operator]
    value = parse(rule.multipliers["attention"]).evaluate({**ratios, "k": k}, alpha) * base_own / own
    return value if abs(value - 1) > _ROUNDING else 1.0


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
