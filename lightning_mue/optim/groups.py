"""Param groups: the kind of update of each parameter, from its role, else its name, else its shape; and reports of it."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_mue.checks import listed, type_error, value_error
from lightning_mue.contract import declared_role
from lightning_mue.names import all_indices, is_elementwise, is_embedding, is_head, is_vector
from lightning_mue.optim.options import check_adamw
from lightning_mue.optim.split import by_split, checked_split, describe_split
from lightning_mue.parameterizations.rules.kinds import KINDS, MUON_KINDS, default_kind
from lightning_mue.parameterizations.rules.roles import Role

logger = logging.getLogger(__name__)

#: What has been logged in this process: sets of (kind, name with its numbers removed).
_logged: set[frozenset[tuple[str, str]]] = set()


def classify(name: str | None, param: Tensor, *, sphere: bool = True) -> tuple[str, str]:
    """Decide the kind of update of one parameter; the first rule that applies counts.

    1. Vectors and scalars get `adamw`.
    2. The role in the tensor's `mue_role` attribute, where a layer set one.
    3. The name, which recognizes embeddings, output heads, norms and biases.
    4. The shape: everything else is a matrix.

    The unembedding gets `adam_sphere` and the embedding `adamw` (arXiv:2603.28743).

    Args:
        name: The parameter's dotted name, or None.
        param: The parameter; three dimensions mean a stack of matrices.
        sphere: False for Muon without the sphere: matrices get `muon`, the unembedding `adamw`.

    Returns:
        The kind, and what decided it: "shape", "role <role>" or "name".

    Raises:
        ValueError: If `mue_role` is not a role.
        TypeError: If the parameter is complex.
    """
    if param.is_complex():
        do = (
            "Hold it as a real tensor with a last dimension of 2 (torch.view_as_real), or give it to another optimizer."
        )
        found = f"the complex {param.dtype}"
        raise type_error(label(name, param), found=found, expected="a real dtype", do=do)
    kind, reason = _classify(name, param)
    return (kind if sphere else {"sphere": "muon", "adam_sphere": "adamw"}.get(kind, kind)), reason


def _classify(name: str | None, param: Tensor) -> tuple[str, str]:
    if param.ndim < 2 or not param.is_floating_point() or _has_one_side(param):
        return "adamw", "shape"
    if (given := declared_role(param)) is not None:
        role = _role(given, name, param)
        return default_kind(role, "sphere"), f"role {role}"
    # What shape cannot tell from a hidden matrix: tables, vectors of stacked experts, heads.
    if name and (is_vector(name) or is_elementwise(name) or is_embedding(name)):
        return "adamw", "name"
    return ("adam_sphere", "name") if name and is_head(name) else ("sphere", "shape")


def _role(given: object, name: str | None, param: Tensor) -> Role:
    try:
        return Role(given)
    except ValueError:
        expected = f"one of {', '.join(role.value for role in Role)}"
        raise value_error(f"mue_role of {label(name, param)}", found=repr(given), expected=expected) from None


def _has_one_side(param: Tensor) -> bool:
    """Whether a tensor with several dimensions is a vector or scalar (layer scale [C, 1, 1], class token [1, 1, d])."""
    return sum(size != 1 for size in param.shape) < 2 and (param.ndim > 2 or param.numel() == 1)


def label(name: str | None, param: Tensor, place: str = "(unnamed)") -> str:
    """Return what a message calls a parameter: its name, else its place, and its shape."""
    return f"parameter {repr(name) if name else place} of shape {list(param.shape)}"


def label_in(group: Mapping[str, Any], index: int) -> str:
    """Return what a message calls a parameter of an optimizer's group."""
    names, place = group.get("param_names"), f"number {index} of group '{group.get('name', group['kind'])}'"
    return label(names[index] if names else None, group["params"][index], place)


def named(group: Mapping[str, Any]) -> list[tuple[str | None, Tensor]]:
    """Return the `(name or None, parameter)` pairs of a group from `to_groups` or from an optimizer."""
    names = group.get("param_names") or [None] * len(group["params"])
    return [
        item if isinstance(item, tuple) else (name, item) for name, item in zip(names, group["params"], strict=True)
    ]


