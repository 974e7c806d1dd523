"""``plan``: what a rule does to each parameter of a model, given the base on which it was tuned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from lightning_mue.parameterizations.axes import Axes, axes_of
from lightning_mue.parameterizations.base import RUN_KEYS, Base, build_base
from lightning_mue.parameterizations.modules import (
    ParameterInfo,
    branch_ratios,
    clean_name,
    infer_roles,
    list_parameters,
    match_parameters,
)
from lightning_mue.parameterizations.monomial import parse
from lightning_mue.parameterizations.multipliers import DOWN_ROLES, fold, multiplier_sites
from lightning_mue.parameterizations.roles import Role
from lightning_mue.parameterizations.scaling import Init, ParameterPlan, ScalingPlan
from lightning_mue.parameterizations.table import RULES, Family, Parameterization, Row, default_kind, get_rule


def plan(
    model: nn.Module,
    *,
    base: Base | None = None,
    rule: str | Parameterization = "complete-mue",
    family: Family = "adam",
    alpha: float = 1.0,
    tokens: float | None = None,
    batch_tokens: float | None = None,
    roles: Mapping[str, str] | None = None,
) -> ScalingPlan:
    """Computes what a rule does to every parameter of a model. Nothing is changed; the model may be on ``meta``.

    Args:
        model: The target. Sizes come from its ``mue_axes()``, roles from ``mue_roles`` of its modules.
        base: The tuned model: keyword overrides of the target's own hyperparameters (which may also hold the base's
            ``tokens`` and ``batch_tokens``), a module, or a factory. ``None`` or ``{}``: the target is the base.
        rule: ``sp``, ``mup``, ``complete-p``, ``complete-mue``, ``hyperp``, or a table of one's own.
        family: Optimizer family: ``adam``, ``sgd`` or ``sphere`` (HyperSphereOptimizer).
        alpha: Depth exponent in [1/2, 1]; 1 is CompleteP.
        tokens: Training length of the target in tokens, if it is to count.
        batch_tokens: Batch size of the target in tokens, if it is to count.
        roles: Regular expression on names -> role, for modules that declare none.

    Returns:
        The plan.

    Raises:
        ValueError: For a bad argument, a parameter without a role, or a rule without a row for a role.
    """
    rule = get_rule(rule)
    if not 0.5 <= alpha <= 1.0:
        raise ValueError(f"alpha: found {alpha}, expected a depth exponent in [0.5, 1].")
    base_run = {key: base[key] for key in RUN_KEYS if key in base} if isinstance(base, Mapping) else {}
    if base is None or (isinstance(base, Mapping) and set(base) <= set(RUN_KEYS)):
        base = model
    _check_run("tokens", tokens, base_run)
    _check_run("batch_tokens", batch_tokens, base_run)
    # Shapes first, without memory: a base that is the target itself may be too large to make.
    shapes = build_base(model, base, device="meta")
    axes = axes_of(model, tokens, batch_tokens)
    base_axes = axes_of(shapes, base_run.get("tokens", tokens), base_run.get("batch_tokens", batch_tokens))
    target_parameters = list_parameters(model, roles)
    base_parameters = list_parameters(shapes, _matching(roles, shapes))
    same_size = _signature(target_parameters) == _signature(base_parameters) and not axes.changed(base_axes)
    matched = match_parameters(target_parameters, base_parameters)
    target_parameters = infer_roles(target_parameters, matched)

    if axes.width is None or base_axes.width is None:
        ratio = _inferred_width(target_parameters, matched)
        axes, base_axes = replace(axes, width=ratio), replace(base_axes, width=1.0)
    scale = _Scale(rule, family, alpha, axes, base_axes)
    inits: dict[str, Init] = {}
    if base is not model and not same_size:
        shapes = build_base(model, base)
        inits = {info.name: measure_init(info.tensor) for info in list_parameters(shapes)}
    sites, folded = multiplier_sites(rule, model, shapes, scale.ratios, alpha)
    parameters = tuple(scale.parameter(info, matched.get(info.name), inits, folded) for info in target_parameters)
    return ScalingPlan(
        rule=rule.name,
        family=family,
        alpha=alpha,
        axes=axes.to_dict(),
        base_axes=base_axes.to_dict(),
        betas=parse(rule.betas).evaluate(scale.ratios, alpha),
        parameters=parameters,
        multipliers={} if same_size else sites,
        same_size=same_size,
        notes=tuple(_notes(rule, model, axes, base_axes)),
    )


def _check_run(key: str, value: float | None, base_run: Mapping[str, float]) -> None:
    if (value is None) != (key not in base_run):
        where, other = ("base", f"`{key}`") if value is not None else (f"`{key}`", f"base.{key}")
        raise ValueError(
            f"{key}: {other} is given but {where} has none, so there is no ratio to scale by. Give both "
            f"(e.g. {key}: 4e9 and base: {{..., {key}: 1e9}}) or neither."
        )


def _matching(roles: Mapping[str, str] | None, base: nn.Module) -> dict[str, str]:
    """The patterns that name something in the base too (an MoE's need not, where the base is dense)."""
    names = [clean_name(name) for name, _ in base.named_parameters(remove_duplicate=False)]
    return {p: r for p, r in (roles or {}).items() if any(re.search(p, name) for name in names)}


def _signature(parameters: list[ParameterInfo]) -> list[tuple[str, tuple[int, ...]]]:
    return [(info.name, info.shape) for info in parameters]


def _notes(rule: Parameterization, model: nn.Module, axes: Axes, base_axes: Axes) -> list[str]:
    """What a person should know: moves and routers for which the rule makes no claim."""
    changed = axes.changed(base_axes)
    notes = [
        f"{axis} differs from the base ({base_axes.to_dict()[axis]:g} -> {axes.to_dict()[axis]:g}), but {rule.name} "
        "does not claim transfer along it"
        for axis in changed
        if rule.moves and axis not in rule.moves
    ]
    if {"n_experts", "top_k"} & set(changed):
        for setting, claimed in rule.routing.items():
            found = {str(getattr(m, setting)) for m in model.modules() if getattr(m, "mue_router", False)}
            if found - claimed:
                notes.append(
                    f"{setting}={', '.join(sorted(found))}, but {rule.name} claims transfer over experts and top_k for "
                    f"{' or '.join(sorted(claimed))} only"
                )
    return notes


def _inferred_width(infos: list[ParameterInfo], matched: Mapping[str, ParameterInfo]) -> float:
    """The one ratio by which sides of matrices grow, for modules that declare no axes.

    Raises:
        ValueError: If there are several.
    """
    grown = {
        new / old
        for info in infos
        # The router's rows are experts; they do not grow with the width.
        if info.name in matched and len(info.shape) >= 2 and info.role is not Role.ROUTER
        for new, old in zip(info.fans, matched[info.name].fans, strict=True)
        if new != old
    }
    if len(grown) > 1:
        raise ValueError(
            f"base: the sides of the matrices grow by different ratios ({', '.join(f'{g:g}' for g in sorted(grown))}), so the "
            "width ratio cannot be inferred. Give the module a method `mue_axes()` that returns its sizes, e.g. "
            "{'width': ..., 'depth': ..., 'ffn_width': ...}."
        )
    return grown.pop() if grown else 1.0


def measure_init(tensor: Tensor) -> Init:
    """Recognises how a parameter was drawn.

    Args:
        tensor: Freshly initialized parameter, any shape.

    Returns:
        ``constant`` where all entries are equal; ``uniform`` or ``normal`` for a mean of about 0; else ``keep``.
    """
    values = tensor.detach().float().flatten()
    if values.numel() == 0:
        return Init("keep", 0.0)
    first = float(values[0])
    if bool((values == first).all()):
        return Init("constant", first)
    mean, std, peak = float(values.mean()), float(values.std(correction=0)), float(values.abs().max())
    # Five standard errors: a false alarm once in two million parameters.
    if abs(mean) > 5 * std / values.numel() ** 0.5 or values.numel() < 2:
        return Init("keep", 0.0)
    # A uniform distribution ends at sqrt(3) standard deviations; 64 normal draws go past 1.8 with near certainty.
    rms = float(values.square().mean().sqrt())
    kind = "uniform" if values.numel() >= 64 and peak < 1.8 * rms else "normal"
    return Init(kind, rms)


def _is_ffn(role: Role | None) -> bool:
    """True for the matrices of an FFN or MoE."""
    return role is not None and role.value.endswith(("_up", "_down"))


class _Scale:
    """Evaluates a rule's cells for single parameters."""

    def __init__(self, rule: Parameterization, family: Family, alpha: float, axes: Axes, base_axes: Axes) -> None:
        self.rule, self.family, self.alpha = rule, family, alpha
        self.table = rule.table(family)
        self.base_sizes = base_axes.sizes()
        self.ratios = axes.ratios(base_axes)
        self.active_width_known = axes.active_width is not None and base_axes.active_width is not None

    def parameter(
        self, info: ParameterInfo, old: ParameterInfo | None, inits: Mapping[str, Init], folded: Mapping[str, float]
    ) -> ParameterPlan:
        """The plan of one parameter; ``folded`` holds kinds of multipliers that no module applies (see multipliers.py)."""
        role = info.role
        assert role is not None
        row = self._row(role, info)
        ratios = self._local_ratios(info, old)
        cells = {name: parse(getattr(row, name)).evaluate(ratios, self.alpha) for name in ("init", "lr", "wd", "eps")}
        kind = default_kind(Role.EMBEDDING if info.tied else role, self.family)
        if role in DOWN_ROLES:
            for name, start in folded.items():
                cells = fold(cells, start * parse(self.rule.multipliers[name]).evaluate(ratios, self.alpha), kind)
        return ParameterPlan(
            name=info.name,
            role=role.value,
            shape=info.shape,
            base=old.name if old is not None else None,
            init=self._init(row, old, inits, cells["init"]),
            lr=cells["lr"],
            weight_decay=cells["wd"],
            eps=cells["eps"],
            kind=kind,
            source=row.source + (" (derived)" if row.status == "derived" else "") + (", tied" if info.tied else ""),
        )

    def _row(self, role: Role, info: ParameterInfo) -> Row:
        row = self.table.get(role)
        if row is None:
            others = [r.name for r in RULES.values() if self.family in r.tables and role in r.tables[self.family]]
            raise ValueError(
                f"rule={self.rule.name!r} ({self.rule.source}) has no row for the role {role.value!r} of {info.name}. "
                f"Rules that have one: {', '.join(others) or 'none'}."
            )
        if info.tied:
            # Theory section 3: tied embeddings are drawn as the unembedding and learn by the rule of vectors.
            vector = self.table[Role.EMBEDDING]
            return Row(row.init, vector.lr, vector.wd, vector.eps, row.source, row.status)
        return row

    def _local_ratios(self, info: ParameterInfo, old: ParameterInfo | None) -> dict[str, float]:
        ratios = dict(self.ratios, fan_in=1.0, fan_out=1.0)
        if old is None:
            # Nothing to compare shapes with: a router's fan-in is the width, its fan-out the number of experts.
            ratios.update(fan_in=ratios["d"], fan_out=ratios["E"])
            return ratios
        for key, new, was in zip(("fan_in", "fan_out"), info.fans, old.fans, strict=True):
            ratios[key] = new / was
        local = branch_ratios(info.branch, old.branch)
        if not local and not self.active_width_known and _is_ffn(info.role):
            # An FFN that declares nothing: its active width is the hidden side of this very matrix.
            local = {"A": ratios["fan_in" if info.role in DOWN_ROLES else "fan_out"]}
        return {**ratios, **local}

    def _init(self, row: Row, old: ParameterInfo | None, inits: Mapping[str, Init], cell: float) -> Init:
        if old is None:
            if row.absent_init is None or "d" not in self.base_sizes:
                raise ValueError(
                    f"base: the target has a parameter of the row {row.source!r} that the base lacks, and the rule gives "
                    "no initialization for it. Use a base that has one."
                )
            return Init("normal", parse(row.absent_init).evaluate(self.base_sizes, self.alpha) * cell)
        measured = inits.get(old.name, Init("keep", 0.0))
        return measured if measured.kind == "keep" else Init(measured.kind, measured.value * cell)
