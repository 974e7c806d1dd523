"""Base classes of the data modules: the place in a run; and of language modelling: arguments, loaders, check of the vocabulary.

Shape legend: N tokens in a split, B windows in one process's batch, S context length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch import LightningDataModule

from lightning_mue.checks import mismatch, require_fraction, require_integer, require_positive, value_error
from lightning_mue.data.sampling import FixedLoader, StepLoader, validation_starts
from lightning_mue.seeds import run_seed


class Splits(NamedTuple):
    """Tokens of a corpus, unsigned integers `[N]` each, usually memory-mapped."""

    train: np.ndarray
    val: np.ndarray


class StepDataModule(LightningDataModule):
    """Where in a run a data module is: the step its training batches go on from, and its data-parallel rank."""

    batch_size: int
    seed: int | None

    def _stream(self) -> dict[str, Any]:
        """The arguments of a `StepLoader` that say which batches it gives, and from where on."""
        rank, world_size = self._data_parallel()
        return {
            "batch_size": self.batch_size,
            "seed": run_seed(self.seed),
            "rank": rank,
            "world_size": world_size,
            "step": self._batches_trained(),
            "in_flight": self._batches_in_flight,
        }

    def _data_parallel(self) -> tuple[int, int]:
        """Rank and world size over which batches differ; tensor-parallel processes share a rank."""
        kwargs = self.trainer.distributed_sampler_kwargs if self.trainer is not None else None
        return (kwargs["rank"], max(1, kwargs["num_replicas"])) if kwargs else (0, 1)

    def _batches_trained(self) -> int:
        # Lightning restores a loader's state only when it resumes within an epoch, or with max_steps. Its own count of
        # batches is also right at the end of an epoch, in a second fit, and after reload_dataloaders_every_n_epochs.
        progress = self._batch_progress()
        return progress.total.processed if progress is not None else 0

    def _batches_in_flight(self) -> int:
        progress = self._batch_progress()
        return progress.current.ready - progress.current.processed if progress is not None else 0

    def _batch_progress(self) -> Any:
        return self.trainer.fit_loop.epoch_loop.batch_progress if self.trainer is not None else None


class LanguageDataModule(StepDataModule, ABC):
    """Serves windows of a token stream as `{"tokens": int64 [B, S], "targets": int64 [B, S]}`.

    Training batches are a pure function of (seed, step, rank), so a run resumed from any checkpoint sees exactly the
    batches that it would have seen. Test and predict use the validation windows. The subclasses document the arguments.
    """

    def __init__(
        self, *, context_length: int, batch_size: int, val_fraction: float, val_batches: int | None, seed: int | None
    ) -> None:
        super().__init__()
        require_positive(context_length=context_length, batch_size=batch_size)
        if val_batches is not None:
            require_positive(val_batches=val_batches)
        if seed is not None:
            require_integer("seed", seed, 0)
        require_fraction(val_fraction=val_fraction)
        # int() and float(): NumPy's numbers would not go into a checkpoint that is loaded with weights_only.
        self.context_length, self.batch_size = int(context_length), int(batch_size)
        self.seed = None if seed is None else int(seed)
        self.val_batches = None if val_batches is None else int(val_batches)
        self.val_fraction = float(val_fraction)
        self._splits: Splits | None = None

    @abstractmethod
    def load_splits(self) -> Splits:
        """Maps the tokens of both splits; called by `setup` in every process."""

    @abstractmethod
    def largest_token(self) -> tuple[int, str]:
        """Returns the largest token id that a batch can contain, and where it occurs."""

    @property
    def vocab_size(self) -> int:
        """The smallest vocabulary that covers the data."""
        return self.largest_token()[0] + 1

    @property
    def batch_tokens(self) -> int:
        """Tokens in one micro-batch over all data-parallel processes: B * S * world size."""
        return self.batch_size * self.context_length * self._data_parallel()[1]

    def setup(self, stage: str | None = None) -> None:
        """Maps the tokens and checks them against the model.

        Raises:
            ValueError: A split is smaller than one window, or contains an id for which the model has no embedding.
        """
        splits = self.load_splits()
        needed = self.context_length + 1
        for name, tokens_N in zip(Splits._fields, splits, strict=True):
            if len(tokens_N) < needed:
                raise value_error(
                    f"{self.describe()}, {name} split",
                    found=f"{len(tokens_N)} tokens (train {len(splits.train)}, val {len(splits.val)})",
                    expected=f"at least {needed}, the tokens of one window of context_length={self.context_length}",
                    do="Use a larger corpus, a smaller context_length, or another val_fraction.",
                )
        self._check_context()
        self._check_vocabulary()
        self._splits = splits

    def train_dataloader(self) -> StepLoader | FixedLoader:
        """Random windows; under `Trainer(overfit_batches=...)` fixed ones, the same in every epoch."""
        if getattr(self.trainer, "overfit_batches", 0):
            return self._fixed_loader(self._mapped().train, None)
        return StepLoader(self._mapped().train, context_length=self.context_length, **self._stream())

    def val_dataloader(self) -> FixedLoader:
        """Fixed windows of the validation split, the same number on every rank."""
        return self._fixed_loader(self._mapped().val, self.val_batches)

    def test_dataloader(self) -> FixedLoader:
        """The validation windows."""
        return self.val_dataloader()

    def predict_dataloader(self) -> FixedLoader:
        """The validation windows."""
        return self.val_dataloader()

    def describe(self) -> str:
        """Names the corpus in messages."""
        return type(self).__name__

    def _fixed_loader(self, tokens_N: np.ndarray, max_batches: int | None) -> FixedLoader:
        rank, world_size = self._data_parallel()
        starts_MB = validation_starts(
            len(tokens_N),
            context_length=self.context_length,
            batch_size=self.batch_size,
            rank=rank,
            world_size=world_size,
            max_batches=max_batches,
        )
        return FixedLoader(tokens_N, starts_MB, self.context_length)

    def _mapped(self) -> Splits:
        if self._splits is None:
            raise RuntimeError(
                mismatch(
                    type(self).__name__,
                    found="a dataloader requested before the data are loaded",
                    expected="prepare_data() and setup() to have run",
                    do="Call prepare_data() and setup() first; a Trainer calls them itself.",
                )
            )
        return self._splits

    def _check_context(self) -> None:
        model = getattr(self.trainer, "lightning_module", None)
        longest = getattr(model, "context_length", None)
        if type(longest) is int and self.context_length > longest:
            raise value_error(
                "data.context_length",
                found=f"sequences of {self.context_length} tokens",
                expected=f"at most {longest}, the context_length of {type(model).__name__}",
                do="Lower it, or raise the model's.",
            )

    def _check_vocabulary(self) -> None:
        model = getattr(self.trainer, "lightning_module", None)
        model_vocab_size = getattr(model, "vocab_size", None)
        if not isinstance(model_vocab_size, int):
            return
        largest, where = self.largest_token()
        if largest >= model_vocab_size:
            raise value_error(
                f"{type(model).__name__}.vocab_size",
                found=model_vocab_size,
                expected=f"at least {largest + 1}, because token id {largest} occurs in {where}",
                do=f"Set the model's vocab_size to {largest + 1} or more, or use data made with the model's tokenizer.",
            )
