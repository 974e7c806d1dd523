"""``plan``: what a rule does to each parameter of a model, given the base on which it was tuned."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

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
from lightning_mue.parameterizations.table import RULES, Family, Parameterization, Row, default_kind, get_rule


@dataclass(frozen=True)
class Init:
    """How a parameter is drawn: ``normal`` or ``uniform`` with mean 0, ``constant``, or ``keep`` (left as it is).

    Attributes:
        kind: The distribution, as measured on the base.
        value: Standard deviation, or the constant.
    """

    kind: str
    value: float


@dataclass(frozen=True)
class ParameterPlan:
    """What happens to one parameter.

    Attributes:
        name: Fully qualified name.
        role: Its role.
        shape: Its shape.
        base: The base's parameter that it scales from, or None (a router whose base is dense).
        init: How it is drawn.
        lr: Factor on the group's learning rate.
        weight_decay: Factor on the group's weight decay.
        eps: Factor on Adam's epsilon.
        kind: The update it gets (``adamw``, ``sgd``, ``sphere``, ``adam_sphere``).
        source: The row it came from.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    base: str | None
    init: Init
    lr: float
    weight_decay: float
    eps: float
    kind: str
    source: str


@dataclass(frozen=True)
class ScalingPlan:
    """A rule applied to one model and one base: prints as a table, saves to YAML, diffs against another.

    Attributes:
        rule: Name of the rule.
        family: Optimizer family, ``adam``, ``sgd`` or ``sphere``.
        alpha: Depth exponent.
        axes: Sizes of the target.
        base_axes: Sizes of the base.
        betas: Factor on ``1 - beta`` of Adam's betas.
        parameters: One entry a trainable parameter.
        multipliers: Dotted attribute path -> forward multiplier that the target gets.
        same_size: True if target and base are the same model and run: the plan then changes nothing.
        notes: Warnings for people, e.g. an axis that the rule does not claim.
    """

    rule: str
    family: str
    alpha: float
    axes: dict[str, float]
    base_axes: dict[str, float]
    betas: float
    parameters: tuple[ParameterPlan, ...]
    multipliers: dict[str, float] = field(default_factory=dict)
    same_size: bool = False
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ParameterPlan:
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise KeyError(name)

    def __str__(self) -> str:
        from lightning_mue.parameterizations.render import as_text

        return as_text(self)

    def __rich__(self) -> Any:
        from lightning_mue.parameterizations.render import as_renderable

        return as_renderable(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, so that it can go into a checkpoint that loads with ``weights_only=True``, or into YAML."""
        plain = asdict(self)
        plain["notes"] = list(self.notes)
        plain["parameters"] = [{**asdict(p), "shape": list(p.shape)} for p in self.parameters]
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ScalingPlan:
        """The inverse of :meth:`to_dict`."""
        parameters = tuple(
            ParameterPlan(**{**p, "shape": tuple(p["shape"]), "init": Init(**p["init"])}) for p in plain["parameters"]
        )
        return cls(**{**plain, "parameters": parameters, "notes": tuple(plain["notes"])})

    def save(self, path: str | Path) -> None:
        """Writes the plan as YAML."""
        import yaml

        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ScalingPlan:
        """Reads a plan that :meth:`save` wrote."""
        import yaml

        return cls.from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))

    def diff(self, other: ScalingPlan, *, init: bool = True) -> list[str]:
        """Lines ``what: mine -> other's`` for everything in which two plans differ; empty if they train alike.

        Args:
            other: The plan to compare with.
            init: Compare the initialization too. It is measured, so its last digits depend on the machine; once weights
                exist it no longer matters.
        """
        keys = ("role", "shape", *(["init"] if init else []), "lr", "weight_decay", "eps", "kind")
        lines = [
            f"{key}: {getattr(self, key)} -> {getattr(other, key)}"
            for key in ("rule", "family", "alpha", "betas", "axes", "base_axes")
            if getattr(self, key) != getattr(other, key)
        ]
        for path in sorted({*self.multipliers, *other.multipliers}):
            mine, theirs = self.multipliers.get(path), other.multipliers.get(path)
            if mine != theirs:
                lines.append(f"{path}: {mine} -> {theirs}")
        mine_by_name = {p.name: p for p in self.parameters}
        theirs_by_name = {p.name: p for p in other.parameters}
        for name in dict.fromkeys([*mine_by_name, *theirs_by_name]):
            old, new = mine_by_name.get(name), theirs_by_name.get(name)
            if old is None or new is None:
                lines.append(
                    f"{name}: {'absent' if old is None else 'present'} -> {'absent' if new is None else 'present'}"
                )
                continue
            for key in keys:
                if getattr(old, key) != getattr(new, key):
                    lines.append(f"{name}.{key}: {getattr(old, key)} -> {getattr(new, key)}")
        return lines


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
