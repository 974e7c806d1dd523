"""The lines of a plan's table, its legend, and the lines below it: as text, for terminals and Markdown alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from lightning_mue.console import human
from lightning_mue.parameterizations.planning.parameter_plan import ParameterPlan
from lightning_mue.parameterizations.rules.kinds import ADAM_KINDS

HEADERS = ("role", "size", "parameters", "shape", "init", "lr x", "wd x", "eps x", "update")
_UPDATES = {
    "sphere": "sphere: Muon that keeps the Frobenius norm",
    "adam_sphere": "adam_sphere: Adam's direction, at a fixed norm",
    "muon": "muon: orthogonalized momentum",
}


def lines(parameters: Sequence[ParameterPlan]) -> list[tuple[str, ...]]:
    """Cells of the table: one line for parameters that the plan treats alike."""
    alike: dict[tuple[object, ...], list[ParameterPlan]] = {}
    for p in parameters:
        constant = p.init.value if p.init.kind == "constant" else None
        factors = (p.lr, p.weight_decay, p.eps, p.kind, p.rows, p.trainable)
        alike.setdefault((p.role, p.shape, p.init.kind, constant, *factors), []).append(p)
    return [_cells(members) for members in alike.values()]


def _cells(members: Sequence[ParameterPlan]) -> tuple[str, ...]:
    p, count = members[0], len(members)
    name = covering([member.name for member in members])
    shape = " x ".join(str(side) for side in p.shape) or "scalar"
    size = human(sum(math.prod(member.shape) for member in members))
    named = (p.role, size, f"{count} x {name}" if count > 1 else name, shape)
    if not p.trainable:
        return (*named, "as it is", "-", "-", "-", "frozen")
    eps = f"{p.eps:.4g}" if p.kind in ADAM_KINDS else "-"
    return (*named, _init(members), f"{p.lr:.4g}", f"{p.weight_decay:.4g}", eps, p.kind)


def _init(members: Sequence[ParameterPlan]) -> str:
    kind = members[0].init.kind
    values = sorted(member.init.value for member in members)
    if kind == "keep":
        return "as it is"
    if kind == "constant":
        return f"= {values[0]:.4g}"
    tied = " tied" if members[0].tied else ""
    # Equal layers' stds are measured, so they differ by sampling noise.
    near = values[-1] <= 1.15 * values[0]
    tied += ", form kept" if kind == "scaled" else ""
    return (f"std {values[len(values) // 2]:.3g}" if near else f"std {values[0]:.2g}-{values[-1]:.2g}") + tied


def covering(names: Iterable[str]) -> str:
    """One name for several: ``*`` for a number in which they differ, braces for the one part in which they differ otherwise.

    Example:
        >>> covering(["h.0.ln_1.weight", "h.0.ln_2.weight", "h.1.ln_1.weight", "h.1.ln_2.weight"])
        'h.*.{ln_1, ln_2}.weight'
        >>> covering(["moe.experts.0.w1", "moe.experts.1.w1", "shared.w1"])
        'moe.experts.*.w1, shared.w1'
    """
    families: dict[tuple[str, ...], list[list[str]]] = {}
    for name in names:
        parts = name.split(".")
        families.setdefault(tuple("*" if part.isdigit() else part for part in parts), []).append(parts)
    # A number that all members of a family share is kept.
    templates = [
        [values[0] if len(set(values)) == 1 else "*" for values in zip(*members, strict=True)]
        for members in families.values()
    ]
    merged: list[list[list[str]]] = []
    for template in templates:
        for group in merged:
            if _differ_in([*group, template]) is not None:
                group.append(template)
                break
        else:
            merged.append([template])
    return ", ".join(map(_braced, merged))


def _differ_in(templates: list[list[str]]) -> int | None:
    """The only part in which names differ; None if they differ in several, or in length."""
    if len({len(template) for template in templates}) > 1:
        return None
    places = [i for i, values in enumerate(zip(*templates, strict=True)) if len(set(values)) > 1]
    return places[0] if len(places) == 1 else None


def _braced(templates: list[list[str]]) -> str:
    if len(templates) == 1:
        return ".".join(templates[0])
    place = _differ_in(templates)
    assert place is not None
    parts = list(templates[0])
    parts[place] = "{" + ", ".join(template[place] for template in templates) + "}"
    return ".".join(parts)


def legend(parameters: Iterable[ParameterPlan]) -> list[str]:
    """What the columns mean, in as many lines as this table needs."""
    kinds = {p.kind for p in parameters if p.trainable}
    updates = [text for kind, text in _UPDATES.items() if kind in kinds]
    return [
        "init: how the weights are drawn (std: standard deviation). lr x, wd x, eps x: factors on the learning rate, weight decay "
        "and Adam's eps of your parameter groups (-: the update has none)",
        *(["update  " + "; ".join(updates)] if updates else []),
    ]


def sources(parameters: Iterable[ParameterPlan]) -> list[str]:
    """Source of a row -> roles that take it, one line a source; rows of frozen parameters are applied nowhere."""
    roles: dict[str, dict[str, None]] = {}
    for p in parameters:
        if p.trainable:
            roles.setdefault(p.source, {})[p.role] = None
    return [f"{source}: {', '.join(names)}" for source, names in roles.items()]


def multipliers(
    values: Mapping[str, float], folded: Mapping[str, float], parameters: Sequence[ParameterPlan]
) -> list[str]:
    """Equal multipliers of many layers, as one entry: ``blocks.*.residual_multiplier = 0.25``; then those in weights."""
    paths: dict[tuple[str, str], list[str]] = {}
    for path, value in values.items():
        paths.setdefault((path.rpartition(".")[2], f"{value:.4g}"), []).append(path)
    rows: dict[float, list[str]] = {}
    for p in parameters:
        if p.rows is not None and p.trainable:
            rows.setdefault(p.rows.factor, []).append(p.name)
    entries = sorted(f"{covering(found)} = {value}" for (_, value), found in paths.items())
    entries += [
        f"{kind} x {value:.4g}, folded into weights"
        for kind, value in sorted(folded.items())
        if kind != "attention" or not rows
    ]
    return entries + [
        f"attention x {factor:.4g}, folded into the rows of {covering(names)} that make queries"
        for factor, names in rows.items()
    ]
