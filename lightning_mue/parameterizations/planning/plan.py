"""``plan``: what a rule does to each parameter of a model, given the base on which it was tuned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lightning_mue.checks import listed, require_number, require_pattern, require_types, value_error
from lightning_mue.names import clean_name
from lightning_mue.parameterizations.planning.evaluate import Scale
from lightning_mue.parameterizations.planning.match import Pair
from lightning_mue.parameterizations.planning.multipliers import MULTIPLIER_KINDS, folded_cells, site_values
from lightning_mue.parameterizations.planning.notes import plan_notes
from lightning_mue.parameterizations.planning.scaling_plan import ScalingPlan
from lightning_mue.parameterizations.planning.tied import TiedHead
from lightning_mue.parameterizations.reading.base import RUN_KEYS, Base, describe_base
from lightning_mue.parameterizations.reading.parameters import role_patterns
from lightning_mue.parameterizations.reading.record import ModelRecord, describe
from lightning_mue.parameterizations.reading.run_sizes import resolve_run
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
    tokens: float | str | None = None,
    batch_tokens: float | None = None,
    roles: Mapping[str, str] | None = None,
    multipliers: Mapping[str, str] | None = None,
    preset: str | None = None,
) -> ScalingPlan:
    """Computes what a rule does to every parameter of a model. Nothing is changed; the model may be on ``meta``.

    Args:
        model: The target. Sizes come from its ``mue_axes()``, roles from ``mue_roles`` of its modules; where a module declares
            nothing, both are inferred (role_names.py, match.py, size_inference.py).
        base: The tuned model: keyword overrides of the target's own hyperparameters (which may also hold the base's
            ``tokens`` and ``batch_tokens``), a module, a factory, or the path of a file that :func:`save_base` wrote. ``None``
            or ``{}``: the target is the base.
        rule: A name in ``RULES``, or your own `Parameterization`.
        family: Optimizer family: ``adam``, ``sgd``, ``sphere`` (HyperSphereOptimizer) or ``muon``; or parameter name -> family
            where there are several optimizers.
        alpha: Depth exponent in [1/2, 1]; 1 is CompleteP.
        tokens: Training length of the target in tokens, if it is to count; or ``"N per parameter"``, N times the parameters that
            one token passes through (of routed experts top_k of n_experts), embeddings included. So too for ``base``.
        batch_tokens: Batch size of the target in tokens, if it is to count.
        roles: Regular expression on names, of the target or the base -> role, for modules that declare none.
        multipliers: Kind of forward multiplier -> regular expression on dotted paths of attributes that hold one.
        preset: Name of a set of constants that the rule's paper reports; they apply on top, at base size too.

    Raises:
        ValueError: For a bad argument, a parameter without a role, or a rule without a row for a role.
    """
    rule = get_rule(rule)
    require_types(plan, {**locals(), "rule": ""})
    check_plan_arguments(alpha, tokens, batch_tokens, roles, multipliers)
    constants = _preset(rule, preset)
    if constants is not None and (base is None or base == {}):
        base = dict(constants.base)
    # 1. Read the target, and the base: shapes first, because it may be as large as the target.
    target = describe(model, roles, multipliers)
    if base is None or (isinstance(base, Mapping) and set(base) <= set(RUN_KEYS)):  # the target is its own base
        base = base or {}
        old = replace(target, run=base)
    else:
        old = describe_base(model, base, roles, multipliers, measure=False)
    _check_patterns(roles, model, old)
    # 2. Match the two: roles, counterparts and sizes.
    old = replace(old, run=resolve_run(old.run, old.parameters, "base."))
    run = resolve_run({"tokens": tokens, "batch_tokens": batch_tokens}, target.parameters)
    pair = Pair(target, old, run)
    rule, reason = rule.resolve(pair.axes, pair.base_axes) if rule.resolve is not None else (rule, None)
    # 3. Measure the base's weights. A plan that changes no size keeps the model's, unless constants are to multiply them.
    factors = constants.factors if constants is not None else {}
    _check_factors(preset, factors, pair)
    keeps_weights = pair.same_shapes and not factors
    if not (keeps_weights or old.inits):
        old = replace(describe_base(model, base, roles, multipliers, measure=True), run=old.run)
    # 4. Evaluate the rule's cells.
    tied = TiedHead.of(rule, pair, old, alpha)
    table_factor = tied.table_factor if tied is not None else 1.0
    scale = Scale(rule, family, alpha, pair, {} if keeps_weights else old.inits, factors, table_factor)
    folded = folded_cells(rule, target, old, pair, scale.ratios, alpha, tied)
    parameters = tuple(scale.parameter(info, folded) for info in pair.infos)
    same_size = keeps_weights and not pair.axes.changed(pair.base_axes)
    return ScalingPlan(
        rule=rule.name,
        family="+".join(scale.families),
        alpha=alpha,
        axes=pair.axes.to_dict(),
        base_axes=pair.base_axes.to_dict(),
        betas=parse(rule.betas).evaluate(scale.ratios, alpha),
        parameters=parameters,
        multipliers={} if same_size else site_values(rule, target, old, scale.ratios, alpha, tied),
        same_size=same_size,
        notes=(*([reason] if reason else []), *pair.notes, *plan_notes(rule, pair, alpha, constants)),
        folded=scale.folded_values(folded),
    )


def check_plan_arguments(
    alpha: float,
    tokens: float | str | None,
    batch_tokens: float | None,
    roles: Mapping[str, str] | None,
    multipliers: Mapping[str, str] | None,
) -> None:
    """Refuses arguments of :func:`plan` that no model makes right.

    Raises:
        ValueError: One is out of range, a pattern is no regular expression, or a role or kind is unknown.
    """
    if not 0.5 <= alpha <= 1.0:
        raise value_error("alpha", found=alpha, expected="a depth exponent in [0.5, 1]")
    for key, size in (("tokens", tokens), ("batch_tokens", batch_tokens)):
        if size is not None and not isinstance(size, str):
            require_number(key, size, above=0)
    role_patterns(roles)
    for kind, pattern in (multipliers or {}).items():
        require_pattern(f"multipliers.{kind}", pattern)
    if unknown := sorted(set(multipliers or {}) - set(MULTIPLIER_KINDS)):
        found = f"the kind(s) {listed(unknown)}"
        raise value_error("multipliers", found=found, expected=f"kinds among {listed(MULTIPLIER_KINDS)}")


def _check_patterns(roles: Mapping[str, str] | None, model: nn.Module, base: ModelRecord) -> None:
    """Refuses patterns that match nothing; those for experts need not match a dense base, nor a base's names the target."""
    names = [clean_name(name) for name, _ in model.named_parameters(remove_duplicate=False)]
    names += [info.name for info in base.parameters]
    if unused := [pattern for pattern in roles or {} if not any(re.search(pattern, name) for name in names)]:
        raise value_error(
            "roles",
            found=f"pattern(s) {unused}, which match no parameter",
            expected=f"patterns on names of parameters of the model or its base: {listed(names, limit=8)}",
            do="Correct or remove them.",
        )


def _check_factors(preset: str | None, factors: Mapping[str, object], pair: Pair) -> None:
    """Refuses a preset on a model with other names, which its constants would not reach."""
    missed = [pattern for pattern in factors if not any(re.search(pattern, info.name) for info in pair.infos)]
    matrices = [info.name for info in pair.infos if info.trainable and len(info.shape) > 1]
    left = [name for name in matrices if not any(re.search(pattern, name) for pattern in factors)]
    if missed and left:
        raise value_error(
            "preset",
            found=f"{preset!r}, whose constants for {listed(missed)} reach no parameter, and which has none for {listed(left)}",
            expected="a model with the names of MoELanguageModel, for which a preset's constants are given",
            do="Name the parameters so, or leave `preset` out and give the base's constants by your own parameter groups.",
        )


def _preset(rule: Parameterization, name: str | None) -> Preset | None:
    if name is None:
        return None
    if name not in rule.presets:
        raise value_error(
            "preset",
            found=repr(name),
            expected=f"a preset of {rule.name}, which has {listed([repr(known) for known in rule.presets])}",
            do="Leave it out to use your own constants.",
        )
    return rule.presets[name]
