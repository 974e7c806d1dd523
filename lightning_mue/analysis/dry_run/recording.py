"""Records the collectives that code starts: which, how often, and how many bytes a rank sends."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Traffic(NamedTuple):
    """Collectives of one kind and purpose, of one rank in one optimizer step.

    Attributes:
        what: Their purpose.
        collective: Their kind, e.g. ``all-gather``.
        number: How many.
        sent: Bytes that the rank sends to others, see `sent_bytes`.
    """

    what: str
    collective: str
    number: int
    sent: int


#: Part of an operator's name -> the collective.
_KINDS = {
    "reduce_scatter": "reduce-scatter",
    "allgather": "all-gather",
    "all_gather": "all-gather",
    "allreduce": "all-reduce",
    "all_reduce": "all-reduce",
    "alltoall": "all-to-all",
    "all_to_all": "all-to-all",
    "broadcast": "broadcast",
}


def sent_bytes(collective: str, ranks: int, handed: int) -> int:
    """Bytes that a rank sends in a ring among `ranks`, if it hands so many bytes to the collective.

    An all-gather passes on the parts of all ranks but one; a reduce-scatter, and an all-to-all with equal parts, send all
    but the rank's own part; an all-reduce is a reduce-scatter and an all-gather.
    """
    if collective == "all-gather":
        return handed * (ranks - 1)
    return handed * (ranks - 1) * (2 if collective == "all-reduce" else 1) // ranks


class Collectives(TorchDispatchMode):
    """Records the collectives inside the context, those among several ranks only."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])

    def rows(self, what: str) -> list[Traffic]:
        """What was recorded, a row for each kind of collective."""
        return [Traffic(what, kind, count, sent) for kind, (count, sent) in sorted(self._counts.items())]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes a collective, and runs the operator."""
        if any(hasattr(each, "from_local") for each in types):  # a DTensor: it turns into its parts, and comes again
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note(str(func).split(".")[1], args)
        return func(*args, **(kwargs or {}))

    def _note(self, operator: str, args: Any) -> None:
        kind = next((kind for part, kind in _KINDS.items() if part in operator), None)
        ranks = next((size for size in map(_group_size, tree_leaves(args)) if size), 1)
        if kind is None or ranks == 1:
            return
        handed = _handed(operator, args)
        self._counts[kind][0] += 1
        self._counts[kind][1] += sent_bytes(kind, ranks, handed)


def _handed(operator: str, args: Any) -> int:
    """Bytes of the tensors that a rank hands over. Those of c10d that have an output list it first."""
    has_output = operator.startswith(
        ("_allgather_base", "allgather_", "_reduce_scatter_base", "reduce_scatter_", "alltoall")
    )
    given = args[1] if has_output else args[0]
    return sum(tensor.nbytes for tensor in tree_leaves(given) if isinstance(tensor, Tensor))


def _group_size(argument: Any) -> int:
    """How many ranks the process group has that an operator got, as an object or by its name; 0 for other arguments."""
    if isinstance(argument, torch.ScriptObject):
        try:
            return dist.ProcessGroup.unbox(argument).size()
        except RuntimeError:  # a reduce operation
            return 0
    if isinstance(argument, str) and argument not in ("sum", "avg", "max", "min", "product"):
        return dist.distributed_c10d._resolve_process_group(argument).size()  # type: ignore[attr-defined,arg-type]
    return 0
