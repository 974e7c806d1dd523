"""The options of a param group: what they may be, and what to say when they are not."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mue.optim.coefficients import get_preset
from lightning_mue.parameterizations.rules.kinds import CONVENTIONS, KINDS

#: Types of the Newton-Schulz products, under the names that a YAML file or a state dict can hold.
COMPUTE_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
}

#: Types of the momentum.
STATE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}

#: Ways back onto the sphere. `project`: along the radius, as the paper does. `geodesic`: the step is a rotation by
#: exactly `lr` radians.
RETRACTIONS = ("project", "geodesic")


def check_kind(group: Mapping[str, Any]) -> str:
    """Return the group's kind.

    Raises:
        ValueError: If it is missing or unknown.
    """
    if (kind := group.get("kind")) not in KINDS:
        raise ValueError(f"kind of a param group must be one of {', '.join(KINDS)}; found {kind!r}.")
    return kind


def check_number(key: str, value: object, below: float = math.inf) -> None:
    """Check that an option is a number in [0, below).

    Raises:
        ValueError: If it is out of range or NaN.
        TypeError: If it is not a Python number.
    """
    expected = "a finite number >= 0" if below == math.inf else f"a number in [0, {below:g})"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{key} must be {expected}; found {value!r} of {type(value).__name__}. Pass a Python float.")
    if not 0 <= value < below:
        raise ValueError(f"{key} must be {expected}; found {value}.")


def checked(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group with its options checked, and turned into the plain types that a state dict should hold.

    Raises:
        ValueError: If an option is out of range or unknown.
        TypeError: If an option has the wrong type.
    """
    group = dict(group)
    if not (isinstance(group["lr"], Tensor) and group["capturable"]):
        check_number("lr", group["lr"])
    elif group["lr"].numel() != 1 or group["lr"].ndim > 1:
        raise ValueError(f"lr must be a number or a tensor of one; found shape {list(group['lr'].shape)}.")
    for key in ("eps", "weight_decay"):
        check_number(key, group[key])
    check_number("momentum", group["momentum"], below=1)
    for key in ("nesterov", "maximize", "capturable", "compile"):
        if not isinstance(group[key], bool):
            raise TypeError(f"{key} must be true or false; found {group[key]!r}.")
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1); found {betas!r}.")
    for beta in betas:
        check_number("betas", beta, below=1)
    group["betas"] = tuple(betas)
    for key in ("compute_dtype", "state_dtype"):
        if group[key] is not None:
            group[key] = str(group[key]).removeprefix("torch.")
    check_choices(group)
    if group["radius"] is not None:
        check_number("radius", group["radius"])
        if group["radius"] == 0:
            raise ValueError("radius must be None or a number > 0; found 0, a sphere without directions.")
    if "kind" in group:
        check_kind(group)
    return group


def check_choices(group: Mapping[str, Any]) -> None:
    """Check the options that are names.

    Raises:
        ValueError: If one is unknown.
    """
    get_preset(group["preset"])
    _check_choice("compute_dtype", group["compute_dtype"], [None, *COMPUTE_DTYPES])
    _check_choice("state_dtype", group["state_dtype"], [None, *STATE_DTYPES])
    _check_choice("retraction", group["retraction"], RETRACTIONS)
    _check_choice("lr_convention", group["lr_convention"], CONVENTIONS)


def _check_choice(key: str, value: object, known: Collection[Any]) -> None:
    if value not in known:
        raise ValueError(f"{key} must be one of {', '.join(map(str, known))}; found {value!r}.")
