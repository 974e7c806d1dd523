"""Parameter groups with a plan's factors in them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_mue.contract import declared_family
from lightning_mue.parameterizations.planning.scaling_plan import ParameterPlan, ScalingPlan
from lightning_mue.parameterizations.rules.kinds import CONVENTIONS, SPHERE_KINDS, Family, matrix_sides

#: Marks a parameter group whose factors are already in it.
SCALED = "mue_scaled"
#: `CONVENTIONS` under the names of HyperSphereOptimizer's `lr_convention` and of torch.optim.Muon's `adjust_lr_fn`.
_MUON_FACTORS = {**CONVENTIONS, "match_rms_adamw": CONVENTIONS["rms"]}


def family_of(optimizer: torch.optim.Optimizer) -> Family:
    """The family in whose table an optimizer's factors stand.

    HyperSphereOptimizer says itself whether it is on the sphere or a Muon. Of the others only torch.optim.Muon is known by its
    type, because only of it are the factors of the matrix shape known, for which `split` makes up; another one has to say that
    it is one, with ``mue_family = "muon"``.

    Raises:
        ValueError: For an optimizer that no table covers.
    """
    declared = declared_family(optimizer)
    if declared is not None:
        return declared
    if (muon := getattr(torch.optim, "Muon", None)) is not None and isinstance(optimizer, muon):
        return "muon"
    classes = [cls.__name__ for cls in type(optimizer).__mro__]  # a subclass of AdamW by any name updates like Adam
    if any("muon" in name.lower() for name in classes):
        raise ValueError(
            f"optimizer: found {type(optimizer).__name__}, a Muon other than torch.optim.Muon, whose factors of the matrix shape "
            "are not known here. Use torch.optim.Muon; or set its attribute mue_family = 'muon': the plan's lr of a matrix is "
            "then the wanted ratio of its update's spectral norm to the base's, so the optimizer's own factor must be the same "
            "at both sizes (switch it off if it has one)."
        )
    for name in classes:
        for family in ("adam", "sgd"):
            if family in name.lower():
                return family  # type: ignore[return-value]
    raise ValueError(
        f"optimizer: found {type(optimizer).__name__}; a parameterization is known for Adam-like optimizers (Adam, AdamW), SGD, "
        "Muon and HyperSphereOptimizer. If yours updates like one of them, set its attribute mue_family to 'adam', 'sgd', "
        "'muon' or 'sphere'."
    )


@dataclass
class Part:
    """Parameters of one of the user's groups that a plan treats alike.

    Attributes:
        group: Index of the group that holds them.
        source: Index of the group whose settings they take.
        entry: The plan of one of them; None for frozen parameters outside the plan.
        muon: Factor on the learning rate that makes up for a Muon's own dependence on the shape.
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
    """Splits parameter groups by the plan's factors.

    Args:
        groups: The user's groups, as an optimizer holds them.
        plan: The plan.
        names: Parameter -> qualified name.
        by_role: Keep roles apart that have the same factors.

    Returns:
        The parts, in order. Where the plan gives a parameter another ``kind`` than its group has, it takes the settings of the
        first group of that kind, if there is one.

    Raises:
        ValueError: For a parameter that the plan does not know or knows for another optimizer, groups that are scaled already, or
            a given `radius`, for which a plan that changes sizes has no factor.
    """
    entries = {entry.name: entry for entry in plan.parameters}
    by_kind = {group["kind"]: i for i, group in reversed(list(enumerate(groups))) if "kind" in group}
    parts: dict[tuple[Any, ...], Part] = {}
    changed: list[str] = []
    for i, group in enumerate(groups):
        _refuse_scaled(group)
        for parameter in group["params"]:
            name = names.get(parameter)
            entry = entries.get(name) if name is not None else None
            if entry is None:
                if name is None or parameter.requires_grad:
                    raise _unknown(parameter, name)
                parts.setdefault((i,), Part(i, i, None, 1.0)).params.append(parameter)
                continue
            source = i
            if group.get("kind") not in (None, entry.kind):
                source = by_kind.get(entry.kind, i)
                changed.append(f"{name} ({entry.role}): {group['kind']} -> {entry.kind}")
            _refuse_radius(groups[source], entry, plan)
            muon = _muon_correction(groups[source], entry)
            key = (
                i,
                entry.kind,
                entry.lr * muon,
                entry.weight_decay / muon,
                entry.eps,
                entry.role if by_role else None,
            )
            part = parts.setdefault(key, Part(i, source, entry, muon))
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
        result["eps"] = source["eps"] * entry.eps
    if "betas" in source and betas != 1.0:
        result["betas"] = tuple(1 - (1 - beta) * betas for beta in source["betas"])
        if not all(0 <= beta < 1 for beta in result["betas"]):
            raise ValueError(
                f"betas: {tuple(source['betas'])} become {result['betas']}, because 1 - beta scales with {betas:g} = batch / "
                "tokens ratio. Use a smaller batch, or betas nearer to 1 at the base."
            )
    # torch's `param_names` runs parallel to `params`, so it cannot be taken over to a part of the group.
    if "param_names" in source:
        result["param_names"] = None
    return result


