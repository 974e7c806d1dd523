"""Writes checkpoints beside the training: copies of the state in host memory, and a thread that brings them to disk.

One process and DDP: rank 0 writes Lightning's own checkpoint, one file. Sharded states (ModelParallelStrategy): every rank writes
its part by torch.distributed.checkpoint, in the layout of Lightning's distributed checkpoints. Lightning loads both by itself.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_mue.callbacks.checkpointing import folder
from lightning_mue.sharded import local

#: Beside the tensors: counts, hyperparameters, the sums.
_BESIDES = 1 << 22


class Target(NamedTuple):
    """Where a checkpoint goes, and who writes it."""

    dirpath: Path
    step: int
    keep_last: int
    keep_every: int | None
    rank: int
    #: Of all ranks, on CPU; None where rank 0 writes alone.
    group: Any

    @property
    def unfinished(self) -> Path:
        """The folder until the checkpoint is complete."""
        return self.dirpath / (folder.name_of(self.step) + folder.UNFINISHED)


class Writer:
    """One write at a time, in a thread; what it raised is told when asked."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stager: Any = None

    def copy(self, state: Any) -> Any:
        """A copy of a state in host memory; that of the last call is overwritten, so the write of it must have ended."""
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        assert not self.busy
        if self._stager is None:
            gpu = torch.cuda.is_available()
            # Buffers are kept from save to save: new memory is slower than the copying itself.
            options = {"use_pinned_memory": gpu, "use_non_blocking_copy": gpu}
            self._stager = DefaultStager(StagingOptions(use_shared_memory=False, use_async_staging=False, **options))
        return self._stager.stage(state)

    @property
    def busy(self) -> bool:
        """Whether a write is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, write: Callable[[], None]) -> None:
        """Writes in the background. The thread ends with the program: an unfinished checkpoint has an unfinished name."""
        self._thread = threading.Thread(target=self._run, args=(write,), name="SafeCheckpoint", daemon=True)
        self._thread.start()

    def wait(self, seconds: float | None = None) -> None:
        """Waits for the write that is under way."""
        if self._thread is not None:
            self._thread.join(seconds)

    def error(self) -> BaseException | None:
        """What the last write raised, once."""
        if self.busy:
            return None
        error, self._error = self._error, None
        return error

    def close(self) -> None:
        """Gives the buffers back."""
        if self._stager is not None:
            self._stager.close()
        self._stager = None

    def _run(self, write: Callable[[], None]) -> None:
        if sys.platform == "linux":  # where threads have priorities of their own: the training's go first
            os.nice(10)
        try:
            write()
        except BaseException as error:
            self._error = error


def write_whole(state: dict[str, Any], to: Target) -> None:
    """Writes a checkpoint that one rank holds as one file.

    Raises:
        OSError: No space, or what writing raised. What was written is removed.
        RuntimeError: What torch.save raised.
    """
    try:
        _make_room(to, bytes_of(state))
        path = to.unfinished / folder.WHOLE
        torch.save(state, path)
        folder.sync(path)
        _complete(to, {path.name: folder.describe(path)})
    except BaseException:
        folder.remove(to.unfinished)
        raise


def write_shards(state: dict[str, Any], to: Target) -> None:
    """Writes this rank's part of a checkpoint, on all ranks.

    Raises:
        OSError: No space, or a rank failed. What was written is removed.
    """
    from lightning.fabric.utilities.load import _METADATA_FILENAME
    from torch.distributed.checkpoint.state_dict_saver import save

    leads = to.rank == 0
    rest = dict(state)
    sharded = {"state_dict": rest.pop("state_dict")}
    sharded.update({f"optimizer_{i}": each for i, each in enumerate(rest.pop("optimizer_states", []))})

    def write_own() -> dict[str, Any]:
        if leads:
            torch.save(rest, to.unfinished / _METADATA_FILENAME)
            folder.sync(to.unfinished / _METADATA_FILENAME)
        own = list(to.unfinished.glob(f"__{to.rank}_*"))
        own += [to.unfinished / ".metadata", to.unfinished / _METADATA_FILENAME] if leads else []
        return {path.name: folder.describe(path) for path in own}

    try:
        needed = sum(_agree(to.group, lambda: bytes_of(sharded)))
        _agree(to.group, lambda: _make_room(to, needed) if leads else None)
        save(sharded, checkpoint_id=to.unfinished, process_group=to.group)
        parts = _agree(to.group, write_own)
        files = {name: entry for part in parts for name, entry in part.items()}
        _agree(to.group, lambda: _complete(to, files) if leads else None)
    except BaseException:
        if leads:
            folder.remove(to.unfinished)
        raise


def _make_room(to: Target, needed: int) -> None:
    to.dirpath.mkdir(parents=True, exist_ok=True)
    folder.remove_unfinished(to.dirpath)
    free = shutil.disk_usage(to.dirpath).free
    if free < needed + _BESIDES:
        raise OSError(f"{free / 1e9:.3g} GB free in {to.dirpath}, and {needed / 1e9:.3g} GB are needed")
    to.unfinished.mkdir()


def _complete(to: Target, files: dict[str, Any]) -> None:
    folder.write_manifest(to.unfinished, files, step=to.step, serial=folder.next_serial(to.dirpath))
    if missing := list(folder.damages(to.unfinished, contents=False)):
        raise OSError(f"{missing[0]}: {to.dirpath} must be one folder for all ranks")
    folder.finish(to.unfinished, to.dirpath / folder.name_of(to.step))
    folder.remove_old(to.dirpath, to.keep_last, to.keep_every)


def _agree(group: Any, act: Callable[[], Any]) -> list[Any]:
    """What an act gave on each rank.

    Raises:
        OSError: It failed on one of them.
    """
    try:
        own, error = act(), None
    except Exception as raised:
        own, error = None, f"{type(raised).__name__}: {raised}"
    results: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(results, (own, error), group=group)
    for rank, (_, failure) in enumerate(results):
        if failure is not None:
            raise OSError(f"rank {rank}: {failure}")
    return [result for result, _ in results]


def bytes_of(state: Any) -> int:
    """Bytes of the tensors in a state, this rank's parts of them; memory that several share counts once."""
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in _tensors(state)}
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield local(value)
    elif isinstance(value, (dict, list, tuple)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)
