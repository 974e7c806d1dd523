"""What each place of a transformer is trained with, in numbers that need no plan: rates, decay, eps, initial std.

Forward multipliers are folded into the weights behind which they stand (docs/theory.md section 2): the exported model has none, and
trains the same function.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_mue.checks import listed, value_error
from lightning_mue.parameterizations.exporting.layouts import Place, place_of
from lightning_mue.parameterizations.planning.multipliers import fold
from lightning_mue.parameterizations.planning.parameter_plan import ParameterPlan
from lightning_mue.parameterizations.planning.scaling_plan import ScalingPlan
from lightning_mue.parameterizations.reading.initial.initializer import DRAWN, Init

_OUT = tuple(f"{place}{end}" for place in ("down", "expert_down", "shared_down") for end in ("", ".bias"))
#: Attribute of a forward multiplier -> the places behind whose output it stands.
_BEHIND: Mapping[str, tuple[str, ...]] = {
    "residual_multiplier": ("o", *_OUT),
    "ffn.output_multiplier": _OUT,
    "ffn.route_scale": ("expert_down", "expert_down.bias"),
    "unembedding.output_multiplier": ("unembedding",),
}
_ATTENTION = "attention.core.scale"
#: Equal layers' stds are measured at the base, so they differ by sampling noise.
NOISE = 1.15


@dataclass(frozen=True)
class Setting:
    """What one place is trained with, in some layers or all.

    Attributes:
        place: As in `layouts.LAYOUTS`.
        role: Its role in the plan.
        layers: The layers, in order; empty for all, and for places outside the layers.
        lr: Learning rate at the top of the schedule.
        weight_decay: Decoupled, as torch.optim.AdamW takes it (multiplied by the learning rate).
        eps: Added to the root of the second moment; None for SGD.
        betas: None for SGD.
        init: How it is drawn, multipliers included.
    """

    place: str
    role: str
    layers: tuple[int, ...]
    lr: float
    weight_decay: float
    eps: float | None
    betas: tuple[float, float] | None
    init: Init


def settings_of(
    plan: ScalingPlan, groups: Mapping[str, Mapping[str, Any]], names: Mapping[str, str] | None = None
) -> list[Setting]:
    r"""The settings of every place.

    Args:
        plan: The plan.
        groups: Name of a parameter -> its parameter group with the plan's factors in it (`scale_groups`).
        names: Regular expression on names -> place, for models whose names are in no layout; a group ``(?P<layer>\d+)`` gives
            the layer.

    Raises:
        ValueError: For parameters without a place, or what a layout cannot hold: updates on the sphere, experts that start alike,
            multipliers in rows of a weight.
    """
    entries = [entry for entry in plan.parameters if entry.trainable]
    _refuse(plan, entries)
    places = {entry.name: _place(entry.name, names or {}) for entry in entries}
    if lost := [name for name, place in places.items() if place is None]:
        raise value_error(
            "names",
            found=f"{len(lost)} parameter(s) whose place is not known by name: {listed(lost, limit=4)}",
            expected="a place for each of them",
            do="Give a pattern for each, e.g. {'h\\.(?P<layer>\\d+)\\.attn\\.proj\\.weight$': 'o'}; the places are the keys of "
            "LAYOUTS in lightning_mue/parameterizations/exporting/layouts.py. Or export to param-groups, which keeps the names.",
        )
    multipliers = _multipliers(plan, places)
    found: dict[tuple[str, int | None], Setting] = {}
    for entry in entries:
        place = places[entry.name]
        assert place is not None
        for part in place.parts:
            found.setdefault((part, place.layer), _setting(entry, part, place.layer, groups[entry.name], multipliers))
    return _alike(found)


def _refuse(plan: ScalingPlan, entries: Sequence[ParameterPlan]) -> None:
    """Refuses what no other code base can do, or not by settings alone."""
    kinds = sorted({entry.kind for entry in entries} - {"adamw", "sgd"})
    rows = [entry.name for entry in entries if entry.rows is not None]
    tied = [entry.name for entry in entries if entry.tied]
    for wrong, found, do in (
        (kinds, f"the update(s) {listed(kinds)}", "Export to param-groups, or tune with torch.optim.AdamW."),
        (rows, f"multipliers in some rows of {listed(rows, limit=3)}", "Keep the head dimension as at the base."),
        (tied, f"experts that start from one draw ({listed(tied, limit=3)})", "Export to param-groups."),
    ):
        if wrong:
            raise value_error("plan", found=found, expected="what parameter groups and initial stds can express", do=do)


def _place(name: str, names: Mapping[str, str]) -> Place | None:
    for pattern, place in names.items():
        if (found := re.search(pattern, name)) is not None:
            layer = found.groupdict().get("layer")
            return Place(tuple(place.split("+")), None if layer is None else int(layer))
    return place_of(name)


def _multipliers(plan: ScalingPlan, places: Mapping[str, Place | None]) -> dict[tuple[str, int | None], float]:
    """(place, layer) -> the forward multiplier that its weight has to carry."""
    present = {(part, place.layer) for place in places.values() if place is not None for part in place.parts}
    carried: dict[tuple[str, int | None], float] = {}
    for path, value in plan.multipliers.items():
        found = re.search(r"\.(\d+)\.", path)
        layer = int(found[1]) if found else None
        behind = next((places for end, places in _BEHIND.items() if path.endswith(end)), ())
        if path.endswith(_ATTENTION):
            behind, value = (
                ("q_norm",) if ("q_norm", layer) in present else ("q",),
                value * plan.axes["head_dim"] ** 0.5,
            )
        reached = [(part, layer) for part in behind if (part, layer) in present]
        if not reached and value != 1.0:
            raise value_error(
                "plan",
                found=f"the forward multiplier {path} = {value:g}",
                expected=f"one that can be folded into a weight: {listed([*_BEHIND, _ATTENTION])}",
                do="Export to param-groups, which lists multipliers as attributes.",
            )
        for key in reached:
            carried[key] = carried.get(key, 1.0) * value
    return carried


def _setting(
    entry: ParameterPlan,
    part: str,
    layer: int | None,
    group: Mapping[str, Any],
    multipliers: Mapping[tuple[str, int | None], float],
) -> Setting:
    cells = {
        "init": entry.init.value,
        "lr": group["lr"],
        "wd": group.get("weight_decay", 0.0),
        "eps": group.get("eps", 0.0),
    }
    cells = fold(cells, multipliers.get((part, layer), 1.0), entry.kind)  # type: ignore[arg-type]
    betas = group.get("betas")
    return Setting(
        place=part,
        role=entry.role,
        layers=() if layer is None else (layer,),
        lr=rounded(cells["lr"]),
        weight_decay=rounded(cells["wd"]),
        eps=rounded(cells["eps"]) if "eps" in group else None,
        betas=None if betas is None else (float(betas[0]), float(betas[1])),
        init=Init(entry.init.kind, cells["init"]),
    )


def rounded(value: float) -> float:
    """A number without the rounding errors of its factors, so that 0.032 is written as 0.032."""
    return float(f"{value:.12g}")


def _alike(found: Mapping[tuple[str, int | None], Setting]) -> list[Setting]:
    """One setting for layers that are treated alike; those of all layers of a place name no layer."""
    merged: list[list[Setting]] = []
    for setting in found.values():
        for members in merged:
            if _same(members[0], setting):
                members.append(setting)
                break
        else:
            merged.append([setting])
    places = [members[0].place for members in merged]
    return [_merged(members, alone=places.count(members[0].place) == 1) for members in merged]


def _same(a: Setting, b: Setting) -> bool:
    low, high = sorted((abs(a.init.value), abs(b.init.value)))
    near = high <= NOISE * low if a.init.kind in (*DRAWN, "scaled") else a.init.value == b.init.value
    rest = {"init": a.init, "layers": ()}
    return near and a.init.kind == b.init.kind and replace(a, **rest) == replace(b, **rest)  # type: ignore[arg-type]


def _merged(members: Sequence[Setting], alone: bool) -> Setting:
    layers: Iterable[int] = sorted({layer for member in members for layer in member.layers})
    init = Init(members[0].init.kind, statistics.median(member.init.value for member in members))
    return replace(members[0], layers=() if alone else tuple(layers), init=init)