def scale_groups(
    groups: Iterable[Mapping[str, Any]], plan: ScalingPlan, names: Mapping[Tensor, str]
) -> list[dict[str, Any]]:
    """Splits parameter groups by the plan's factors and roles (see `split`) and applies them.

    Returns:
        New groups, each with the ``role`` of its parameters (``frozen`` for frozen ones outside the plan).
    """
    groups = list(groups)
    return [
        {
            **scaled_group(groups[part.source], part, plan.betas),
            "params": part.params,
            "role": next(iter(part.roles), "frozen"),
        }
        for part in split(groups, plan, names, by_role=True)
    ]


def rate_tags(parts: Sequence[Part], groups: Sequence[Mapping[str, Any]]) -> list[tuple[str, int]]:
    """Names for the learning rates of parts: the role, with what tells its parts apart where there are several.

    Args:
        parts: Parts as `split` gives them.
        groups: The user's groups.

    Returns:
        (tag, index of a part): ``hidden``; ``hidden/sgd`` where kinds differ; ``hidden/group1`` (or the group's ``name``) where
        the user's groups do; ``hidden/x0.25`` where the plan's factors do. They depend on the structure, not on the rates.
    """
    by_role: dict[str, list[int]] = {}
    for index, part in enumerate(parts):
        for role in part.roles:
            by_role.setdefault(role, []).append(index)
    tags: dict[str, int] = {}
    for role, indexes in by_role.items():
        qualities = [_qualities(parts[index], groups) for index in indexes]
        differ = [len({quality[i] for quality in qualities}) > 1 for i in range(3)]
        for index, quality in zip(indexes, qualities, strict=True):
            tags["/".join([role, *(q for q, shown in zip(quality, differ, strict=True) if shown)])] = index
    return list(tags.items())


def _qualities(part: Part, groups: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    assert part.entry is not None
    name = groups[part.group].get("name")
    return part.entry.kind, str(name) if name else f"group{part.group}", f"x{part.lr:.4g}"


def _muon_correction(group: Mapping[str, Any], entry: ParameterPlan) -> float:
    """factor(base shape) / factor(shape): the plan's factor for ``muon`` is the wanted ratio of the updates' spectral norms.

    Raises:
        ValueError: For a parameter in torch.optim.Muon whose row is for another update.
    """
    if "adjust_lr_fn" in group:
        if entry.kind != "muon":
            raise ValueError(
                f"optimizer: {entry.name} ({entry.role}) is in torch.optim.Muon, but the plan gives it the update {entry.kind!r}. "
                "Give Muon the hidden matrices only, and the rest (embedding, unembedding, norms, biases) to AdamW; or train all "
                "of them with HyperSphereOptimizer(sphere=False)."
            )
        convention = group["adjust_lr_fn"] or "original"
    else:
        convention = group.get("lr_convention")
    if entry.kind != "muon" or entry.base_shape is None:
        return 1.0
    factor = _MUON_FACTORS.get(convention)  # None, or one of an optimizer that is not known here: as it is
    return 1.0 if factor is None else factor(*matrix_sides(entry.base_shape)) / factor(*matrix_sides(entry.shape))


def _refuse_radius(group: Mapping[str, Any], entry: ParameterPlan, plan: ScalingPlan) -> None:
    if group.get("radius") is None or plan.same_size or entry.kind not in SPHERE_KINDS:
        return
    raise ValueError(
        f"optimizer: radius={group['radius']:g} is one Frobenius norm for every matrix, but the radii of another size follow from "
        f"its initial weights, which the plan scales ({entry.name}: std {entry.init.value:.4g}). Leave radius out (None keeps the "
        "norms of the initial weights), and set the base's initial std instead: a matrix [out, in] has the radius "
        "std * sqrt(out * in)."
    )


def _warn_of_kinds(changed: Sequence[str]) -> None:
    """Says which parameters get another update than their groups have, as they do not at the base, where no plan is applied."""
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        warnings.warn(
            f"optimizer: {len(changed)} parameter(s) get the update of the plan's row instead of their group's kind, and the "
            f"settings of the first group of that kind: {'; '.join(changed[:3])}{more}. A run at the base keeps the group's kind; "
            "so that both train alike, pass named parameters, or set the kind or the role that is meant.",
            stacklevel=3,
        )


def _refuse_scaled(group: Mapping[str, Any]) -> None:
    if group.get(SCALED):
        raise ValueError(
            "optimizer: its groups come from param_groups(model, plan), so they hold the plan's factors already. Use either "
            "param_groups or MuECallback, not both."
        )


def _unknown(parameter: Tensor, name: str | None) -> ValueError:
    return ValueError(
        f"optimizer: it holds a parameter of shape {list(parameter.shape)} ({name or 'unnamed'}) that the plan does "
        "not know. Give the optimizer the parameters of this module only, made after configure_model."
    )
