"""Which parameters of groups that were added were trainable when a checkpoint was saved: kept in it, and restored.

A finetuning callback freezes layers when it sets up, and thaws them in a later epoch. A run that is resumed after that epoch
freezes them again, and nobody thaws them: Lightning's BaseFinetuning restores the param groups, but not `requires_grad`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lightning_mue.checks import listed, mismatch
from lightning_mue.optim.groups import label, named

_TRAINABLE = "trainable"


def note_trainable(saved: Iterable[dict[str, Any]], groups: Iterable[Mapping[str, Any]]) -> None:
    """Note in saved groups that were added which of their parameters were trainable."""
    for packed, group in zip(saved, groups, strict=True):
        if group.get("added"):
            packed[_TRAINABLE] = [param.requires_grad for param in group["params"]]


def thaw(groups: Iterable[dict[str, Any]], states: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Make frozen parameters trainable that were so when the loaded groups were saved; warn of it."""
    thawed, lost = [], []
    for group in groups:
        pairs = named(group)
        for (name, param), trainable in zip(pairs, group.pop(_TRAINABLE, [False] * len(pairs)), strict=True):
            if trainable and not param.requires_grad:
                param.requires_grad_(True)
                thawed.append(label(name, param))
                lost += [] if states.get(param) else [label(name, param)]
    if thawed:
        do = "They are made trainable, as finetuning callbacks thaw layers only once. Freeze them after loading if that is meant."
        if lost:
            do += f" Of {listed(lost, limit=3)} no state was loaded: it starts anew."
        found = f"{len(thawed)} frozen parameters of a param group that was added later ({listed(thawed, limit=3)})"
        warnings.warn(
            mismatch("requires_grad", found=found, expected="them trainable, as when saved", do=do), stacklevel=3
        )
