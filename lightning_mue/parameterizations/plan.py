"""``plan``: what a rule does to each parameter of a model, given the base on which it was tuned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from lightning_mue.parameterizations.axes import Axes
from lightning_mue.parameterizations.base import RUN_KEYS, Base
from lightning_mue.parameterizations.inference import infer_roles, infer_sizes, mark_folds, orient, residual_widths
from lightning_mue.parameterizations.matching import match_parameters
from lightning_mue.parameterizations.modules import ParameterInfo, branch_ratios
from lightning_mue.parameterizations.monomial import parse
from lightning_mue.parameterizations.multipliers import fold, folded_cells, site_values
from lightning_mue.parameterizations.record import ModelRecord, describe, describe_base
from lightning_mue.parameterizations.roles import Role
from lightning_mue.parameterizations.scaling import Init, ParameterPlan, ScalingPlan
from lightning_mue.parameterizations.table import (
    RULES,
    Family,
    Parameterization,
    Preset,
    Row,
    default_kind,
    get_rule,
)


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
    if constants is not None and not base:
        base = dict(constants.base)
    is_own_base = base is None or (isinstance(base, Mapping) and set(base) <= set(RUN_KEYS))
    target = describe(model, roles, multipliers)
    # Shapes first, without memory: a base that is the target itself may be too large to make.
    old = target if is_own_base else describe_base(model, base, roles, multipliers, measure=False)  # type: ignore[arg-type]
    run = {key: base[key] for key in RUN_KEYS if key in base} if isinstance(base, Mapping) else dict(old.run)
    for key, value in (("tokens", tokens), ("batch_tokens", batch_tokens)):
        _check_run(key, value, run)
    sizes = _Sizes(target, old)
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
    scale = _Scale(rule, family, alpha, axes, base_axes, factors)
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
        notes=(*([reason] if reason else []), *_notes(rule, target, axes, base_axes, alpha, constants)),
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


class _Sizes:
    """Roles, counterparts and sizes of target and base, declared or inferred.

    Attributes:
        infos: The target's parameters, each with its role.
        matched: Target name -> the base's parameter.
        axes: Sizes of the target.
        base_axes: Sizes of the base.
    """

    def __init__(self, target: ModelRecord, base: ModelRecord) -> None:
        mine, theirs = list(target.parameters), list(base.parameters)
        matched = match_parameters(mine, theirs)
        mine = infer_roles(mine, matched)
        # What the target's growth tells holds for the base's counterpart.
        by_base = {matched[info.name].name: info.role for info in mine if info.name in matched}
        theirs = [replace(old, role=old.role or by_base.get(old.name)) for old in theirs]
        self.axes, mine = self._declared_or_inferred(target, mine)
        self.base_axes, theirs = self._declared_or_inferred(base, theirs)
        self.infos, self.matched = mark_folds(mine), match_parameters(mine, theirs)
        if self.axes.width is None or self.base_axes.width is None:
            width, base_width = self._widths(theirs)
            self.axes, self.base_axes = replace(self.axes, width=width), replace(self.base_axes, width=base_width)

    @staticmethod
    def _declared_or_inferred(record: ModelRecord, infos: list[ParameterInfo]) -> tuple[Axes, list[ParameterInfo]]:
        seen = set(residual_widths(infos).values())
        width = record.sizes.get("width") or (seen.pop() if len(seen) == 1 else None)
        infos = orient(infos, width)
        return Axes(**(record.sizes or infer_sizes(infos, record.inferred))), infos

    def _widths(self, base_infos: list[ParameterInfo]) -> tuple[float, float]:
        """(target's, base's) residual width, or their ratio and 1 where only that is known.

        Raises:
            ValueError: If different places tell different ratios.
        """
        mine, theirs = residual_widths(self.infos), residual_widths(base_infos)
        pairs = [(float(mine[where]), float(theirs[where])) for where in mine if where in theirs]
        if not pairs:  # no place tells: the sides of the matrices do
            pairs = [(new / old, 1.0) for new, old in self._grown_sides()]
        ratios = {new / old for new, old in pairs}
        if len(ratios) > 1:
            listed = ", ".join(f"{ratio:g}" for ratio in sorted(ratios))
            raise ValueError(
                f"base: the sides of the matrices grow by different ratios ({listed}), so the width ratio cannot be inferred. Give "
                "the module a method `mue_axes()` that returns its sizes, e.g. {'width': ..., 'depth': ..., 'ffn_width': ...}."
            )
        return pairs[0] if pairs else (1.0, 1.0)

    def _grown_sides(self) -> list[tuple[int, int]]:
        return [
            (new, was)
            for info in self.infos
            # The router's rows are experts; they do not grow with the width.
            if info.name in self.matched and len(info.shape) >= 2 and info.role is not Role.ROUTER
            for new, was in zip(info.fans, self.matched[info.name].fans, strict=True)
            if new != was
        ]


def _notes(
    rule: Parameterization, model: ModelRecord, axes: Axes, base_axes: Axes, alpha: float, constants: Preset | None
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


#: Roles whose own shape tells the active width of an undeclared dense FFN.
_DENSE = (Role.FFN_UP, Role.FFN_DOWN)


class _Scale:
    """Evaluates a rule's cells for single parameters."""

    def __init__(
        self,
        rule: Parameterization,
        family: Family | Mapping[str, Family],
        alpha: float,
        axes: Axes,
        base_axes: Axes,
        factors: Mapping[str, Mapping[str, float]],
    ) -> None:
        self.rule, self.family, self.alpha, self.factors = rule, family, alpha, factors
        self.families = sorted({family} if isinstance(family, str) else set(family.values()))
        for name in self.families:
            rule.table(name)
        self.base_sizes = base_axes.sizes()
        self.ratios = axes.ratios(base_axes)
        self.sparse = (axes.top_k or 1) < (axes.n_experts or 1)

    def parameter(
        self,
        info: ParameterInfo,
        old: ParameterInfo | None,
        inits: Mapping[str, Init],
        folded: Mapping[str, tuple[float, str]],
    ) -> ParameterPlan:
        """The plan of one parameter; ``folded`` holds the multipliers that no module applies (see multipliers.py)."""
        role = info.role
        assert role is not None
        family = self._family(info)
        row = self._row(role, info, family)
        init = inits.get(old.name, Init("keep", 0.0)) if old is not None else self._absent_init(row)
        self._refuse_ties(info, init)
        ratios = self._local_ratios(info, old)
        cells = {name: parse(getattr(row, name)).evaluate(ratios, self.alpha) for name in ("init", "lr", "wd", "eps")}
        kind = default_kind(Role.EMBEDDING if info.tied else role, family)
        for name in sorted(info.folds & set(folded)):
            start, cell = folded[name]
            multiplier = start * parse(cell).evaluate(ratios, self.alpha)
            gain = info.form == "norm" and not info.name.endswith("bias")
            if multiplier != 1.0 and gain and init == Init("constant", 0.0):  # it multiplies by 1 + gain
                raise ValueError(
                    f"rule={self.rule.name!r} needs the {name} multiplier {cell} = {multiplier:g}, which cannot be folded into "
                    f"{info.name}: it starts at zero. Name the attribute that holds the multiplier: multipliers: {{{name}: ...}}."
                )
            cells = fold(cells, multiplier, kind)
        for pattern, columns in self.factors.items():
            if re.search(pattern, info.name):
                cells |= {column: cells[column] * value for column, value in columns.items()}
        return ParameterPlan(
            name=info.name,
            role=role.value,
            shape=info.shape,
            base=old.name if old is not None else None,
            init=init if init.kind == "keep" else Init(init.kind, init.value * cells["init"]),
            lr=cells["lr"],
            weight_decay=cells["wd"],
            eps=cells["eps"],
            kind=kind,
            source=row.source + (" (derived)" if row.status == "derived" else "") + (", tied" if info.tied else ""),
            base_shape=old.shape if old is not None else (int(self.base_sizes["d"]),) * 2,
            tied=row.tied,
        )

    def _refuse_ties(self, info: ParameterInfo, init: Init) -> None:
        """Sparse routing from a zero router: every expert ties, and the same ones always win (theory.md section 4.4)."""
        # A single output is the gate of a shared expert, which chooses nothing.
        chooses = info.role is Role.ROUTER and info.fans[1] > 1 and self.sparse
        if chooses and init == Init("constant", 0.0):
            raise ValueError(
                f"base: the router {info.name} starts at exactly zero while not every expert is active: all experts then tie "
                "for every token, and the same ones always win. Initialize the base's router with a positive std."
            )

    def folded_values(self, folded: Mapping[str, tuple[float, str]]) -> dict[str, float]:
        """Kind -> the multiplier over the base's that goes into weights, at the whole model's ratios."""
        return {kind: parse(cell).evaluate(self.ratios, self.alpha) for kind, (_, cell) in folded.items()}

    def _family(self, info: ParameterInfo) -> Family:
        if isinstance(self.family, str):
            return self.family
        # Frozen parameters are in no optimizer.
        return self.family.get(info.name, next(iter(self.family.values())))

    def _row(self, role: Role, info: ParameterInfo, family: Family) -> Row:
        table = self.rule.table(family)
        row = table.get(role)
        if row is None:
            others = [r.name for r in RULES.values() if family in r.tables and role in r.tables[family]]
            raise ValueError(
                f"rule={self.rule.name!r} ({self.rule.source}) has no row for the role {role.value!r} of {info.name} under an "
                f"optimizer of the family {family!r}. Rules that have one: {', '.join(others) or 'none'}."
            )
        if info.tied:
            # Theory section 3: tied embeddings are drawn as the unembedding and learn by the rule of vectors.
            vector = table[Role.EMBEDDING]
            return Row(row.init, vector.lr, vector.wd, vector.eps, row.source, row.status)
        return row

    def _local_ratios(self, info: ParameterInfo, old: ParameterInfo | None) -> dict[str, float]:
        ratios = dict(self.ratios, fan_in=1.0, fan_out=1.0)
        if old is None:
            # A router whose base is dense: it is compared with the base's hidden matrices, d x d.
            ratios.update(zip(("fan_in", "fan_out"), (fan / self.base_sizes["d"] for fan in info.fans), strict=True))
            return ratios
        for key, new, was in zip(("fan_in", "fan_out"), info.fans, old.fans, strict=True):
            ratios[key] = new / was
        local = branch_ratios(info.branch, old.branch)
        if not local and info.role in _DENSE and old.role is info.role:
            # A dense FFN that declares nothing: its active width is the hidden side of this very matrix.
            hidden = ratios["fan_in" if info.role is Role.FFN_DOWN else "fan_out"]
            local = {"A": hidden, "H": hidden, "h": hidden, "E": 1.0, "a": 1.0, "kappa": 1.0}
        return {**ratios, **local}

    def _absent_init(self, row: Row) -> Init:
        if row.absent_init is None or self.base_sizes.get("d", 1.0) == 1.0:  # only the ratio of widths is known
            raise ValueError(
                f"base: the target has a parameter of the row {row.source!r} that the base lacks, and the rule gives "
                "no initialization for it. Use a base that has one."
            )
        return Init("normal", parse(row.absent_init).evaluate(self.base_sizes, self.alpha))
