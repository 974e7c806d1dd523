"""``plan``: what a rule does to each parameter of a model, given the base on which it was tuned."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import nn

from lightning_mue.parameterizations.axes import Axes
from lightning_mue.parameterizations.base import RUN_KEYS, Base
from lightning_mue.parameterizations.inference import (
    infer_roles,
    infer_sizes,
    is_attention,
    mark_folds,
    orient,
    residual_widths,
    stack_depths,
)
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
    if unknown := sorted(set(multipliers or {}) - set(KINDS)):
        raise ValueError(f"multipliers: found the kind(s) {', '.join(unknown)}; expected {', '.join(KINDS)}.")
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
        notes=(
            *([reason] if reason else []),
            *sizes.notes,
            *_notes(rule, target, sizes, axes, base_axes, alpha, constants),
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


class _Sizes:
    """Roles, counterparts and sizes of target and base, declared or inferred.

    Attributes:
        infos: The target's parameters, each with its role.
        matched: Target name -> the base's parameter.
        axes: Sizes of the target.
        base_axes: Sizes of the base.
        notes: What of this a person should know.
    """

    def __init__(self, target: ModelRecord, base: ModelRecord) -> None:
        mine, theirs = list(target.parameters), list(base.parameters)
        matched = match_parameters(mine, theirs)
        mine = infer_roles(mine, matched)
        # What the target's growth tells holds for the base's counterpart.
        by_base = {matched[info.name].name: info.role for info in mine if info.name in matched}
        theirs = [replace(old, role=old.role or by_base.get(old.name)) for old in theirs]
        self.notes: list[str] = []
        self.axes, mine = self._declared_or_inferred(target, mine)
        self.base_axes, theirs = self._declared_or_inferred(base, theirs)
        self.infos, self.matched = mark_folds(mine), match_parameters(mine, theirs)
        if self.axes.width is None or self.base_axes.width is None:
            width, base_width = self._widths()
            self.axes, self.base_axes = replace(self.axes, width=width), replace(self.base_axes, width=base_width)
        if not (target.sizes and base.sizes):
            self._note_stacks(theirs)

    @staticmethod
    def _declared_or_inferred(record: ModelRecord, infos: list[ParameterInfo]) -> tuple[Axes, list[ParameterInfo]]:
        seen = set(residual_widths(infos).values())
        width = record.sizes.get("width") or (seen.pop() if len(seen) == 1 else None)
        infos = orient(infos, width)
        return Axes(**{**infer_sizes(infos, {**record.inferred, **record.sizes}), **record.sizes}), infos

    def _widths(self) -> tuple[float, float]:
        """(target's, base's) residual width, or their ratio and 1 where only that is known.

        Raises:
            ValueError: If nothing but sides of matrices tells, and they tell different ratios.
        """
        pairs = self._residual_sides()
        if not pairs:  # no norm, embedding or head: the sides of the matrices must do
            ratios = sorted({new / old for new, old in self._grown_sides()})
            if len(ratios) > 1:
                raise ValueError(
                    f"base: the sides of the matrices grow by different ratios ({_listed(ratios)}), so the width ratio cannot be "
                    "inferred. Give the module a method `mue_axes()` that returns its sizes, e.g. "
                    "{'width': ..., 'depth': ..., 'ffn_width': ...}."
                )
            return (ratios[0], 1.0) if ratios else (1.0, 1.0)
        grown = [pair for pair in pairs if pair[0] != pair[1]] or pairs  # a part may keep its size, e.g. positions
        counts = Counter(new / old for new, old in grown)
        ratio = counts.most_common(1)[0][0]
        if len(counts) > 1:
            self.notes.append(
                f"parts of the model grow by different ratios ({_listed(counts)}); matrices scale by their own fan-in, and the "
                f"width ratio of what has none is taken as {ratio:g}. mue_axes() of the module can tell another"
            )
        return Counter(pair for pair in grown if pair[0] / pair[1] == ratio).most_common(1)[0][0]

    def _residual_sides(self) -> list[tuple[float, float]]:
        """(target's, base's) size wherever one of the residual stream is seen: norms, else embeddings and heads."""
        found: dict[str, list[tuple[float, float]]] = {"norm": [], "other": []}
        for info in self.infos:
            old = self.matched.get(info.name)
            if old is None:
                continue
            if info.role in (Role.NORM, Role.FINAL_NORM) and len(info.shape) == 1:
                found["norm"].append((info.shape[0], old.shape[0]))
            elif info.role in (Role.EMBEDDING, Role.UNEMBEDDING):
                found["other"].append((_stream_side(info), _stream_side(old)))
        grown = [pairs for pairs in found.values() if any(new != old for new, old in pairs)]
        return grown[0] if grown else found["norm"] or found["other"]

    def _note_stacks(self, base_infos: list[ParameterInfo]) -> None:
        mine, theirs = stack_depths(self.infos), stack_depths(base_infos)
        ratios = {mine[stack] / theirs[stack] for stack in mine if stack in theirs}
        if len(ratios) > 1:
            self.notes.append(
                f"stacks of layers grow by different ratios ({_listed(ratios)}); the depth ratio is taken as "
                f"{(self.axes.depth or 1) / (self.base_axes.depth or 1):g}. mue_axes() of the module can tell another"
            )

    def _grown_sides(self) -> list[tuple[int, int]]:
        return [
            (new, was)
            for info in self.infos
            # The router's rows are experts; they do not grow with the width.
            if info.name in self.matched and len(info.shape) >= 2 and info.role is not Role.ROUTER
            for new, was in zip(info.fans, self.matched[info.name].fans, strict=True)
            if new != was
        ]


def _listed(ratios: Iterable[float]) -> str:
    return ", ".join(f"{ratio:g}" for ratio in sorted(ratios))


def _stream_side(info: ParameterInfo) -> int:
    """The side of an embedding or a head that is the residual width."""
    if info.role is Role.UNEMBEDDING:
        return info.fans[0]
    return info.shape[-1] if info.form in ("embedding", "raw") else info.fans[1]


def _notes(
    rule: Parameterization,
    model: ModelRecord,
    sizes: _Sizes,
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


#: Kinds of forward multipliers.
KINDS = ("residual", "attention", "ffn", "route", "output")
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
        tied = row.tied or (role is Role.BIAS and "expert" in info.name and self._ties(family))
        init = self._measured(inits, old, tied) if old is not None else self._absent_init(info, row)
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
            base_shape=old.shape if old is not None else self._hidden_shape(info),
            tied=tied,
        )

    def _hidden_shape(self, info: ParameterInfo) -> tuple[int, ...] | None:
        """What a router that the base lacks is compared with."""
        return None if _is_vector(info) else (int(self.base_sizes["d"]),) * 2

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
        return {
            kind: parse(cell).evaluate(self.ratios, self.alpha) * (start if kind == "attention" else 1.0)
            for kind, (start, cell) in folded.items()
        }

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
        if old is None and _is_vector(info):
            return ratios
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

    def _ties(self, family: Family) -> bool:
        row = self.rule.table(family).get(Role.EXPERT_UP)
        return row is not None and row.tied

    @staticmethod
    def _measured(inits: Mapping[str, Init], old: ParameterInfo, tied: bool) -> Init:
        """How the base's parameter was drawn; experts of a list that start alike take the first one's."""
        name = re.sub(r"(experts?\.)\d+", r"\g<1>0", old.name) if tied else old.name
        return inits.get(name, inits.get(old.name, Init("keep", 0.0)))

    def _absent_init(self, info: ParameterInfo, row: Row) -> Init:
        if _is_vector(info):
            return Init("keep", 0.0)  # a vector's initial value does not scale
        if row.absent_init is None or self.base_sizes.get("d", 1.0) == 1.0:  # only the ratio of widths is known
            raise ValueError(
                f"base: the target has {info.name} {list(info.shape)} (role {info.role}), the base has nothing like it, and the "
                "rule gives no initialization for that. Use a base that has one, or name another role by pattern (roles: ...)."
            )
        return Init("normal", parse(row.absent_init).evaluate(self.base_sizes, self.alpha))


def _is_vector(info: ParameterInfo) -> bool:
    """True for biases, gains and scalars."""
    return len(info.shape) <= 1
