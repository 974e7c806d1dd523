"""Reports which parameter is in which group: as text, once in the log, and as warnings about guesses."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from lightning_mue.checks import listed
from lightning_mue.names import all_indices
from lightning_mue.optim.groups import classify, named

logger = logging.getLogger(__name__)

#: What has been logged in this process: sets of (kind, name with its numbers removed).
_logged: set[frozenset[tuple[str, str]]] = set()


def announce(groups: Sequence[Mapping[str, Any]], *, sphere: bool) -> None:
    """Log, as INFO and on the first rank only, which parameter is in which group.

    The package shows its INFO records on stderr unless the program configures logging itself. To silence them:
    `logging.getLogger("lightning_mue").setLevel(logging.WARNING)`. A process that builds one model in many sizes (a
    sweep, a coordinate check) logs once: sizes, and numbers in names, do not count.

    Args:
        groups: The optimizer's groups.
        sphere: See `classify`.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    content = frozenset(
        (group["kind"], re.sub(r"\d+", "*", name or "")) for group in groups for name, _ in named(group)
    )
    if content not in _logged:
        _logged.add(content)
        logger.info("HyperSphereOptimizer has these groups:\n%s", describe(groups, sphere=sphere))


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
            rows[f"  {shown} {shape} by {reason}"] += 1
        lines += [row + (f" (x{count})" if count > 1 else "") for row, count in rows.items()]
    return "\n".join(lines)


def warn_of_guesses(groups: Iterable[Mapping[str, Any]]) -> None:
    """Warn of parameters that were classified by shape although shape cannot tell: nameless tables, convolutions."""
    pairs = [(*pair, "kind" in group) for group in groups for pair in named(group)]
    guesses = [
        (index, name, param)
        for index, (name, param, given) in enumerate(pairs)
        if not given and classify(name, param)[1] == "shape"
    ]
    nameless = [index for index, name, param in guesses if not name and param.ndim == 2]
    if nameless:
        warnings.warn(
            f"params: found {len(nameless)} of {len(pairs)} parameters (numbers {listed(nameless)}) with two dimensions but "
            "no name and no role. They are taken for hidden matrices and put on the sphere, where an embedding or an output "
            "head does not belong. Pass model.named_parameters(), or groups with a `kind`.",
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
