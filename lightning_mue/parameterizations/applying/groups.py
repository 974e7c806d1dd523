"""Parameter groups with a plan's factors in them."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_mue.checks import listed, mismatch, require_choice, require_number, require_types, value_error
from lightning_mue.parameterizations.applying.initial_weights import check_covers
from lightning_mue.parameterizations.planning.scaling_plan import ParameterPlan, ScalingPlan
from lightning_mue.parameterizations.reading.parameters import named_tensors
from lightning_mue.parameterizations.rules.kinds import CONVENTIONS, SPHERE_KINDS, matrix_sides, parts_of

#: Marks a parameter group whose factors are already in it.
SCALED = "mue_scaled"
#: `CONVENTIONS` by the names of HyperSphereOptimizer's `lr_convention` and of torch.optim.Muon's `adjust_lr_fn`.
_MUON_FACTORS = {**CONVENTIONS, "match_rms_adamw": CONVENTIONS["rms"]}


@dataclass
class Part:
    """Parameters of one of the user's groups that a plan treats alike.

    Attributes:
        group: Index of the user's group that holds them.
        source: Index, among the `parts_of` all groups, of the one whose settings they take.
        entry: The plan of one of them; None for frozen parameters outside the plan.
        muon: Factor on the learning rate that corrects for a Muon's own dependence on the shape.
        params: The parameters.
        roles: Their roles.
    """

    group: int
    source: int
    entry: ParameterPlan | None
    muon: float
    params: list[Tensor] = field(default_factory=list)
    roles: dict[str, None] = field(default_factory=dict)

    @property
    def lr(self) -> float:
        """Factor on the learning rate."""
        return 1.0 if self.entry is None else self.entry.lr * self.muon


def split(
    groups: Sequence[Mapping[str, Any]], plan: ScalingPlan, names: Mapping[Tensor, str], *, by_role: bool
) -> list[Part]:
    """Splits the user's parameter groups by the plan's factors; ``by_role`` keeps roles apart that have the same factors.

    Returns:
        The parts, in order. Where the plan gives a parameter another ``kind`` than its group has, it takes the settings of the
        first group of that kind, if there is one; in a group that was added later, only those of that group.

    Raises:
        ValueError: For a parameter that the plan does not know or knows for another optimizer, groups that are scaled already, or
            a given `radius`, for which a plan that changes sizes has no factor.
    """
    entries = {entry.name: entry for entry in plan.parameters}
    settings = [(i, piece) for i, group in enumerate(groups) for piece in parts_of(group)]
    by_kind = {(i, piece.get("kind")): j for j, (i, piece) in reversed(list(enumerate(settings)))}
    parts: dict[tuple[Any, ...], Part] = {}
    changed: list[str] = []
    for j, (i, group) in enumerate(settings):
        _refuse_scaled(group)
        for parameter in group["params"]:
            name = names.get(parameter)
            entry = entries.get(name) if name is not None else None
            if entry is None:
                if name is None or parameter.requires_grad:
                    raise _unknown(parameter, name)
                parts.setdefault((j,), Part(i, j, None, 1.0)).params.append(parameter)
                continue
            source = j
            if group.get("kind") not in (None, entry.kind):
                among = [i] if group.get("added") else [i, *range(len(groups))]
                source = next((by_kind[k, entry.kind] for k in among if (k, entry.kind) in by_kind), j)
                changed.append(f"{name} ({entry.role}): {group['kind']} -> {entry.kind}")
            _refuse_radius(settings[source][1], entry, plan)
            muon = _muon_correction(settings[source][1], entry)
            factors = (entry.kind, entry.lr * muon, entry.weight_decay / muon, entry.eps)
            part = parts.setdefault(
                (i, source, *factors, entry.role if by_role else None), Part(i, source, entry, muon)
            )
            part.params.append(parameter)
            part.roles[entry.role] = None
    _warn_of_kinds(changed)
    return list(parts.values())


def scaled_group(source: Mapping[str, Any], part: Part, betas: float) -> dict[str, Any]:
    """A group for one part: the settings of its source times the plan's factors. The parameters are left out."""
    entry, result = part.entry, dict(source)
    if entry is None:
        return result
    result["lr"] = source["lr"] * (entry.lr * part.muon)
    if "kind" in source:
        result["kind"] = entry.kind
    if "weight_decay" in source:
        result["weight_decay"] = source["weight_decay"] * (entry.weight_decay / part.muon)
    if "eps" in source:
        result["eps"] = _scaled_eps(source["eps"], entry.eps)
    if "betas" in source and betas != 1.0:
        result["betas"] = tuple(1 - (1 - beta) * betas for beta in source["betas"])
        if not all(0 <= beta < 1 for beta in result["betas"]):
            raise value_error(
                "betas",
                found=f"{tuple(source['betas'])}, which become {result['betas']}: 1 - beta scales with {betas:g}, the ratio of "
                "batch / tokens",
                expected="scaled betas in [0, 1)",
                do="Use a smaller batch, or betas nearer to 1 at the base.",
            )
    # torch's `param_names` runs parallel to `params`, so it cannot be taken over to a part of the group.
    if "param_names" in source:
        result["param_names"] = None
    return result


