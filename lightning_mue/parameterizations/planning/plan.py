"""``plan``: what a rule does to each parameter of a model, given the base on which it was tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lightning_mue.parameterizations.planning.multipliers import KINDS, folded_cells, site_values
from lightning_mue.parameterizations.planning.notes import plan_notes
from lightning_mue.parameterizations.planning.scale import Scale
from lightning_mue.parameterizations.planning.scaling_plan import ScalingPlan
from lightning_mue.parameterizations.reading.base import RUN_KEYS, Base
from lightning_mue.parameterizations.reading.record import describe, describe_base
from lightning_mue.parameterizations.reading.sizes import Sizes
from lightning_mue.parameterizations.rules.kinds import Family
from lightning_mue.parameterizations.rules.monomial import parse
from lightning_mue.parameterizations.rules.table import Parameterization, Preset, get_rule


def plan(
    model: nn.Module,
    *,
    base: Base | None = None,
    rule: str | Parameterization = "complete-mue",
    family: Family | Mapping[str, Family] = "adam",
    alpha: float = 1.0,
    tokens: float | None = None,
    batch_tokens: float | None = None,
    roles: Mapping[str, str] | None = None,
    multipliers: Mapping[str, str] | None = None,
    preset: str | None = None,
) -> ScalingPlan:
    """Computes what a rule does to every parameter of a model. Nothing is changed; the model may be on ``meta``.

    Args:
        model: The target. Sizes come from its ``mue_axes()``, roles from ``mue_roles`` of its modules; where a module declares
            nothing, both are inferred (inference.py).
        base: The tuned model: keyword overrides of the target's own hyperparameters (which may also hold the base's
            ``tokens`` and ``batch_tokens``), a module, a factory, or the path of a file that :func:`save_base` wrote. ``None``
            or ``{}``: the target is the base.
        rule: A name in ``RULES``, or a table of one's own.
        family: Optimizer family: ``adam``, ``sgd``, ``sphere`` (HyperSphereOptimizer) or ``muon``; or parameter name -> family
            where there are several optimizers.
        alpha: Depth exponent in [1/2, 1]; 1 is CompleteP.
        tokens: Training length of the target in tokens, if it is to count.
        batch_tokens: Batch size of the target in tokens, if it is to count.
        roles: Regular expression on names -> role, for modules that declare none.
        multipliers: Kind of forward multiplier -> regular expression on dotted paths of attributes that hold one.
        preset: Name of a set of constants that the rule's paper reports; they apply on top, at base size too.

    Returns:
        The plan.

    Raises:
        ValueError: For a bad argument, a parameter without a role, or a rule without a row for a role.
    """
    rule = get_rule(rule)
    if not 0.5 <= alpha <= 1.0:
        raise ValueError(f"alpha: found {alpha}, expected a depth exponent in [0.5, 1].")
    constants = _preset(rule, preset)
    if constants is not None and (base is None or base == {}):
        base = dict(constants.base)
    if unknown := sorted(set(multipliers or {}) - set(KINDS)):
        raise ValueError(f"multipliers: found the kind(s) {', '.join(unknown)}; expected {', '.join(KINDS)}.")
    is_own_base = base is None or (isinstance(base, Mapping) and set(base) <= set(RUN_KEYS))
    target = describe(model, roles, multipliers)
    # Shapes first, without memory: a base that is the target itself may be too large to make.
    old = target if is_own_base else describe_base(model, base, roles, multipliers, measure=False)  # type: ignore[arg-type]
    run = {key: base[key] for key in RUN_KEYS if key in base} if isinstance(base, Mapping) else dict(old.run)
    for key, value in (("tokens", tokens), ("batch_tokens", batch_tokens)):
        _check_run(key, value, run)
    sizes = Sizes(target, old)
    axes = replace(sizes.axes, tokens=tokens, batch_tokens=batch_tokens)
    base_axes = replace(sizes.base_axes, tokens=run.get("tokens"), batch_tokens=run.get("batch_tokens"))
    same_shapes = target.same_shapes(old) and not sizes.axes.changed(sizes.base_axes)
    factors = constants.factors if constants is not None else {}
    same_size = same_shapes and not axes.changed(base_axes) and not factors
    reason = None
    if rule.resolve is not None:
        rule, reason = rule.resolve(axes, base_axes)
    # A plan that changes no size keeps the weights that the model has, unless constants are to multiply them.
    if not old.inits and not (same_shapes and not factors):
        old = describe_base(model, {} if is_own_base else base, roles, multipliers, measure=True)  # type: ignore[arg-type]
    scale = Scale(rule, family, alpha, axes, base_axes, factors)
    folded = folded_cells(rule, target, old, sizes.infos, scale.ratios, alpha)
    inits = {} if same_shapes and not factors else old.inits
    parameters = tuple(scale.parameter(info, sizes.matched.get(info.name), inits, folded) for info in sizes.infos)
    return ScalingPlan(
        rule=rule.name,
        family="+".join(scale.families),
        alpha=alpha,
        axes=axes.to_dict(),
        base_axes=base_axes.to_dict(),
        betas=parse(rule.betas).evaluate(scale.ratios, alpha),
        parameters=parameters,
        multipliers={} if same_size else site_values(rule, target, old, scale.ratios, alpha),
        same_size=same_size,
        notes=(
            *([reason] if reason else []),
            *sizes.notes,
            *plan_notes(rule, target, sizes, axes, base_axes, alpha, constants),
        ),
        folded={kind: value for kind, value in scale.folded_values(folded).items() if value != 1.0},
    )


def _preset(rule: Parameterization, name: str | None) -> Preset | None:
    if name is None:
        return None
    if name not in rule.presets:
        raise ValueError(
            f"preset: found {name!r}, but {rule.name} has {', '.join(map(repr, rule.presets)) or 'none'}. Leave it out to use your "
            "own constants."
        )
    return rule.presets[name]


def _check_run(key: str, value: float | None, base_run: Mapping[str, float]) -> None:
    if (value is None) != (key not in base_run):
        where, other = ("base", f"`{key}`") if value is not None else (f"`{key}`", f"base.{key}")
        raise ValueError(
            f"{key}: {other} is given but {where} has none, so there is no ratio to scale by. Give both "
            f"(e.g. {key}: 4e9 and base: {{..., {key}: 1e9}}) or neither."
        )