def to_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Convert parameters, (name, parameter) pairs or groups to a list of new group dicts, whose `params` are lists.

    Raises:
        TypeError: If the parameters are not an ordered collection of tensors or of (name, tensor) pairs, or are mixed
            with groups.
        ValueError: If a group has no `params`.
    """
    items = _as_list(params)
    groups = [item for item in items if isinstance(item, Mapping)]
    if groups and len(groups) != len(items):
        found, do = "group dicts mixed with parameters", "Put the loose parameters in a group."
        raise type_error("params", found=found, expected="either groups or parameters", do=do)
    result = []
    for group in groups or [{"params": items}]:
        if "params" not in group:
            found = f"only the keys {listed(sorted(group))}"
            raise value_error("param group", found=found, expected="the key 'params'")
        names, members = group.get("param_names"), group["params"]
        members = [members] if isinstance(members, Tensor) else _as_list(members)
        if names and len(names) != len(members):
            raise value_error(
                "param_names", found=f"{len(names)} names", expected=f"one for each of {len(members)} params"
            )
        result.append({**group, "params": members})
    for name, param in (pair for group in result for pair in named(group)):
        if not isinstance(param, Tensor) or not (name is None or isinstance(name, str)):
            expected = "tensors, (name, tensor) pairs or group dicts"
            raise type_error("params", found=f"({name!r}, {type(param)})", expected=expected)
    return result


def _as_list(params: Iterable[Any]) -> list[Any]:
    if isinstance(params, (Tensor, Mapping, set, frozenset)):
        expected = "an ordered iterable of parameters, pairs or groups"
        raise type_error("params", found=type(params), expected=expected, do="Pass a list.")
    return list(params)


def split_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a group without `kind` into groups with `kind` and `name`, in the order of `KINDS`; name one with a `kind`.

    Matrices that `split` "auto" cuts differently are in groups of their own.

    In kind `adamw`, `lr` is the first of these that is given: the group's `adamw_lr` (removed here), the group's `lr`, the
    `adamw_lr` and the `lr` of the optimizer's `defaults`. `weight_decay` alike.
    """
    special = ("adamw_lr", "adamw_weight_decay")
    options = {key: value for key, value in group.items() if key not in ("params", "param_names", *special)}
    check_adamw({key: group.get(key) for key in special})
    given, prefix = options.get("kind"), options.get("name")
    groups = []
    split = checked_split(options.pop("split", defaults["split"]))
    if group.get("split") is not None and given and given not in MUON_KINDS:
        expected, do = f"a group of kind {' or '.join(MUON_KINDS)}", "Leave `split` out here."
        raise value_error("split", found=f"{split!r} in a group of kind '{given}'", expected=expected, do=do)
    shapes = {name: param.shape for name, param in named(group) if name}
    for kind in [given] if given else KINDS:
        pairs = [pair for pair in named(group) if given or classify(*pair, sphere=defaults["sphere"])[0] == kind]
        if not pairs:
            continue
        new = {**options, "kind": kind, "name": f"{prefix}/{kind}" if prefix and not given else prefix or kind}
        if kind == "adamw":
            new |= _adamw_options(group, defaults)
        for each, members in by_split(pairs, split if kind in MUON_KINDS else None, shapes):
            params = [param if name is None else (name, param) for name, param in members]
            label_of_split = (
                f"{new['name']}/{describe_split(each)}" if split == "auto" and each is not None else new["name"]
            )
            groups.append({**new, "name": label_of_split, "split": each, "params": params})
    return groups


