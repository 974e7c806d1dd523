"""The report of a dry run: tables, and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from lightning_mue.analysis.dry_run.balance import Work
from lightning_mue.analysis.dry_run.memory import Bytes
from lightning_mue.analysis.dry_run.recording import Traffic
from lightning_mue.console import human

#: Placement of a parameter that is not sharded.
EVERYWHERE = "on every rank"
_SHARE = "more ranks, or precision bf16-true"
_REMEDIES = {
    "weights": _SHARE,
    "gradients": _SHARE,
    "optimizer state": f"{_SHARE}, or an optimizer with less state (HyperSphereOptimizer with state_dtype bfloat16)",
    "buffers": "smaller buffers",
    "FSDP in flight": "a larger tensor-parallel size, if the model has experts, or fully_shard on smaller modules",
    "DDP buckets": "gradient_as_bucket_view of DDPStrategy, or ModelParallelStrategy",
    "residual stream": "fewer sequences in a micro-batch, or activation checkpointing",
    "logits": "fewer sequences in a micro-batch",
}
_UNSHARDED = "ModelParallelStrategy and a configure_model that shards: every rank holds all of it"


class Placed(NamedTuple):
    """Parameters of one role and one shape: where they are."""

    role: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    placements: str
    dtype: str
    number: int


@dataclass(frozen=True)
class DryRun:
    """What a training would need and send.

    Attributes:
        data_parallel: Ranks that have batches of their own.
        tensor_parallel: Ranks that share a batch, and the experts.
        parameters: Numbers in the whole model.
        memory: For each rank kind -> bytes.
        traffic: Collectives of rank 0 in one optimizer step.
        placed: The sharded plan, by role and shape; local shapes are rank 0's.
        work: Of the optimizer, by rank.
        notes: What was assumed, and what is not counted.
    """

    data_parallel: int
    tensor_parallel: int
    parameters: int
    memory: list[Bytes]
    traffic: list[Traffic]
    placed: list[Placed]
    work: list[Work]
    notes: list[str]

    @property
    def largest(self) -> int:
        """The rank that needs most memory; of equal ones the first."""
        totals = [sum(held.values()) for held in self.memory]
        return totals.index(max(totals))

    def fits(self, gib: float) -> bool:
        """Whether every rank's memory is enough, as far as it is counted."""
        return sum(self.memory[self.largest].values()) <= gib * 2**30

    def verdict(self, gib: float) -> str:
        """One sentence for a memory of so many GiB: what fits, or which kind is largest and what makes it smaller."""
        held = self.memory[self.largest]
        total = f"rank {self.largest} needs {_size(sum(held.values()))} of {gib:g} GiB"
        if self.fits(gib):
            return f"fits: {total}, as far as it is counted"
        kind = max(held, key=lambda name: held[name])
        whole = all(each.placements == EVERYWHERE for each in self.placed)
        remedy = _UNSHARDED if whole and kind in ("weights", "gradients", "optimizer state") else _REMEDIES[kind]
        return f"does not fit: {total}. Largest: {kind}, {_size(held[kind])}. To make it smaller: {remedy}."

    def to_json(self) -> dict[str, Any]:
        """All figures, for ``json.dumps``: bytes, numbers and FLOPs."""
        return {
            "data_parallel": self.data_parallel,
            "tensor_parallel": self.tensor_parallel,
            "parameters": self.parameters,
            "memory_by_rank": self.memory,
            "traffic_per_step": [row._asdict() for row in self.traffic],
            "plan": [row._asdict() for row in self.placed],
            "work": [{**row._asdict(), "imbalance": row.imbalance} for row in self.work],
            "notes": self.notes,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Four tables and the notes."""
        ranks = self.data_parallel * self.tensor_parallel
        mesh = f"data_parallel {self.data_parallel} x tensor_parallel {self.tensor_parallel}"
        yield Text(f"{human(self.parameters)} parameters on {ranks} ranks, {mesh}")
        yield from (self._memory_table(), self._traffic_table(), self._plan_table(), self._work_table())
        yield from (Text(f"note: {note}") for note in self.notes)

    def _memory_table(self) -> Table:
        totals = [sum(held.values()) for held in self.memory]
        least, most = totals.index(min(totals)), self.largest
        shown = {f"rank {least} (least)": least, f"rank {most} (most)": most} if least != most else {"every rank": most}
        rows = [[kind, *(_size(self.memory[rank][kind]) for rank in shown.values())] for kind in self.memory[most]]
        rows.append(["sum", *(_size(totals[rank]) for rank in shown.values())])
        return _table("memory of a rank", ("kind", *shown), rows)

    def _traffic_table(self) -> Table:
        rows = [[row.what, row.collective, f"{row.number:,}", _size(row.sent)] for row in self.traffic]
        total = [
            "sum",
            "",
            f"{sum(row.number for row in self.traffic):,}",
            _size(sum(row.sent for row in self.traffic)),
        ]
        return _table(
            "collectives of rank 0 in an optimizer step", ("what", "collective", "count", "sent"), [*rows, total]
        )

    def _plan_table(self) -> Table:
        rows = [
            [r.role, str(list(r.shape)), str(list(r.local_shape)), r.placements, r.dtype, str(r.number)]
            for r in self.placed
        ]
        return _table("sharded plan", ("role", "whole", "on rank 0", "placements", "dtype", "count"), rows)

    def _work_table(self) -> Table:
        rows = [[w.what, w.unit, human(w.mean), human(max(w.by_rank)), f"{w.imbalance:.3f}"] for w in self.work]
        return _table(
            "optimizer's work in a step", ("what", "unit", "mean of ranks", "largest", "largest / mean"), rows
        )


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(*head, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


def _size(count: float) -> str:
    """Bytes in three digits, in the largest unit of 1024 that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} TiB" if count < 1000 else f"{count:,.0f} TiB"
