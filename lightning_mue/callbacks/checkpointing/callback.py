"""`SafeCheckpoint`: checkpoints beside the training, from which the newest sound one is found again."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_mue.callbacks.checkpointing import folder
from lightning_mue.callbacks.checkpointing.buckets import BucketOrder
from lightning_mue.callbacks.checkpointing.loading import before_loading, first_brief, refuse_code
from lightning_mue.callbacks.checkpointing.random_states import random_states, restore_random_states
from lightning_mue.callbacks.checkpointing.signals import Requests
from lightning_mue.callbacks.checkpointing.writing import Target, Writer, write_shards, write_whole
from lightning_mue.callbacks.rewinding import rewind_to_step
from lightning_mue.callbacks.steps import steps_done
from lightning_mue.checks import mismatch, require_positive, require_type, value_error
from lightning_mue.namespaces import is_lightning

#: In a checkpoint: each rank's random states.
_RANDOM = "lightning_mue_random_states"
#: In a checkpoint: the order of DDP's buckets.
_BUCKETS = "lightning_mue_bucket_order"
#: Exit status of a program that SIGTERM ended: 128 + 15.
TERMINATED = 143
#: Longest wait for a write when the run ends by an error: the other ranks may be gone.
_SECONDS_AT_ERROR = 60.0


class SafeCheckpoint(Checkpoint):
    """Saves the run every so many steps, in the background; a killed run goes on from the newest sound checkpoint.

    Each checkpoint is a folder ``step-000123`` with the sums of its files. It has this name only when it is complete. At SIGTERM
    it saves and ends the run with exit status 143, at SIGUSR1 it saves and goes on; it saves too when ``max_time`` has run out
    and at the last step. To go on, start the same command again with ``ckpt_path: auto`` (`lightning-mue`), or give
    ``ckpt_path=SafeCheckpoint.latest(dirpath)`` to ``Trainer.fit``. See docs/large-runs.md.

    Args:
        dirpath: Folder of the checkpoints, one for all ranks; by default ``checkpoints`` in the Trainer's ``default_root_dir``.
        every_n_train_steps: Optimizer steps between two checkpoints.
        keep_last: How many of the newest to keep. On disk, there is room for one more needed.
        keep_every: Keep those of every so many steps for good; a multiple of `every_n_train_steps`.

    Raises:
        TypeError, ValueError: An argument is no such number.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        *,
        every_n_train_steps: int = 1000,
        keep_last: int = 3,
        keep_every: int | None = None,
    ) -> None:
        require_type("dirpath", dirpath, (str, os.PathLike, type(None)), "the path of a folder")  # type: ignore[arg-type]
        require_positive(every_n_train_steps=every_n_train_steps, keep_last=keep_last)
        if keep_every is not None:
            require_positive(keep_every=keep_every)
            if keep_every % every_n_train_steps:
                expected = f"a multiple of every_n_train_steps={every_n_train_steps}"
                raise value_error("keep_every", found=keep_every, expected=expected, do="No other steps are saved.")
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.every_n_train_steps, self.keep_last, self.keep_every = every_n_train_steps, keep_last, keep_every
        self._requests, self._writer, self._buckets = Requests(), Writer(), BucketOrder()
        self._groups: list[Any] = []
        self._step = self._saved = 0
        self._stopping = False
        self._random: list[Any] | None = None
        #: What was read in whole by this process already.
        self._sound: Path | None = None

    @staticmethod
    def latest(dirpath: str | os.PathLike[str]) -> str | None:
        """The newest sound checkpoint in a folder, as ``Trainer.fit(ckpt_path=...)`` takes it; None if there is none.

        Every byte of it is read; damaged ones are warned of and passed over.
        """
        found = folder.newest(Path(dirpath), contents=True)
        return None if found is None else str(folder.path_for_lightning(found))

    def resume_path(self, trainer: Trainer) -> str | None:
        """What ``ckpt_path: auto`` means: as `latest`, in this callback's folder.

        Where several ranks will load a sharded checkpoint, only sizes are compared here; they share the reading later.
        """
        dirpath = self._dirpath(trainer)
        alone = trainer.world_size == 1 or not self._is_sharded(trainer)
        found = folder.newest(dirpath, contents=alone)
        if found is None:
            rank_zero_info(f"ckpt_path: auto: no checkpoint in {dirpath}, so the run starts at step 0")
            return None
        rank_zero_info(f"ckpt_path: auto: the run goes on from {found}")
        self._sound = found if alone else None
        return str(folder.path_for_lightning(found))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot be saved, and takes its place as the last of the callbacks.

        Raises:
            ValueError: The strategy keeps its state in another way, or there is a second SafeCheckpoint.
        """
        self._stopping, self._random, self._buckets = False, None, BucketOrder()
        before_loading(trainer, self._refuse_unsound)
        if stage != "fit":
            return
        _refuse_unsupported(trainer)
        # What the others change at the end of a step is then part of the state. The for loop that calls this has the old list.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [each for each in callbacks if each is not self] + [self]  # type: ignore[attr-defined]
        self.dirpath = self._dirpath(trainer)
        # Two, because the thread that writes and the training talk at the same time.
        self._groups = [dist.new_group(backend="gloo") for _ in range(2)] if _is_distributed() else []
        self._requests.group = self._groups[0] if trainer.world_size > 1 else None
        self._requests.listen_early(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes what this callback has saved."""
        self._random, self._buckets.names = checkpoint.get(_RANDOM), dict.fromkeys(checkpoint.get(_BUCKETS, ()))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listens to signals, and goes on with the random numbers where the checkpoint left them."""
        self._requests.listen(trainer)
        self._buckets.begin(trainer, self._requests.group)
        self._step = self._saved = steps_done(trainer)
        if self._random is not None and len(self._random) == trainer.world_size:
            restore_random_states(self._random[trainer.global_rank])
        assert self.dirpath is not None
        if self._step == 0 and trainer.is_global_zero and (old := folder.complete(self.dirpath)):
            _warn(
                found=f"{len(old)} checkpoint(s) in {self.dirpath}, the last of step {old[-1][0]}, and a run that starts at step 0",
                expected="an empty folder, or a run that goes on",
                do="The old ones will be deleted as new ones come. To go on, give ckpt_path: auto.",
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves if a checkpoint is due, asked for by a signal, or the last one.

        Raises:
            SIGTERMException: SIGTERM came, and the run is saved; the program's exit status is then 143.
        """
        self._buckets.end()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._tell()
        step = steps_done(trainer)
        stepped, self._step = step != self._step, step
        stops, self._stopping = trainer.should_stop and not self._stopping, trainer.should_stop
        asked = self._requests.new() and stepped
        due = stepped and (asked or step % self.every_n_train_steps == 0 or _is_last(trainer))
        if (due or stops) and step != self._saved:
            self._save(trainer)
        if asked and self._requests.met():
            self._settle(trainer)
            rank_zero_info(f"SIGTERM: the run ends after step {step}; ckpt_path: auto goes on from {self.dirpath}")
            raise SIGTERMException(TERMINATED)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Every saver's checkpoint counts to the last optimizer step."""
        rewind_to_step(trainer, checkpoint)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits until the last checkpoint is on disk."""
        self._settle(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lets a write that is under way come to its end."""
        self._writer.wait(_SECONDS_AT_ERROR)
        self._tell()
        self._requests.stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Gives memory, signals and process groups back."""
        self._requests.stop()
        self._writer.close()
        if _is_distributed():
            for group in self._groups:
                dist.destroy_process_group(group)
        self._groups, self._requests.group = [], None

    def _save(self, trainer: Trainer) -> None:
        self._writer.wait()
        self._tell()
        self._saved = self._step
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        state[_RANDOM], state[_BUCKETS] = self._all_random_states(trainer), list(self._buckets.names)
        assert self.dirpath is not None
        group = self._groups[1] if self._is_sharded(trainer) else None
        to = Target(self.dirpath, self._step, self.keep_last, self.keep_every, trainer.global_rank, group)
        if group is not None or trainer.is_global_zero:
            write = write_whole if group is None else write_shards
            self._writer.start(partial(write, self._writer.copy(state), to))

    def _refuse_unsound(self, ckpt_path: str) -> None:
        """Refuses a checkpoint whose bytes are not those that were written, or that is more than data, before it is loaded."""
        found, group = folder.folder_of(ckpt_path), self._requests.group
        if found is not None and found != self._sound:
            rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
            words = folder.words_of_damages(found, rank, world)
            if group is not None:  # the ranks share the reading
                parts: list[Any] = [None] * world
                dist.all_gather_object(parts, words, group=group)
                words = [each for part in parts for each in part]
            folder.refuse_damaged(found, words)
        refuse_code(ckpt_path)

    def _all_random_states(self, trainer: Trainer) -> list[Any]:
        own = random_states()
        if self._requests.group is None:
            return [own]
        states: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(states, own, group=self._requests.group)
        return states

    def _settle(self, trainer: Trainer) -> None:
        """Waits for the write, on all ranks: one that leaves early may have the others killed."""
        self._writer.wait()
        self._tell()
        if self._requests.group is not None:
            dist.barrier(group=self._requests.group)

    def _tell(self) -> None:
        if (error := self._writer.error()) is not None:
            _warn(
                found=f"that of step {self._saved} not written ({first_brief(error)})",
                expected="a complete checkpoint",
                do=f"The run goes on, and the older checkpoints are as they were. Make room in {self.dirpath}, or check that it "
                "can be written to.",
            )

    def _dirpath(self, trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints" if self.dirpath is None else self.dirpath

    def _is_sharded(self, trainer: Trainer) -> bool:
        strategy = trainer.strategy
        return is_lightning(strategy, "ModelParallelStrategy") and strategy._save_distributed_checkpoint  # type: ignore[attr-defined]


def resume_path(trainer: Trainer) -> str | None:
    """What ``ckpt_path: auto`` means for a trainer.

    Raises:
        ValueError: It has no SafeCheckpoint.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SafeCheckpoint):
            return callback.resume_path(trainer)
    found, do = "auto, and no SafeCheckpoint among trainer.callbacks", "Add lightning_mue.callbacks.SafeCheckpoint."
    raise value_error("ckpt_path", found=found, expected="one, whose folder is searched", do=do)


def _refuse_unsupported(trainer: Trainer) -> None:
    known = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
    strategy = trainer.strategy
    if not any(is_lightning(strategy, name) for name in known) or is_lightning(strategy, "DeepSpeedStrategy"):
        do = "For others, use Lightning's ModelCheckpoint."
        raise value_error(
            "SafeCheckpoint", found=f"strategy {type(strategy).__name__}", expected=f"one of {', '.join(known)}", do=do
        )
    if sum(isinstance(each, SafeCheckpoint) for each in trainer.callbacks) > 1:  # type: ignore[attr-defined]
        raise value_error("trainer.callbacks", found="several SafeCheckpoints", expected="one")


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _is_last(trainer: Trainer) -> bool:
    """Whether the step that was just done is the last one of the run, as far as is known before its validation."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    ends = epochs is not None and epochs != -1 and trainer.current_epoch + 1 >= epochs and trainer.is_last_batch
    return ends or (steps is not None and steps != -1 and trainer.global_step >= steps)


def _warn(*, found: str, expected: str, do: str) -> None:
    rank_zero_warn(mismatch("checkpoint", found=found, expected=expected, do=do))
