"""The plan: what happens to each parameter of one model under one rule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lightning_mue.parameterizations.planning.parameter_plan import ParameterPlan
from lightning_mue.parameterizations.planning.render import PrintablePlan
from lightning_mue.parameterizations.reading.initializer import Init


@dataclass(frozen=True)
class ScalingPlan(PrintablePlan):
    """A rule applied to one model and one base: prints as a table, saves to YAML, diffs against another.

    Attributes:
        rule: Name of the rule.
        family: Optimizer family, ``adam``, ``sgd``, ``sphere`` or ``muon``.
        alpha: Depth exponent.
        axes: Sizes of the target.
        base_axes: Sizes of the base.
        betas: Factor on ``1 - beta`` of Adam's betas.
        parameters: One entry a trainable parameter.
        multipliers: Dotted attribute path -> forward multiplier that the target gets.
        same_size: True if target and base are the same model and run: the plan then changes nothing.
        notes: Warnings for people, e.g. an axis that the rule does not claim.
        folded: Kind of forward multiplier -> its value over the base's, where no module exposes it and it went into weights.
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
    folded: dict[str, float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> ParameterPlan:
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, so that it can go into a checkpoint that loads with ``weights_only=True``, or into YAML."""
        plain = asdict(self)
        plain["notes"], plain["parameters"] = list(self.notes), list(plain["parameters"])
        for p in plain["parameters"]:
            p["shape"] = list(p["shape"])
            p["base_shape"] = list(p["base_shape"]) if p["base_shape"] is not None else None
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ScalingPlan:
        """The inverse of :meth:`to_dict`."""
        parameters = tuple(map(_parameter, plain["parameters"]))
        return cls(**{**plain, "parameters": parameters, "notes": tuple(plain["notes"])})

    def save(self, path: str | Path) -> None:
        """Writes the plan as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ScalingPlan:
        """Reads a plan that :meth:`save` wrote."""
        return cls.from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))

    def diff(self, other: ScalingPlan, *, init: bool = True) -> list[str]:
        """Lines ``what: mine -> other's`` for everything in which two plans differ; empty if they train alike.

        Args:
            other: The plan to compare with.
            init: Compare the initialization too. It is measured, so its last digits depend on the machine; once weights
                exist it no longer matters.
        """
        lines = _differences("", ("rule", "family", "alpha", "betas"), self, other)
        for key in ("axes", "base_axes", "folded"):
            mine, theirs = getattr(self, key), getattr(other, key)
            lines += [f"{key}.{line}" for line in _changed_values(mine, theirs, {**mine, **theirs})]
        lines += _changed_values(self.multipliers, other.multipliers, sorted({*self.multipliers, *other.multipliers}))
        keys = ("role", "shape", *(["init", "tied"] if init else []), "lr", "weight_decay", "eps", "kind")
        ours, others = ({p.name: p for p in plan.parameters} for plan in (self, other))
        for name in dict.fromkeys([*ours, *others]):
            old, new = ours.get(name), others.get(name)
            if old is None or new is None:
                lines.append(f"{name}: {_presence(old)} -> {_presence(new)}")
            else:
                lines += _differences(f"{name}.", keys, old, new)
        return lines


def _parameter(plain: Mapping[str, Any]) -> ParameterPlan:
    base_shape = tuple(plain["base_shape"]) if plain.get("base_shape") is not None else None
    changed = {"shape": tuple(plain["shape"]), "base_shape": base_shape, "init": Init(**plain["init"])}
    return ParameterPlan(**{**plain, **changed})


def _differences(prefix: str, attributes: Iterable[str], mine: object, theirs: object) -> list[str]:
    pairs = ((name, getattr(mine, name), getattr(theirs, name)) for name in attributes)
    return [f"{prefix}{name}: {old} -> {new}" for name, old, new in pairs if old != new]


def _changed_values(mine: Mapping[str, float], theirs: Mapping[str, float], names: Iterable[str]) -> list[str]:
    return [f"{name}: {mine.get(name)} -> {theirs.get(name)}" for name in names if mine.get(name) != theirs.get(name)]


def _presence(entry: ParameterPlan | None) -> str:
    return "absent" if entry is None else "present"
