"""Reads the base: from a module, from overrides of the target, or from a file that `save_base` wrote.

A saved base needs no code: the class that it was made from need not exist any more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import yaml
from torch import nn

from lightning_mue.checks import value_error
from lightning_mue.names import clean_name
from lightning_mue.parameterizations.reading.base import RUN_KEYS, Base, build_base
from lightning_mue.parameterizations.reading.parameters import role_patterns
from lightning_mue.parameterizations.reading.record import VERSION, ModelRecord, describe
from lightning_mue.parameterizations.reading.sites import float_attributes

_WRITE = (
    "Write it with `lightning-mue explain --save-base FILE`, or give the base as overrides, e.g. base: {width: 64}."
)


@dataclass
class BaseRecord:
    """The base: its shapes at once, its initial weights when they are asked for.

    A base may be as large as the target, so real weights are made only for a plan that changes something.

    Attributes:
        shapes: The base without its initial weights (a saved one has them).
        measure: Makes real weights and describes the base with how they were drawn.
    """

    shapes: ModelRecord
    measure: Callable[[], ModelRecord]

    @cached_property
    def measured(self) -> ModelRecord:
        """The base with how its weights were drawn."""
        return self.shapes if self.shapes.inits else self.measure()


def read_base(
    model: nn.Module,
    target: ModelRecord,
    base: Base | None,
    roles: Mapping[str, str] | None = None,
    multipliers: Mapping[str, str] | None = None,
) -> BaseRecord:
    """Reads the base of a target.

    Args:
        model: The target, from which a base given as overrides is rebuilt.
        target: Its record.
        base: See :func:`lightning_mue.plan`. None, or overrides of the run alone: the target is its own base.
        roles: As for the target; patterns that name nothing in the base are left out.
        multipliers: As for the target.
    """
    if base is None or (isinstance(base, Mapping) and set(base) <= set(RUN_KEYS)):
        shapes = replace(target, run=dict(base or {}))
        return BaseRecord(shapes, lambda: _describe_built(model, {}, roles, multipliers, measure=True))
    if isinstance(base, (str, Path)):
        saved = _with_roles(load_base(base), roles)
        return BaseRecord(saved, lambda: saved)
    shapes = _describe_built(model, base, roles, multipliers, measure=False)
    return BaseRecord(shapes, lambda: _describe_built(model, base, roles, multipliers, measure=True))


def _describe_built(
    model: nn.Module,
    base: Base,
    roles: Mapping[str, str] | None,
    multipliers: Mapping[str, str] | None,
    *,
    measure: bool,
) -> ModelRecord:
    """Makes the base, with real weights to be measured or on ``meta``, and describes it."""
    run = {key: base[key] for key in RUN_KEYS if key in base} if isinstance(base, Mapping) else {}
    made = build_base(model, base, device=None if measure else "meta")
    names = [clean_name(name) for name, _ in made.named_parameters(remove_duplicate=False)]
    # An MoE's patterns need not name anything where the base is dense.
    some_roles = {p: r for p, r in (roles or {}).items() if any(re.search(p, name) for name in names)}
    paths = float_attributes(made)
    some_multipliers = {k: p for k, p in (multipliers or {}).items() if any(re.search(p, path) for path in paths)}
    return replace(describe(made, some_roles, some_multipliers, measure=measure), run=run)


def _with_roles(record: ModelRecord, roles: Mapping[str, str] | None) -> ModelRecord:
    patterns = role_patterns(roles)
    named = [
        replace(info, role=next((role for pattern, role in patterns if pattern.search(info.name)), info.role))
        for info in record.parameters
    ]
    return replace(record, parameters=tuple(named))


def save_base(
    model: nn.Module,
    path: str | Path,
    *,
    base: Base | None = None,
    roles: Mapping[str, str] | None = None,
    multipliers: Mapping[str, str] | None = None,
) -> None:
    """Writes what plans need of a base to a YAML file, which can be used in its place: ``base="base.yaml"``.

    Args:
        model: The base itself, freshly initialized; or a target whose hyperparameters ``base`` overrides.
        path: The file.
        base: As for :func:`lightning_mue.plan`; None: ``model`` is the base.
        roles: Regular expression on names -> role, for modules that declare none.
        multipliers: Kind -> regular expression on dotted attribute paths.
    """
    if base is None:
        base = {} if any(p.is_meta for p in model.parameters()) else model
    if isinstance(base, (str, Path)):
        record = _with_roles(load_base(base), roles)
    else:
        record = _describe_built(model, base, roles, multipliers, measure=True)
    Path(path).write_text(yaml.safe_dump(record.to_dict(), sort_keys=False), encoding="utf-8")


def load_base(path: str | Path) -> ModelRecord:
    """Reads a file that :func:`save_base` wrote.

    Raises:
        ValueError: If there is no such file, or it is something else.
    """
    expected = f"a base of version {VERSION}"
    try:
        plain = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        found = f"the file {str(path)!r}, which cannot be read ({error})"
        raise value_error("base", found=found, expected=expected, do=_WRITE) from error
    if not isinstance(plain, dict) or plain.get("lightning_mue_base") != VERSION:
        found = f"the file {str(path)!r}, which is something else"
        raise value_error("base", found=found, expected=expected, do=_WRITE)
    try:
        return ModelRecord.from_dict(plain)
    except (KeyError, TypeError, ValueError) as error:
        found = f"the file {str(path)!r}, which is damaged ({error!r})"
        raise value_error("base", found=found, expected=expected, do=_WRITE) from error
