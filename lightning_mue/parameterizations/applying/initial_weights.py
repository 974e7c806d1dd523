"""Applies a plan to a module: its initial weights and its forward multipliers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from lightning_mue.checks import listed, require_integer, require_pattern, require_types, value_error
from lightning_mue.names import clean_name
from lightning_mue.parameterizations.applying.drawing import draw_all, scale_
from lightning_mue.parameterizations.applying.folded_rows import multiply_rows
from lightning_mue.parameterizations.planning.scaling_plan import ParameterPlan, ScalingPlan
from lightning_mue.parameterizations.reading.initial.initializer import KEEP
from lightning_mue.parameterizations.reading.parameters import named_tensors, padding_rows
from lightning_mue.parameterizations.reading.sites import read_multipliers

_HAS_WEIGHTS = "_mue_has_weights"

#: What is drawn: all that the plan draws, nothing, what the plan changes, or what regular expressions match.
Draws = bool | Literal["changed"] | Sequence[str]


@torch.no_grad()
def initialize(model: nn.Module, plan: ScalingPlan, *, seed: int = 0) -> None:
    """Draws the initial weights that a plan asks for and sets its forward multipliers.

    At base size nothing is touched, and frozen parameters never are. Each parameter is drawn in float32 from generators of its
    own, seeded by its name, so the weights depend neither on the number of processes (plain, DDP, or DTensor shards of any
    placement; no communication takes place), nor on the number of threads, nor on the global generator.

    What the module's constructor draws in a form of its own (orthogonal matrices, blocks of different spread) is not drawn anew
    but multiplied by one number (docs/theory.md section 4), for which sharded ones are gathered; values that no random numbers
    made (identities, sinusoids, loaded weights) are kept.

    Args:
        model: The module that the plan was made for, with real parameters.
        plan: The plan.
        seed: Seed of all draws.

    Raises:
        ValueError: If the model's parameters are not those of the plan.
    """
    require_types(initialize, locals())
    require_integer("seed", seed, 0)
    check_covers(model, plan)
    set_multipliers(model, plan.multipliers)
    if plan.same_size:
        return
    tensors = named_tensors(model)
    pairs = [(tensors[entry.name], entry) for entry in plan.parameters if tensors[entry.name].requires_grad]
    for tensor, entry in pairs:
        if entry.init.kind == "scaled":
            scale_(tensor, entry)
    draw_all(pairs, seed, padding=padding_rows(model))
    for tensor, entry in pairs:
        multiply_rows(tensor, entry)


def choose_draws(plan: ScalingPlan, draws: Draws) -> ScalingPlan:
    """A plan that keeps the initial values of all parameters but those that are to be drawn.

    Args:
        plan: The plan.
        draws: True or False: the plan as it is. ``"changed"``: only parameters that the base lacks, has in another shape, or draws
            with another std (in some rows). Regular expressions: only parameters in whose qualified name one of them is found.

    Raises:
        ValueError: For an expression that is unreadable or matches no parameter.
    """
    if isinstance(draws, bool):
        return plan
    chosen = (
        {e.name for e in plan.parameters if _changes(e)} if draws == "changed" else _matching(plan, check_draws(draws))
    )
    parameters = (entry if entry.name in chosen else replace(entry, init=KEEP) for entry in plan.parameters)
    return replace(plan, parameters=tuple(parameters))


def _changes(entry: ParameterPlan) -> bool:
    """Whether a plan draws a parameter otherwise than its base."""
    return entry.base is None or entry.base_shape != entry.shape or entry.init_factor != 1.0 or entry.rows is not None


def without_multiplier(plan: ScalingPlan) -> dict[str, float]:
    """Weights that keep their initial values although they should carry a forward multiplier: name -> multiplier.

    Weights from a run under the same plan carry it already.
    """
    kept = [e for e in plan.parameters if e.trainable and e.base is not None and e.init.kind == "keep"]
    factors = {e.name: e.carried if e.rows is None else e.rows.factor for e in kept}
    return {name: factor for name, factor in factors.items() if factor != 1.0}


def check_draws(draws: Draws) -> list[str]:
    """The regular expressions of ``initialize``, if it holds any.

    Raises:
        ValueError: If it is none of its forms.
    """
    expected = "true, false, 'changed' or a list of regular expressions on names of parameters"
    if isinstance(draws, bool) or draws == "changed":
        return []
    if isinstance(draws, str) or not isinstance(draws, Sequence) or not all(isinstance(p, str) for p in draws):
        raise value_error("initialize", found=repr(draws), expected=expected, do="Put a single pattern in a list.")
    for pattern in draws:
        require_pattern("initialize", pattern)
    return list(draws)


def _matching(plan: ScalingPlan, patterns: Sequence[str]) -> set[str]:
    found = {pattern: {e.name for e in plan.parameters if re.search(pattern, e.name)} for pattern in patterns}
    if unused := [pattern for pattern, names in found.items() if not names]:
        names = listed([entry.name for entry in plan.parameters], limit=8)
        expected = f"patterns on names of parameters: {names}"
        raise value_error("initialize", found=f"{unused}, which match no parameter", expected=expected)
    return set().union(*found.values())


def set_multipliers(module: nn.Module, values: Mapping[str, float]) -> None:
    """Sets multipliers by dotted path of the attribute.

    Raises:
        ValueError: If there is no number at a path.
    """
    if not values:
        return
    modules = {clean_name(name): child for name, child in module.named_modules() if not hasattr(child, "_orig_mod")}
    places = {path: (modules.get(path.rpartition(".")[0]), path.rpartition(".")[2]) for path in values}
    unknown = sorted(
        path
        for path, (child, attribute) in places.items()
        if child is None or not isinstance(getattr(child, attribute, None), (int, float))
    )
    if unknown:
        expected = f"paths that {type(module).__name__} exposes: {listed(sorted(read_multipliers(module)))}"
        raise value_error("multipliers", found=listed(unknown), expected=expected)
    for path, (child, attribute) in places.items():
        setattr(child, attribute, float(values[path]))


def apply_plan(model: nn.Module, plan: ScalingPlan, *, seed: int = 0, draw: bool = True) -> bool:
    """Applies a plan once: draws the initial weights, or keeps the weights that are there and sets the multipliers alone.

    Weights are drawn with ``draw``, unless the module has some that must be kept (`has_weights`); in any case it has from now on.

    Returns:
        True if the weights were drawn.
    """
    drawn = draw and not has_weights(model)
    if drawn:
        initialize(model, plan, seed=seed)
    else:
        set_multipliers(model, plan.multipliers)
    keep_weights(model)
    return drawn


def keep_weights(model: nn.Module) -> None:
    """Marks a module whose weights must be kept: drawn by a plan, trained, or loaded from a checkpoint."""
    setattr(model, _HAS_WEIGHTS, True)


def has_weights(model: nn.Module) -> bool:
    """True once :func:`keep_weights` was called: a callback must not draw the weights again."""
    return getattr(model, _HAS_WEIGHTS, False)


def check_covers(model: nn.Module, plan: ScalingPlan) -> None:
    """Refuses a plan that was made for other parameters.

    Raises:
        ValueError: Naming the first differences.
    """
    planned = {entry.name: entry.shape for entry in plan.parameters}
    # A frozen parameter may be missing from the plan: its role need not be known.
    shapes = {n: tuple(p.shape) for n, p in named_tensors(model).items() if p.requires_grad or n in planned}
    if shapes == planned:
        return
    wrong = [
        f"{name}: model {shapes.get(name, 'absent')}, plan {planned.get(name, 'absent')}"
        for name in dict.fromkeys([*shapes, *planned])
        if shapes.get(name) != planned.get(name)
    ]
    raise value_error(
        "plan",
        found=f"one of another model: {len(wrong)} parameter(s) differ, first {'; '.join(wrong[:4])}",
        expected=f"one of this {type(model).__name__}",
        do="Make a new plan from this model.",
    )
