"""What a person should know of a plan: where its rule makes no claim, and which numbers decide the limit."""

from __future__ import annotations

from lightning_mue.names import in_attention
from lightning_mue.parameterizations.planning.match import Pair
from lightning_mue.parameterizations.reading.parameters import ParameterInfo
from lightning_mue.parameterizations.reading.roles.folding import attention_of
from lightning_mue.parameterizations.rules.monomial import parse
from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.parameterizations.rules.table import Parameterization, Preset


def plan_notes(rule: Parameterization, pair: Pair, alpha: float, constants: Preset | None) -> list[str]:
    """The notes of a plan, one sentence each."""
    changed = pair.axes.changed(pair.base_axes)
    return [
        *_unclaimed_moves(rule, pair, changed, alpha),
        *_unknown_modules(rule, pair, changed),
        *_unclaimed_routers(rule, pair, changed),
        *_invariants(rule, pair),
        *_preset(constants),
    ]


def _unclaimed_moves(rule: Parameterization, pair: Pair, changed: list[str], alpha: float) -> list[str]:
    """Axes, ratios and depth exponents for which the rule claims no transfer."""
    sizes, base_sizes = pair.axes.to_dict(), pair.base_axes.to_dict()
    notes = [
        f"{axis} differs from the base ({base_sizes[axis]:g} -> {sizes[axis]:g}), but {rule.name} "
        "does not claim transfer along it"
        for axis in changed
        if rule.moves and axis not in rule.moves
    ]
    ratios = pair.axes.ratios(pair.base_axes)
    notes += [
        f"{symbol} changes by a factor of {ratios[symbol]:g}, but {rule.name} claims transfer at fixed {symbol} only"
        for symbol in sorted(rule.fixed)
        if abs(ratios[symbol] - 1) > 1e-9
    ]
    if rule.alpha is not None and alpha != rule.alpha and "depth" in changed:
        notes.append(f"alpha={alpha:g}, but {rule.name} is derived for alpha={rule.alpha:g}")
    return notes


def _unknown_modules(rule: Parameterization, pair: Pair, changed: list[str]) -> list[str]:
    """What the rule depends on and the modules do not show."""
    notes = []
    undeclared = not pair.target.routing and any(info.role is Role.ROUTER for info in pair.infos)
    if rule.routing and undeclared and _experts_changed(changed):
        wanted = "; ".join(f"{setting} {' or '.join(sorted(claimed))}" for setting, claimed in rule.routing.items())
        notes.append(
            f"how the router makes its gates is not known; {rule.name} claims transfer over experts for {wanted}"
        )
    headless = [info for info in pair.infos if _has_unknown_heads(info, pair)]
    if headless and "attention" in rule.multipliers and "width" in changed:
        notes.append(
            f"the size of an attention head is not known for {headless[0].name} and taken to be the base's; if it grows, the "
            "logits lack a factor. Store it on the attention module as an attribute `head_dim` (or the number of heads as "
            "`n_head`), or return it from mue_axes() of the model"
        )
    return notes


def _has_unknown_heads(info: ParameterInfo, pair: Pair) -> bool:
    """True for a matrix in an attention whose logits the plan may have to scale, but whose head size it does not know."""
    if len(info.shape) < 2 or not (info.query is not None or in_attention(info.path)):
        return False
    if attention_of(info) in pair.scaled_attentions:
        return False
    return None in (pair.axes.head_dim, pair.base_axes.head_dim)


def _unclaimed_routers(rule: Parameterization, pair: Pair, changed: list[str]) -> list[str]:
    """Settings of routers for which the rule claims no transfer over experts."""
    if not _experts_changed(changed):
        return []
    found = {setting: set(pair.target.routing.get(setting, ())) - claimed for setting, claimed in rule.routing.items()}
    return [
        f"{setting}={', '.join(sorted(values))}, but {rule.name} claims transfer over experts and top_k for "
        f"{' or '.join(sorted(rule.routing[setting]))} only"
        for setting, values in found.items()
        if values
    ]


def _experts_changed(changed: list[str]) -> bool:
    return bool({"n_experts", "top_k"} & set(changed))


def _invariants(rule: Parameterization, pair: Pair) -> list[str]:
    """Numbers in which models with the same limit agree, as far as the sizes are known."""
    notes = []
    for name, cell in rule.invariants.items():
        if set(parse(cell).powers) <= set(pair.axes.sizes()) & set(pair.base_axes.sizes()):
            old, new = (parse(cell).evaluate(axes.sizes()) for axes in (pair.base_axes, pair.axes))
            same = "equal: the same limit" if abs(new / old - 1) < 1e-9 else "different: another limit"
            notes.append(f"{name} = {cell}: {old:.4g} at the base, {new:.4g} here ({same})")
    return notes


def _preset(constants: Preset | None) -> list[str]:
    """What the paper tuned at its base."""
    if constants is None or not constants.hyperparameters:
        return []
    values = ", ".join(f"{key} {value:g}" for key, value in constants.hyperparameters.items())
    return [f"preset ({constants.source}): tuned at its base {dict(constants.base)}: {values}"]
