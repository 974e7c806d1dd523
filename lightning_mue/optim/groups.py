"""Which update a parameter gets, decided from its role, else its name, else its shape."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mue.contract import declared_role
from lightning_mue.names import all_indices, is_elementwise, is_embedding, is_head, is_vector
from lightning_mue.parameterizations.rules.kinds import KINDS
from lightning_mue.parameterizations.rules.roles import MATRIX_ROLES, Role

_FOREIGN_OPTIONS = {"amsgrad", "fused", "ns_steps", "dampening"}  # of torch's optimizers, not of this one
_STATE = {"momentum", "radius", "exp_avg", "exp_avg_sq", "step"}


def classify(name: str | None, param: Tensor, *, sphere: bool = True) -> tuple[str, str]:
    """Decide the update of one parameter.

    The order is: vectors and scalars get `adamw`; then the role in the tensor's `mue_role` attribute, where a layer
    set one; then the name, which recognizes embeddings, output heads, norms and biases; then the shape, which makes
    everything else a matrix. The unembedding gets `adam_sphere` and the embedding `adamw` (arXiv:2603.28743).

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
        raise TypeError(
            f"{label(name, param)} is complex, and this optimizer is for real parameters. Hold it as a real tensor "
            "with a last dimension of 2 (torch.view_as_real), or give it to another optimizer."
        )
    kind, reason = _classify(name, param)
    return (kind if sphere else {"sphere": "muon", "adam_sphere": "adamw"}.get(kind, kind)), reason


def _classify(name: str | None, param: Tensor) -> tuple[str, str]:
    if param.ndim < 2 or not param.is_floating_point() or _has_one_side(param):
        return "adamw", "shape"
    if (given := declared_role(param)) is not None:
        role = _role(given, name, param)
        if role is Role.UNEMBEDDING:
            return "adam_sphere", f"role {role}"
        return ("sphere" if role in MATRIX_ROLES else "adamw"), f"role {role}"
    kind = _kind_by_name(name) if name else None
    return (kind, "name") if kind else ("sphere", "shape")


def _role(given: object, name: str | None, param: Tensor) -> Role:
    try:
        return Role(given)
    except ValueError:
        roles = ", ".join(role.value for role in Role)
        raise ValueError(f"mue_role of {label(name, param)} must be one of {roles}; found {given!r}.") from None


def _has_one_side(param: Tensor) -> bool:
    """Whether a tensor of more dimensions holds a vector or a number (a layer scale [C, 1, 1], a class token [1, 1, d])."""
    return sum(size != 1 for size in param.shape) < 2 and (param.ndim > 2 or param.numel() == 1)


def _kind_by_name(name: str) -> str | None:
    """Recognize what shape cannot tell: a head or a look-up table from a hidden matrix."""
    if is_vector(name) or is_elementwise(name) or is_embedding(name):
        return "adamw"
    return "adam_sphere" if is_head(name) else None


def label(name: str | None, param: Tensor, place: str = "(unnamed)") -> str:
    """Say in a message which parameter is meant: by name, else by its place, and by shape."""
    return f"parameter {repr(name) if name else place} of shape {list(param.shape)}"


def named(group: Mapping[str, Any]) -> list[tuple[str | None, Tensor]]:
    """Return the `(name or None, parameter)` pairs of a group from `to_groups` or from an optimizer."""
    names = group.get("param_names") or [None] * len(group["params"])
    return [
        item if isinstance(item, tuple) else (name, item) for name, item in zip(names, group["params"], strict=True)
    ]


