"""The plan as a record: what happens to each parameter of one model under one rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml


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
        kind: The update it gets (``adamw``, ``sgd``, ``sphere``, ``adam_sphere``, ``muon``).
        source: The row it came from.
        base_shape: Shape of the base's parameter; of its hidden matrices for one that the base lacks.
        tied: Every expert of the layer starts from the same draw.
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
    base_shape: tuple[int, ...] | None = None
    tied: bool = False


@dataclass(frozen=True)
class ScalingPlan:
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

    def __str__(self) -> str:
        from lightning_mue.console import to_text

        return to_text(self)

    def __rich__(self) -> Any:
        from lightning_mue.parameterizations.planning.render import as_renderable

        return as_renderable(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, so that it can go into a checkpoint that loads with ``weights_only=True``, or into YAML."""
        plain = asdict(self)
        plain["notes"] = list(self.notes)
        for p in plain["parameters"]:
            p["shape"], p["base_shape"] = (
                list(p["shape"]),
                list(p["base_shape"]) if p["base_shape"] is not None else None,
            )
        plain["parameters"] = list(plain["parameters"])
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> ScalingPlan:
        """The inverse of :meth:`to_dict`."""
        parameters = tuple(
            ParameterPlan(
                **{
                    **p,
                    "shape": tuple(p["shape"]),
                    "base_shape": tuple(p["base_shape"]) if p.get("base_shape") is not None else None,
                    "init": Init(**p["init"]),
                }
            )
            for p in plain["parameters"]
        )
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
        keys = ("role", "shape", *(["init", "tied"] if init else []), "lr", "weight_decay", "eps", "kind")
        lines = [
            f"{key}: {getattr(self, key)} -> {getattr(other, key)}"
            for key in ("rule", "family", "alpha", "betas")
            if getattr(self, key) != getattr(other, key)
        ]
        for key in ("axes", "base_axes", "folded"):
            a, b = getattr(self, key), getattr(other, key)
            lines += [
                f"{key}.{name}: {a.get(name)} -> {b.get(name)}" for name in {**a, **b} if a.get(name) != b.get(name)
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
