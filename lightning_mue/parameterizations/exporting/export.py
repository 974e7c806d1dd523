"""A plan as a Python file that another code base imports: its own configuration of groups, and a function for initial weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import nn
from torch.optim import Optimizer

from lightning_mue.checks import require_choice
from lightning_mue.parameterizations.applying.groups import scale_groups
from lightning_mue.parameterizations.exporting.settings import rounded, settings_of
from lightning_mue.parameterizations.exporting.targets import lines_for
from lightning_mue.parameterizations.planning.scaling_plan import ScalingPlan, headline
from lightning_mue.parameterizations.reading.parameters import named_tensors

#: Where a plan can go: the groups of any training loop, with the names of the module itself; or the names of a code base.
TARGETS = ("param-groups", "transformers", "torchtitan", "megatron")
#: Of a scaled group: not a setting of the optimizer.
_NOT_SETTINGS = {"params", "param_names", "role", "name", "kinds", "splits", "mue_scaled"}
#: Written even where they are the optimizer's own defaults.
_ALWAYS = ("lr", "weight_decay", "eps", "betas", "kind", "role")
_NOTHING = object()


def export_plan(
    model: nn.Module,
    plan: ScalingPlan,
    optimizers: Sequence[Optimizer],
    *,
    to: str,
    names: Mapping[str, str] | None = None,
) -> str:
    """The Python source of a file that trains a model of another code base as the plan would.

    Args:
        model: The module that the plan was made for; it may be on ``meta``.
        plan: The plan.
        optimizers: Its optimizers, with the settings that were tuned at the base (the plan is not in them yet).
        to: ``param-groups`` (any training loop; names of this module), ``transformers``, ``torchtitan`` or ``megatron``.
        names: Regular expression on names -> place of a weight, where its name is in no layout (see `settings_of`).

    Raises:
        ValueError: For an unknown target, or what the target cannot express.
    """
    require_choice("--to", to, TARGETS)
    groups = _groups(model, plan, optimizers)
    tables = _own_tables(plan, groups) if to == "param-groups" else _tables(plan, groups, to, names)
    # Numbers and names are written by repr, so nothing in them can become code.
    loader = PackageLoader("lightning_mue.parameterizations.exporting")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters["repr"] = repr
    template = to if to in ("torchtitan", "megatron") else "torch"
    return environment.get_template(f"{template}.py.j2").render(to=to, about=[headline(plan), *plan.notes], **tables)


def _groups(model: nn.Module, plan: ScalingPlan, optimizers: Iterable[Optimizer]) -> dict[str, dict[str, Any]]:
    """Name of a parameter -> its group, with the plan's factors in it."""
    tensors = {tensor: name for name, tensor in named_tensors(model).items()}
    found: dict[str, dict[str, Any]] = {}
    for optimizer in optimizers:
        usual = {key: option.default for key, option in signature(type(optimizer)).parameters.items()}
        for group in scale_groups(optimizer.param_groups, plan, tensors):
            kept = {key: value for key, value in group.items() if key in _ALWAYS or value != usual.get(key, _NOTHING)}
            found |= {tensors[parameter]: kept for parameter in group["params"]}
    return found


def _tables(
    plan: ScalingPlan, groups: Mapping[str, Mapping[str, Any]], to: str, names: Mapping[str, str] | None
) -> dict[str, Any]:
    """What a template shows: groups of lines that are trained alike, and initial weights."""
    lines = lines_for(settings_of(plan, groups, names), to)
    alike: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        s = line.setting
        options = {"lr": s.lr, "weight_decay": s.weight_decay, "eps": s.eps, "betas": s.betas}
        options = {key: value for key, value in options.items() if value is not None}
        table = alike.setdefault(tuple(options.items()), {"what": {}, "names": [], "options": options})
        table["what"][s.place] = None
        table["names"] += line.names
    inits: dict[tuple[str, float], list[str]] = {}
    for line in lines:
        inits.setdefault((line.setting.init.kind, line.setting.init.value), []).extend(line.names)
    return {"groups": list(alike.values()), "inits": inits, "multipliers": {}}


def _own_tables(plan: ScalingPlan, groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The same with the module's own names, for any update; multipliers stay where they are."""
    alike: dict[str, dict[str, Any]] = {}
    for name, group in groups.items():
        options = {key: value for key, value in group.items() if key not in _NOT_SETTINGS and _plain(value)}
        options = {key: rounded(value) if isinstance(value, float) else value for key, value in options.items()}
        table = alike.setdefault(repr(options), {"what": {}, "names": [], "options": options})
        table["what"][group["role"]] = None
        table["names"].append(name)
    for table in alike.values():
        table["names"] = _shortened(table["names"], groups)
    inits: dict[tuple[str, float], list[str]] = {}
    for entry in plan.parameters:
        if entry.trainable:
            inits.setdefault((entry.init.kind, float(f"{entry.init.value:.6g}")), []).append(entry.name)
    shortened = {init: _shortened(found, groups) for init, found in inits.items()}
    return {"groups": list(alike.values()), "inits": shortened, "multipliers": plan.multipliers}


def _plain(value: Any) -> bool:
    members = value if isinstance(value, tuple) else (value,)
    return all(member is None or isinstance(member, (bool, int, float, str)) for member in members)


def _shortened(names: Sequence[str], every: Iterable[str]) -> list[str]:
    """Names, ``*`` for numbers where all names that then match are wanted."""
    wanted: set[str] = set(names)
    shapes: dict[str, list[str]] = {}
    for name in every:
        shapes.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), []).append(name)
    found: list[str] = []
    for shape, members in shapes.items():
        found += [shape] if wanted.issuperset(members) else [name for name in members if name in wanted]
    return found