def to_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Bring parameters, (name, parameter) pairs or groups to a list of new group dicts, whose `params` are lists.

    Raises:
        TypeError: If the parameters are not an ordered collection of tensors or of (name, tensor) pairs, or are mixed
            with groups.
        ValueError: If a group has no `params`.
    """
    items = _listed(params)
    groups = [item for item in items if isinstance(item, Mapping)]
    if groups and len(groups) != len(items):
        raise TypeError("params mixes group dicts with parameters; put the loose parameters in a group of their own.")
    if not groups:
        groups = [{"params": items}]
    for group in groups:
        if "params" not in group:
            raise ValueError(f"A param group needs the key params; found only {sorted(group)}.")
    one = [[group["params"]] if isinstance(group["params"], Tensor) else group["params"] for group in groups]
    copies = [{**group, "params": _listed(members)} for group, members in zip(groups, one, strict=True)]
    for name, param in (pair for group in copies for pair in named(group)):
        if not isinstance(param, Tensor) or not (name is None or isinstance(name, str)):
            raise TypeError(
                f"params must hold tensors, (name, tensor) pairs or group dicts; found ({name!r}, {type(param)})."
            )
    return copies


def _listed(params: Iterable[Any]) -> list[Any]:
    if isinstance(params, (Tensor, Mapping, set, frozenset)):
        raise TypeError(
            f"params must be an ordered iterable of parameters, pairs or groups; found {type(params)}. Pass a list."
        )
    return list(params)


def split_group(group: Mapping[str, Any], adamw_lr: float | None, *, sphere: bool = True) -> list[dict[str, Any]]:
    """Split a group without `kind` into one group a kind; a group with a `kind` comes back alone.

    Args:
        group: A param group. Its own `adamw_lr`, where present, comes before the argument, and is consumed.
        adamw_lr: Learning rate of `adamw` groups that do not bring their own; None leaves it to the group's `lr`.
        sphere: See `classify`.

    Returns:
        New groups, in the order of `KINDS`, each with `kind` and `name`; empty ones are left out.
    """
    options = {key: value for key, value in group.items() if key not in ("params", "param_names", "adamw_lr")}
    adamw_lr = group.get("adamw_lr", adamw_lr)
    pairs = named(group)
    if "kind" in options:
        members = {options["kind"]: pairs}
        overrides = {} if adamw_lr is None or "lr" in options else {"lr": adamw_lr}
    else:
        members = {kind: [pair for pair in pairs if classify(*pair, sphere=sphere)[0] == kind] for kind in KINDS}
        overrides = {} if adamw_lr is None else {"lr": adamw_lr}
    groups = []
    for kind, chosen in members.items():
        if not chosen:
            continue
        name = options.get("name")
        if "kind" not in options:
            name = f"{name}/{kind}" if name else kind
        extra = overrides if kind == "adamw" else {}
        plain = [param if key is None else (key, param) for key, param in chosen]
        groups.append({**options, **extra, "params": plain, "kind": kind, "name": name or kind})
    return groups


def unique_name(name: str, taken: Iterable[str]) -> str:
    """Return `name`, with a number appended if it is taken; learning-rate monitors refuse two of a name."""
    taken = set(taken)
    numbered = (name if i == 1 else f"{name}-{i}" for i in range(1, len(taken) + 2))
    return next(candidate for candidate in numbered if candidate not in taken)


def describe(groups: Iterable[Mapping[str, Any]], *, sphere: bool = True) -> str:
    """Say in a few lines which parameter is in which group, and why; numbered blocks share a line."""
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
            rows[f"  {shown} {shape} by {reason}"] += 1
        lines += [row + (f" (x{count})" if count > 1 else "") for row, count in rows.items()]
    return "\n".join(lines)


def warn_of_guesses(groups: Iterable[Mapping[str, Any]]) -> None:
    """Warn once of nameless two-dimensional parameters without a role: shape does not tell a matrix from a table."""
    pairs = [(*pair, "kind" in group) for group in groups for pair in named(group)]
    guessed = [
        index
        for index, (name, param, decided) in enumerate(pairs)
        if not decided and not name and param.ndim == 2 and classify(name, param)[1] == "shape"
    ]
    if guessed:
        warnings.warn(
            f"{len(guessed)} of {len(pairs)} parameters (numbers {', '.join(map(str, guessed))}) have two dimensions, "
            "no name and no role, so they are taken for hidden matrices and put on the sphere, where an embedding or "
            "an output head does not belong. Pass model.named_parameters(), or groups with a `kind`.",
            stacklevel=3,
        )
    convolutions = [
        name
        for name, param, decided in pairs
        if not decided and name and param.ndim == 3 and "conv" in name.lower() and classify(name, param)[1] == "shape"
    ]
    if convolutions:
        warnings.warn(
            f"{', '.join(convolutions)}: three dimensions are a stack of matrices, but the names say convolution (over one "
            "dimension), whose weight [out, in, k] would be taken for `out` matrices [in, k]. Put them in a group of kind "
            "'adamw', or make them Conv2d with a side of 1.",
            stacklevel=3,
        )


def check_loadable(
    groups: Sequence[Mapping[str, Any]],
    states: Iterable[Mapping[str, Any]],
    pairs: Iterable[tuple[str | None, Tensor]],
) -> None:
    """Check that saved groups are this optimizer's and that the saved state fits the parameters, in order.

    Raises:
        ValueError: If they do not.
    """
    states = list(states)
    foreign_state = set().union(*states) - _STATE
    for index, group in enumerate(groups):
        # torch.distributed.checkpoint's full state dicts merge what was saved into this optimizer's own groups.
        foreign = sorted((_FOREIGN_OPTIONS & set(group)) | foreign_state)
        if group.get("kind") not in KINDS or foreign:
            found = f"has {', '.join(foreign)}" if foreign else f"has no kind among {', '.join(KINDS)}"
            raise ValueError(
                f"state_dict is not a HyperSphereOptimizer's: its param group {index} {found}, as torch.optim.AdamW or "
                "Muon would save. Their state holds no radii; load the model's weights only and start this optimizer "
                "afresh."
            )
    pairs = list(pairs)
    saved = [name for group in groups for name in group.get("param_names") or [None] * len(group["params"])]
    for before, (name, _) in zip(saved, pairs, strict=False):  # torch compares how many there are
        if before and name and before != name:
            raise ValueError(
                f"state_dict holds the state of {before!r} where this optimizer has {name!r}: parameters are matched by "
                "their order. Build the optimizer from the same parameters in the same order and groups."
            )
    for state, (name, param) in zip(states, pairs, strict=False):
        radius = param.shape[:1] if param.ndim == 3 else torch.Size([])
        for key, shape in (("momentum", param.shape), ("exp_avg", param.shape), ("radius", radius)):
            if key in state and state[key].shape != shape:
                raise ValueError(
                    f"state_dict holds {key} of shape {list(state[key].shape)} for {label(name, param)}: it was saved "
                    "from another model, or from parameters grouped in another order."
                )