def _scaled_eps(eps: Any, factor: float) -> Any:
    """An eps times a factor; of Adafactor's pair the first, which is added to squared gradients, times its square.

    The second is for a rate relative to the weights, which `family_of` refuses.
    """
    if isinstance(eps, (tuple, list)):
        first, *others = eps
        return (None if first is None else first * factor**2, *others)
    return None if eps is None else eps * factor


def scale_groups(
    groups: Sequence[Mapping[str, Any]], plan: ScalingPlan, names: Mapping[Tensor, str]
) -> list[dict[str, Any]]:
    """New groups, split by the plan's factors and roles (see `split`), scaled, each with its ``role`` (or ``frozen``)."""
    settings = [piece for group in groups for piece in parts_of(group)]
    return [
        scaled_group(settings[part.source], part, plan.betas)
        | {"params": part.params, "role": next(iter(part.roles), "frozen")}
        for part in split(groups, plan, names, by_role=True)
    ]


def param_groups(
    model: nn.Module, plan: ScalingPlan, *, lr: float | Tensor, kinds: Collection[str] | None = None, **defaults: Any
) -> list[dict[str, Any]]:
    """Parameter groups with the plan's factors, for people who write ``configure_optimizers`` themselves.

    Args:
        model: The module that the plan was made for.
        plan: The plan.
        lr: The learning rate tuned at the base.
        kinds: Updates whose parameters to take, where a plan is for several optimizers: ``{"muon"}`` for torch.optim.Muon,
            ``{"adamw"}`` for the AdamW beside it. None: all.
        **defaults: Further settings tuned at the base, e.g. ``weight_decay=0.1, eps=1e-8``. Give them here: what is given to
            the optimizer's constructor instead is the same for all groups, unscaled. ``eps`` is 1e-8 unless given. What a Muon
            multiplies its ``lr`` with belongs here too, because the factors allow for it: ``adjust_lr_fn`` for
            torch.optim.Muon, ``lr_convention`` ("spectral" unless given) for HyperSphereOptimizer with ``sphere=False``.

    Returns:
        Groups with unique ``name`` and, for HyperSphereOptimizer, ``kind``. A plan of the family ``muon`` alone is for
        HyperSphereOptimizer, unless ``adjust_lr_fn`` or ``kinds={"muon"}`` ask for torch.optim.Muon.

    Example:
        ``torch.optim.AdamW(param_groups(model, plan(model, base={"width": 64}), lr=1e-3, weight_decay=0.1, eps=1e-8))``
    """
    require_types(param_groups, locals())
    require_number("lr", float(lr), at_least=0)
    check_covers(model, plan)
    tensors = named_tensors(model)
    kind_of = {entry.name: entry.kind for entry in plan.parameters}
    for kind in kinds or ():
        require_choice("kinds", kind, sorted(set(map(str, kind_of.values()))))
    taken = {name: p for name, p in tensors.items() if p.requires_grad and (kinds is None or kind_of[name] in kinds)}
    _refuse_rows([entry for entry in plan.parameters if entry.rows is not None and entry.name in taken])
    # The optimizer's own default would not be scaled.
    settings = {"eps": 1e-8, **defaults} if {kind_of[name] for name in taken} - {"sgd", "muon"} else defaults
    for_torch = "adjust_lr_fn" in settings or (set(kinds or ()) == {"muon"} and "lr_convention" not in settings)
    if for_torch:
        settings = {"adjust_lr_fn": None, **settings}  # its own dependence on the shape is allowed for
    elif plan.family in ("sphere", "muon"):
        settings = {"kind": None, **settings}  # filled in from the plan
        if plan.family == "muon":
            settings = {"lr_convention": "spectral", **settings}
    groups = scale_groups(
        [{"params": list(taken.values()), "lr": lr, **settings}], plan, {p: n for n, p in tensors.items()}
    )
    for i, scaled in enumerate(groups):
        scaled["name"] = f"{scaled['role']}/{i}"
        scaled[SCALED] = True
    return groups


