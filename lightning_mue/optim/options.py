"""The options of a param group: what they may be, and what to say when they are not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_mue.optim.newton_schulz import get_preset

#: The updates, in the order in which a group is split. `sphere`: Muon on the Frobenius sphere. `adam_sphere`: Adam's
#: direction on the same sphere. `adamw`: AdamW.
KINDS = ("sphere", "adam_sphere", "adamw")

#: Types of the Newton-Schulz products, under the names that a YAML file or a state dict can hold.
COMPUTE_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


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
    for key in ("lr", "eps", "weight_decay"):
        check_number(key, group[key])
    check_number("momentum", group["momentum"], below=1)
    if not isinstance(group["nesterov"], bool):
        raise TypeError(f"nesterov must be true or false; found {group['nesterov']!r}.")
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers in [0, 1); found {betas!r}.")
    for beta in betas:
        check_number("betas", beta, below=1)
    group["betas"] = tuple(betas)
    get_preset(group["preset"])
    if group["compute_dtype"] is not None:
        group["compute_dtype"] = str(group["compute_dtype"]).removeprefix("torch.")
        if group["compute_dtype"] not in COMPUTE_DTYPES:
            known = ", ".join(COMPUTE_DTYPES)
            raise ValueError(f"compute_dtype must be None or one of {known}; found {group['compute_dtype']!r}.")
    if "kind" in group:
        check_kind(group)
    return group
