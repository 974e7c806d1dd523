"""Says once which parameter went where."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

from lightning_mue.optim.groups import describe, named

logger = logging.getLogger(__name__)

#: What has been said in this process: the kinds of all names, without numbers.
_told: set[frozenset[tuple[str, str]]] = set()


def announce(groups: Sequence[Mapping[str, Any]], *, sphere: bool) -> None:
    """Log, as INFO and on the first rank only, which parameter is in which group.

    The package shows its INFO records on stderr unless the program configures logging itself; to be spared them,
    `logging.getLogger("lightning_mue").setLevel(logging.WARNING)`. A process that makes a model in many sizes (a sweep, a
    coordinate check) is told once: sizes, and numbers in names, do not count.

    Args:
        groups: The optimizer's groups.
        sphere: See `classify`.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    content = frozenset(
        (group["kind"], re.sub(r"\d+", "*", name or "")) for group in groups for name, _ in named(group)
    )
    if content not in _told:
        _told.add(content)
        logger.info("HyperSphereOptimizer has these groups:\n%s", describe(groups, sphere=sphere))
