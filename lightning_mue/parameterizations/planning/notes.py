"""What a person should know of a plan: moves and modules for which its rule makes no claim, and what decides the limit."""

from __future__ import annotations

from lightning_mue.parameterizations.reading.inference import is_attention
from lightning_mue.parameterizations.reading.record import ModelRecord
from lightning_mue.parameterizations.reading.sizes import Sizes
from lightning_mue.parameterizations.rules.axes import Axes
from lightning_mue.parameterizations.rules.monomial import parse
from lightning_mue.parameterizations.rules.roles import Role
from lightning_mue.parameterizations.rules.table import Parameterization, Preset


def plan_notes(
    rule: Parameterization,
    model: ModelRecord,
    sizes: Sizes,
    axes: Axes,
    base_axes: Axes,
    alpha: float,
    constants: Preset | None,
) -> list[str]:
    """What a person should know: moves, routers and exponents for which the rule makes no claim; what decides the limit."""
    changed, ratios = axes.changed(base_axes), axes.ratios(base_axes)
    notes = [
        f"{axis} differs from the base ({base_axes.to_dict()[axis]:g} -> {axes.to_dict()[axis]:g}), but {rule.name} "
        "does not claim transfer along it"
        for axis in changed
        if rule.moves and axis not in rule.moves
    ]
    notes += [
        f"{symbol} changes by a factor of {ratios[symbol]:g}, but {rule.name} claims transfer at fixed {symbol} only"
        for symbol in sorted(rule.fixed)
        if abs(ratios[symbol] - 1) > 1e-9
    ]
    if rule.alpha is not None and alpha != rule.alpha and "depth" in changed:
        notes.append(f"alpha={alpha:g}, but {rule.name} is derived for alpha={rule.alpha:g}")
    undeclared = not model.routing and any(info.role is Role.ROUTER for info in sizes.infos)
    if rule.routing and undeclared and {"n_experts", "top_k"} & set(changed):
        wanted = "; ".join(f"{setting} {' or '.join(sorted(claimed))}" for setting, claimed in rule.routing.items())
        notes.append(
            f"how the router makes its gates is not known; {rule.name} claims transfer over experts for {wanted}"
        )
    headless = "attention" in rule.multipliers and "width" in changed and None in (axes.head_dim, base_axes.head_dim)
    if headless and not model.sizes and any(is_attention(info) for info in sizes.infos):
        notes.append(
            "the size of an attention head is not known and taken to be the base's; if it grows, logits need a factor"
        )
    if {"n_experts", "top_k"} & set(changed):
        for setting, claimed in rule.routing.items():
            if found := set(model.routing.get(setting, ())) - claimed:
                notes.append(
                    f"{setting}={', '.join(sorted(found))}, but {rule.name} claims transfer over experts and top_k for "
                    f"{' or '.join(sorted(claimed))} only"
                )
    for name, cell in rule.invariants.items():
        if set(parse(cell).powers) <= set(axes.sizes()) & set(base_axes.sizes()):
            old, new = (parse(cell).evaluate(a.sizes()) for a in (base_axes, axes))
            same = "equal: the same limit" if abs(new / old - 1) < 1e-9 else "different: another limit"
            notes.append(f"{name} = {cell}: {old:.4g} at the base, {new:.4g} here ({same})")
    if constants is not None and constants.hyperparameters:
        values = ", ".join(f"{key} {value:g}" for key, value in constants.hyperparameters.items())
        notes.append(f"preset ({constants.source}): tuned at its base {dict(constants.base)}: {values}")
    return notes