def _adamw_options(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return `lr` and `weight_decay` of kind `adamw` where they are not the group's own, or the defaults', of that name."""
    found = {}
    for key in ("lr", "weight_decay"):
        fallback = None if key in group else defaults[f"adamw_{key}"]
        found[key] = group.get(f"adamw_{key}", fallback)
    return {key: value for key, value in found.items() if value is not None}


def unique_name(name: str, taken: Iterable[str]) -> str:
    """Return `name`, with a number appended if it is taken, because learning-rate monitors refuse equal names."""
    taken = set(taken)
    numbered = (name if i == 1 else f"{name}-{i}" for i in range(1, len(taken) + 2))
    return next(candidate for candidate in numbered if candidate not in taken)


def announce(groups: Sequence[Mapping[str, Any]], *, sphere: bool, what: str = "has these groups") -> None:
    """Log, as INFO and on the first rank only, which parameter is in which group.

    The package shows its INFO records on stderr unless the program configures logging itself. To silence them:
    `logging.getLogger("lightning_mue").setLevel(logging.WARNING)`. A process that builds one model in many sizes (a
    sweep, a coordinate check) logs once: sizes, and numbers in names, do not count.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    content = frozenset(
        (group["kind"], re.sub(r"\d+", "*", name or "")) for group in groups for name, _ in named(group)
    )
    if content not in _logged:
        _logged.add(content)
        logger.info("HyperSphereOptimizer %s:\n%s", what, describe(groups, sphere=sphere))


def describe(groups: Iterable[Mapping[str, Any]], *, sphere: bool = True) -> str:
    """Return which parameter is in which group and what decided it; parameters of numbered blocks share a line."""
    lines = []
    for group in groups:
        pairs = named(group)
        size = sum(param.numel() for _, param in pairs)
        lr = float("nan") if getattr(group["lr"], "is_meta", False) else float(group["lr"])  # of a model without values
        lines.append(f"{group['name']}: {group['kind']}, lr {lr:g}, {len(pairs)} parameters, {size:,} values")
        rows: Counter[str] = Counter()
        for name, param in pairs:
            kind, reason = classify(name, param, sphere=sphere)
            reason = reason if kind == group["kind"] else "given"
            shown = all_indices(name) if name else "(unnamed)"
            stack = param.ndim == 3 and group["kind"] != "adamw"
            shape = f"{param.shape[0]} matrices {list(param.shape[1:])}" if stack else list(param.shape)
            cut = f", {describe_split(group['split'])}" if group.get("split") else ""
            rows[f"  {shown} {shape} by {reason}{cut}"] += 1
        lines += [row + (f" (x{count})" if count > 1 else "") for row, count in rows.items()]
    return "\n".join(lines)


def warn_of_guesses(groups: Iterable[Mapping[str, Any]], *, added: bool = False) -> None:
    """Warn of parameters that were classified by shape although shape cannot tell: nameless tables, convolutions.

    Of nameless tensors with three dimensions, stacks or convolutions, only in a group that is `added`: by a finetuning
    callback, which has modules of any kind and no names, where who builds an optimizer chooses what to pass.
    """
    pairs = [(*pair, "kind" in group) for group in groups for pair in named(group)]
    guesses = [
        (index, name, param)
        for index, (name, param, given) in enumerate(pairs)
        if not given and classify(name, param)[1] == "shape"
    ]
    nameless = [index for index, name, param in guesses if not name and param.ndim in ((2, 3) if added else (2,))]
    if nameless:
        do = "Pass model.named_parameters(), or groups with a `kind`."
        if added:
            do = (
                "Call optimizer.note_names(model) before they are added (in configure_optimizers), add (name, parameter) "
                "pairs, or give the group a `kind`."
            )
        warnings.warn(
            f"params: found {len(nameless)} of {len(pairs)} parameters (numbers {listed(nameless)}) with two "
            f"{'or three ' if added else ''}dimensions but no name and no role. They are taken for hidden matrices and put on "
            f"the sphere, where an embedding or an output head does not belong. {do}",
            stacklevel=3,
        )
    convolutions = [name for _, name, param in guesses if name and param.ndim == 3 and "conv" in name.lower()]
    if convolutions:
        warnings.warn(
            f"params: found {listed(convolutions)} with three dimensions, which are taken for a stack of `out` matrices "
            "[in, k], although the names say convolution (over one dimension, [out, in, k]). Put them in a group of kind "
            "'adamw', or make them Conv2d with a side of 1.",
            stacklevel=3,
        )
