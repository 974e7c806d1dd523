"""Groups that are added to a built optimizer: one entry of `param_groups`, whatever is in it; names for those without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_mue.checks import require_choice, value_error
from lightning_mue.optim.groups import named, split_group
from lightning_mue.optim.options import OWN, check_keys, checked
from lightning_mue.optim.state import check_new_group
from lightning_mue.parameterizations.rules.kinds import KINDS, MIXED, parts_of


def with_names(group: Mapping[str, Any], names: Mapping[Tensor, str]) -> dict[str, Any]:
    """Return a group from `to_groups` in which parameters that it does not name have their names in `names`."""
    pairs = [(name or names.get(param), param) for name, param in named(group)]
    params = [param if name is None else (name, param) for name, param in pairs]
    return {**{key: value for key, value in group.items() if key != "param_names"}, "params": params}


def new_groups(
    group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any], *, built: bool
) -> list[dict[str, Any]]:
    """Check a group from `to_groups`, and return what it becomes in an optimizer with these groups and defaults.

    That is one group where the optimizer is built (see `joined`), and before, where its constructor adds it, one for each kind.

    Raises:
        ValueError: If an option, a kind or a parameter is refused.
        TypeError: If an option has the wrong type, or a parameter is complex.
    """
    check_keys(group, defaults)
    if group.get("kind", MIXED) != MIXED:
        require_choice("kind", group["kind"], KINDS)
    given, start = parts_of(group), sum(len(other["params"]) for other in groups)
    for part in given:
        check_new_group(part, groups, start=start, sphere=defaults["sphere"])
    options = {key: value for key, value in defaults.items() if key not in OWN}
    pieces = [piece for part in given for piece in split_group(part, defaults)]
    if built and not pieces:
        pieces = [{**group, "kind": group.get("kind", "adamw")}]
    parts = [checked({**options, **piece}) for piece in pieces]
    return [joined(group, parts)] if built else parts


def joined(group: Mapping[str, Any], parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the parts of a group that is added, each of one kind and split, to one group with its parameters in their order.

    Whoever added it and then writes the `lr` of one group, as finetuning callbacks and schedulers do, reaches all of it.

    Raises:
        ValueError: If its `lr` is 0 and the `adamw_lr` of some parameters is not, of which the one `lr` cannot be a multiple.
    """
    first, last = parts[0], parts[-1]
    name = group.get("name")
    if len(parts) == 1:
        return {**first, "name": name or first["kind"], "params": list(group["params"]), "added": True}
    of = {param: part for part in parts for _, param in named(part)}
    kinds = [of[param]["kind"] for _, param in named(group)]
    kind = first["kind"] if len(set(kinds)) == 1 else MIXED
    result = {
        **first,
        "kind": kind,
        "name": name or kind,
        "params": list(group["params"]),
        "added": True,
        "split": None,
    }
    result["splits"] = [of[param]["split"] for _, param in named(group)]
    if kind == MIXED:
        result["kinds"] = kinds
    if last["lr"] is not first["lr"] and last["lr"] != first["lr"]:
        if first["lr"] == 0:
            do = "Give the group an `lr` other than 0, or add its `adamw` parameters as a group with a `kind` and an `lr`."
            raise value_error("lr", found=f"0 beside adamw_lr={last['lr']:g} in one group", expected="above 0", do=do)
        result["adamw_lr_factor"] = float(last["lr"]) / float(first["lr"])
    if last["weight_decay"] != first["weight_decay"]:
        result["adamw_weight_decay"] = last["weight_decay"]
    return result


def match_names(group: dict[str, Any], groups: Iterable[dict[str, Any]]) -> None:
    """Give all groups names if one has them, because torch refuses a mixture; "" stands for no name."""
    pairs, groups = named(group), list(groups)
    if any(name is not None for name, _ in pairs):
        for other in groups:
            other.setdefault("param_names", [""] * len(other["params"]))
    if any("param_names" in other for other in groups):
        group["params"] = [(name or "", param) for name, param in pairs]
        if not pairs:
            group["param_names"] = []
