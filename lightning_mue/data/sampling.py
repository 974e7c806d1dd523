"""Batches of token windows as a pure function of (seed, step, rank), so that a resumed run continues the same stream.

Shape legend: N tokens in a split, B windows in one process's batch, S context length, M validation batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_mue.checks import mismatch, value_error

Int64Array = npt.NDArray[np.int64]


class TokenBatch(TypedDict):
    """One batch of language modelling.

    Attributes:
        tokens: Inputs, int64 `[B, S]`.
        targets: The token that follows each input, int64 `[B, S]`.
    """

    tokens: Tensor
    targets: Tensor


def window_starts(seed: int, step: int, rank: int, *, batch_size: int, n_starts: int) -> Int64Array:
    """Draws the starts of one training batch's windows, independently and uniformly, with replacement.

    The generator is counter-based (Philox 4x64, Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
    the seed is the key, step and rank are words of the counter, so the streams of different (step, rank) do not overlap.
    Raw words are reduced modulo `n_starts` and do not pass through `numpy.random.Generator`, whose methods may change
    between NumPy versions. The bias is below `n_starts / 2**64`.

    Args:
        seed: Data seed, >= 0.
        step: Micro-batch number since the start of the run, over all epochs, >= 0.
        rank: Data-parallel rank, >= 0.
        batch_size: Windows to draw.
        n_starts: Number of possible starts; results lie in `[0, n_starts)`.

    Returns:
        Starts, int64 `[B]`.

    >>> window_starts(0, 5, 0, batch_size=3, n_starts=1000).tolist()
    [131, 42, 633]
    """
    # The lowest counter word advances while a stream is read.
    generator = np.random.Philox(key=seed, counter=np.array([0, step, rank, 0], dtype=np.uint64))
    words_B: npt.NDArray[np.uint64] = generator.random_raw(batch_size)
    starts_B: Int64Array = (words_B % np.uint64(n_starts)).astype(np.int64)
    return starts_B


def validation_starts(
    n_tokens: int, *, context_length: int, batch_size: int, rank: int, world_size: int, max_batches: int | None
) -> Int64Array:
    """Chooses fixed, non-overlapping windows, evenly spaced over a split and assigned to the ranks in turn.

    Every rank gets the same number of full batches; remaining windows are dropped. A split too small for one full batch
    gives one smaller batch.

    Args:
        n_tokens: Tokens in the split.
        context_length: Inputs in a window; a window holds one token more, which it shares with the next.
        batch_size: Windows in a batch of one process.
        rank: Data-parallel rank.
        world_size: Number of data-parallel ranks.
        max_batches: Upper limit on the batches of one process; None for all.

    Returns:
        Starts, int64 `[M, B]`.

    Raises:
        ValueError: The split has fewer windows than there are ranks.

    >>> validation_starts(41, context_length=4, batch_size=2, rank=0, world_size=1, max_batches=2).tolist()
    [[0, 8], [20, 28]]
    """
    n_windows = (n_tokens - 1) // context_length
    per_rank = n_windows // world_size
    if per_rank < 1:
        raise value_error(
            "validation split",
            found=f"{n_tokens} tokens, which is {max(n_windows, 0)} windows of context_length={context_length}",
            expected=f"at least one window for each of the {world_size} processes",
            do="Raise val_fraction, lower context_length, or use a larger corpus.",
        )
    batch_size = min(batch_size, per_rank)
    n_batches = per_rank // batch_size
    if max_batches is not None:
        n_batches = min(n_batches, max_batches)
    n_used = n_batches * batch_size * world_size
    windows = np.arange(n_used, dtype=np.int64) * n_windows // n_used
    return (windows[rank::world_size] * context_length).reshape(n_batches, batch_size)


def gather_windows(tokens_N: np.ndarray, starts_B: Int64Array, context_length: int) -> TokenBatch:
    """Reads windows of `context_length + 1` tokens and splits each into inputs and targets shifted by one.

    Args:
        tokens_N: Tokens of any unsigned integer dtype `[N]`, usually memory-mapped.
        starts_B: Starts in `[0, N - context_length)`, int64 `[B]`.
        context_length: Inputs in a window.
    """
    windows_BS1 = tokens_N[starts_B[:, None] + np.arange(context_length + 1)].astype(np.int64)
    tensor_BS1 = torch.from_numpy(windows_BS1)
    return {"tokens": tensor_BS1[:, :-1].contiguous(), "targets": tensor_BS1[:, 1:].contiguous()}


class StepLoader:
    """Endless stream of random windows, divided into epochs. Its whole state is the number of the next step.

    Lightning writes this state into its checkpoints and restores it, and does not prefetch because the loader has a
    length. Each `iter()` gives `len()` batches from the current step on. After a resume in the middle of an epoch,
    Lightning ends that epoch itself, by its own count of batches.

    Args:
        tokens_N: Tokens of the training split, unsigned integers `[N]`, with `N > context_length`.
        context_length, batch_size, rank, world_size: As of `validation_starts`.
        seed: Data seed, >= 0.
        step: Number of the first micro-batch.
        in_flight: Returns how many batches were handed out but not yet trained on. A checkpoint that an exception
            handler writes in the middle of a training step must not count that batch as seen.
    """

    mue_counts_batches = True

    def __init__(
        self,
        tokens_N: np.ndarray,
        *,
        context_length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        step: int = 0,
        in_flight: Callable[[], int] | None = None,
    ) -> None:
        self.tokens_N, self.context_length, self.batch_size = tokens_N, context_length, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.step, self._in_flight = step, in_flight

    def __len__(self) -> int:
        """Batches in an epoch: so many that all ranks together draw about N tokens, at least 1."""
        return max(1, len(self.tokens_N) // (self.batch_size * self.context_length * self.world_size))

    def __iter__(self) -> Iterator[TokenBatch]:
        for _ in range(len(self)):
            batch = self.batch(self.step)
            self.step += 1
            yield batch

    def batch(self, step: int) -> TokenBatch:
        """Returns the batch of any step, without advancing the stream."""
        return gather_windows(self.tokens_N, self._starts(step), self.context_length)

    def sample_ids(self, step: int) -> list[int]:
        """Returns the starts of the windows of any step's batch, by which StabilityGuard names samples."""
        return self._starts(step).tolist()

    def state_dict(self) -> dict[str, int]:
        """Returns the number of batches trained on, and the settings that determine the stream."""
        in_flight = self._in_flight() if self._in_flight is not None else 0
        return {"step": self.step - in_flight, **self._stream()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved step; warns if the following batches differ from those of the saved run."""
        changes = [
            f"{name}: {state_dict[name]} -> {value}"
            for name, value in self._stream().items()
            if state_dict.get(name, value) != value
        ]
        if changes:
            warnings.warn(
                mismatch(
                    "training data",
                    found=f"other settings than in the checkpoint ({'; '.join(changes)})",
                    expected="the same ones",
                    do="Restore them to continue with the batches that the saved run would have seen. Training continues at "
                    "the saved step, with other batches.",
                ),
                stacklevel=2,
            )
        self.step = int(state_dict["step"])

    def _starts(self, step: int) -> Int64Array:
        n_starts = len(self.tokens_N) - self.context_length
        return window_starts(self.seed, step, self.rank, batch_size=self.batch_size, n_starts=n_starts)

    def _stream(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "context_length": self.context_length,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "n_tokens": len(self.tokens_N),
        }


class FixedLoader:
    """Gives the same windows in the same order at every iteration; for validation.

    Args:
        tokens_N: Tokens of a split, unsigned integers `[N]`.
        starts_MB: Window starts of each batch, int64 `[M, B]`.
        context_length: Inputs in a window.
    """

    def __init__(self, tokens_N: np.ndarray, starts_MB: Int64Array, context_length: int) -> None:
        self.tokens_N, self.starts_MB, self.context_length = tokens_N, starts_MB, context_length

    def __len__(self) -> int:
        return len(self.starts_MB)

    def __iter__(self) -> Iterator[TokenBatch]:
        for starts_B in self.starts_MB:
            yield gather_windows(self.tokens_N, starts_B, self.context_length)