def _muon_correction(group: Mapping[str, Any], entry: ParameterPlan) -> float:
    """factor(base shape) / factor(shape): the plan's factor for ``muon`` is the wanted ratio of the updates' spectral norms.

    Raises:
        ValueError: For a parameter in torch.optim.Muon whose row is for another update.
    """
    if "adjust_lr_fn" in group:
        if entry.kind != "muon":
            raise value_error(
                "optimizer",
                found=f"{entry.name} ({entry.role}) in torch.optim.Muon, while the plan gives it the update {entry.kind!r}",
                expected="hidden matrices only",
                do="Give the rest (embedding, unembedding, norms, biases) to AdamW; or train all parameters with "
                "HyperSphereOptimizer(sphere=False).",
            )
        convention = group["adjust_lr_fn"] or "original"
    else:
        convention = group.get("lr_convention")
    if entry.kind != "muon" or entry.base_shape is None:
        return 1.0
    factor = _MUON_FACTORS.get(convention)  # None, or an unknown convention: no correction
    return 1.0 if factor is None else factor(*matrix_sides(entry.base_shape)) / factor(*matrix_sides(entry.shape))


def _refuse_radius(group: Mapping[str, Any], entry: ParameterPlan, plan: ScalingPlan) -> None:
    if group.get("radius") is None or plan.same_size or entry.kind not in SPHERE_KINDS:
        return
    raise value_error(
        "optimizer.radius",
        found=f"radius={group['radius']:g} for every matrix",
        expected="None: at another size the radii follow from the initial weights, which the plan scales "
        f"({entry.name}: std {entry.init.value:.4g})",
        do="Leave radius out (None keeps the norms of the initial weights), and set the base's initial std instead: a matrix "
        "[out, in] has the radius std * sqrt(out * in).",
    )


def _warn_of_kinds(changed: Sequence[str]) -> None:
    """Warns of parameters that get another update than their groups have; at the base, where no plan is applied, they do not."""
    if changed:
        warnings.warn(
            mismatch(
                "optimizer",
                found=f"{len(changed)} parameter(s) in groups of another kind than the plan's: {listed(changed, limit=3)}",
                expected="the plan's kinds; they get these, with settings of the first group of that kind (or their added group's)",
                do="A run at the base keeps the group's kind. So that both train alike, pass named parameters, or set the kind or "
                "the role that is meant.",
            ),
            stacklevel=3,
        )


def _refuse_scaled(group: Mapping[str, Any]) -> None:
    if group.get(SCALED):
        raise value_error(
            "optimizer",
            found="groups from param_groups(model, plan), which hold the plan's factors already",
            expected="groups without them",
            do="Use either param_groups or MuECallback, not both.",
        )


def _refuse_rows(entries: Sequence[ParameterPlan]) -> None:
    if entries:
        rows = entries[0].rows
        assert rows is not None
        raise value_error(
            "plan",
            found=f"an attention multiplier ({rows.factor:.4g}) in the query rows of {listed([e.name for e in entries], limit=3)}, "
            "for which no factors of a parameter group stand",
            expected="a plan without multipliers in some rows of a parameter",
            do="Use MuECallback, or ScaledStep(optimizer, plan, model) on an optimizer with your own groups; or name the attribute "
            "that scales the logits, multipliers: {attention: ...}; or keep the head dimension as at the base (more heads).",
        )


def _unknown(parameter: Tensor, name: str | None) -> ValueError:
    return value_error(
        "optimizer",
        found=f"a parameter of shape {list(parameter.shape)} ({name or 'unnamed'}) that the plan does not know",
        expected="parameters of the plan",
        do="Give the optimizer the parameters of this module only, made after configure_model.",
    )
