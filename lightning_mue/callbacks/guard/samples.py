"""Which samples a run saw since its last good state, so that a rollback can name those that went before the fault."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

#: Keys under which batches hold the ids of their samples.
ID_KEYS = ("sample_id", "sample_ids", "id", "ids", "uid", "uids", "index", "indices", "idx", "__key__")


class Seen(NamedTuple):
    """One batch of this rank: at which optimizer step, its place in the run, and what names its samples."""

    step: int
    epoch: int
    batch: int
    total_batch: int
    ids: Any


class Samples:
    """The batches since the older of the kept states.

    Args:
        sample_ids: Key of the batch, or a function of it, that gives the ids; None looks for one of `ID_KEYS`.
    """

    def __init__(self, sample_ids: str | Callable[[Any], Any] | None) -> None:
        self.sample_ids = sample_ids
        self._seen: deque[Seen] = deque()

    def add(self, trainer: Trainer, step: int, batch: Any, batch_idx: int) -> None:
        """Notes a batch; ids on a device stay there until they are written."""
        total = trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        self._seen.append(Seen(step, trainer.current_epoch, batch_idx, total, self._ids(trainer, batch, total)))

    def forget_before(self, step: int) -> None:
        """Drops the batches of earlier steps."""
        while self._seen and self._seen[0].step < step:
            self._seen.popleft()

    def write(
        self, path: Path, trainer: Trainer, *, since: int, until: int | None = None, what: Mapping[str, Any]
    ) -> int:
        """Appends one line a batch of every rank, of these steps, to a file, on rank zero. Returns the number of batches.

        A collective.
        """
        rows = [
            {
                **what,
                "step": s.step,
                "epoch": s.epoch,
                "batch": s.batch,
                "total_batch": s.total_batch,
                "ids": _plain(s.ids),
            }
            for s in self._seen
            if s.step >= since and (until is None or s.step <= until)
        ]
        ranks: list[Any] = [rows]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, rows)
        if trainer.is_global_zero:
            lines = [json.dumps({**row, "rank": rank}) + "\n" for rank, own in enumerate(ranks) for row in own]
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write("".join(lines))
            except OSError as error:
                rank_zero_warn(f"StabilityGuard: {path} was not written ({error}). The run goes on.")
        return sum(len(own) for own in ranks)

    def _ids(self, trainer: Trainer, batch: Any, total: int) -> Any:
        if callable(self.sample_ids):
            return self.sample_ids(batch)
        keys = ID_KEYS if self.sample_ids is None else (self.sample_ids,)
        if isinstance(batch, Mapping):
            for key in keys:
                if key in batch:
                    return batch[key]
        if self.sample_ids is not None:
            return None
        named = getattr(trainer.train_dataloader, "sample_ids", None)
        return named(total) if callable(named) else None


def _plain(ids: Any) -> Any:
    """As JSON holds it."""
    if isinstance(ids, Tensor):
        return ids.tolist()
    if isinstance(ids, (list, tuple)):
        return [_plain(each) for each in ids]
    if isinstance(ids, Mapping):
        return {str(key): _plain(value) for key, value in ids.items()}
    if hasattr(ids, "tolist"):  # of NumPy
        return ids.tolist()
    return ids if isinstance(ids, (str, int, float, bool, type(None))) else str(ids)
