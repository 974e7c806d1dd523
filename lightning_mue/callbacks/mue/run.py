"""Sizes of a run in tokens, inferred from Trainer, datamodule and module without changing any of them."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_mue.checks import mismatch, value_error
from lightning_mue.parameterizations.reading.base import RUN_KEYS, Base, load_base

_KNOWN_LENGTH = {"expected": "a run of known length", "do": "Set max_steps of the Trainer (and max_epochs: -1)."}
#: Names under which data modules and models hold the length of a sequence.
LENGTHS = ("context_length", "sequence_length", "seq_length", "seq_len", "max_seq_len", "block_size", "max_length")


def known_to(base: Base | None) -> dict[str, float | str]:
    """``tokens`` and ``batch_tokens``, as far as a base holds them; for these this run's are needed."""
    if isinstance(base, (str, Path)):
        base = load_base(base).run
    return {key: base[key] for key in RUN_KEYS if key in base} if isinstance(base, Mapping) else {}


def infer_batch_tokens(trainer: Trainer | None, pl_module: object, datamodule: object | None = None) -> float:
    """Tokens in one optimizer step over all ranks; no data is loaded to find it.

    That is ``datamodule.tokens_per_batch`` (of one process), or ``batch_size`` times the length of a sequence (see ``LENGTHS``),
    found as attributes or hyperparameters of the datamodule, else of the module; times accumulation and the number of
    data-parallel replicas. The trainer need not be set up.

    Raises:
        LookupError: Saying what was looked for.
    """
    if trainer is None:
        raise LookupError(mismatch("trainer", found="no trainer", expected="one, to infer batch_tokens"))
    tokens = _find(("tokens_per_batch",), datamodule)
    if tokens is None:
        size, length = _find(("batch_size",), datamodule, pl_module), _find(LENGTHS, datamodule, pl_module)
        if size is None or length is None:
            missing = "batch_size" if size is None else f"sequence length ({', '.join(LENGTHS)})"
            where = " or ".join(type(owner).__name__ for owner in (datamodule, pl_module) if owner is not None)
            found = f"no {missing} and no tokens_per_batch among the attributes and hparams of {where}"
            raise LookupError(mismatch("datamodule", found=found, expected="one of these, to infer batch_tokens"))
        tokens = size * length
    return tokens * trainer.accumulate_grad_batches * replicas(trainer)


def steps(trainer: Trainer, optimizers: int | None = None) -> int:
    """Optimizer steps of the run; where manual optimization steps several optimizers a batch, they count as one.

    The trainer need not be set up; as it then has no optimizers, give their number.

    Raises:
        LookupError: If they are not known yet.
    """
    max_epochs, several = trainer.max_epochs, max(1, len(trainer.optimizers) if optimizers is None else optimizers)
    # Lightning holds global_step, which counts every optimizer's steps, against max_steps after each batch.
    max_steps = -(-trainer.max_steps // several) if trainer.max_steps > 0 else trainer.max_steps
    if max_epochs is None or max_epochs == -1:
        if max_steps > 0:
            return max_steps
        raise LookupError(mismatch("max_steps", found="neither max_steps nor max_epochs", **_KNOWN_LENGTH))
    # Loading the data to count it would start a resumed loader at its first batch.
    estimate = trainer.estimated_stepping_batches if trainer.train_dataloader is not None else -1
    if not 0 < estimate < float("inf"):
        found = f"max_epochs={max_epochs} with epochs of a length that is not known before the data is loaded"
        raise LookupError(mismatch("max_steps", found=found, **_KNOWN_LENGTH))
    return min(int(estimate), max_steps) if max_steps > 0 else int(estimate)


def replicas(trainer: Trainer) -> int:
    """Number of data-parallel replicas, each with batches of its own; tensor-parallel ranks see the same batches."""
    strategy = trainer.strategy
    if isinstance(strategy, ModelParallelStrategy) and strategy._device_mesh is None:  # not set up: `explain`
        size = strategy._data_parallel_size
        return int(trainer.num_nodes if size == "auto" else size)
    kwargs = trainer.distributed_sampler_kwargs
    return int(kwargs["num_replicas"]) if kwargs else 1


def run_sizes(
    known: Mapping[str, float | str],
    given: Mapping[str, float | str | None],
    trainer: Trainer | None,
    pl_module: object,
    datamodule: LightningDataModule | None = None,
    *,
    trains: bool = True,
    optimizers: int | None = None,
) -> dict[str, Any]:
    """``tokens`` and ``batch_tokens`` for a plan: as given, else inferred where they are known of the base.

    Where no training follows (not ``trains``), what cannot be inferred is the base's (``N per parameter``: as many for each).

    Raises:
        ValueError: For a size that the base holds and that is neither given nor can be inferred.
    """
    sizes: dict[str, Any] = dict(given)
    for key in sorted(known):  # batch_tokens first
        if sizes.get(key) is not None:
            continue
        if key == "tokens" and trainer is not None and getattr(trainer, "fast_dev_run", False):
            sizes[key] = known[key]  # a trial of the code: the few steps that it makes are not the run's length
            continue
        try:
            batch = sizes.get("batch_tokens") or infer_batch_tokens(trainer, pl_module, datamodule)
            sizes[key] = batch if key == "batch_tokens" or trainer is None else batch * steps(trainer, optimizers)
        except LookupError as error:
            if not trains:
                sizes[key] = known[key]
                continue
            shown = known[key] if isinstance(known[key], str) else f"{known[key]:g}"
            raise value_error(
                f"base.{key}",
                found=f"{shown}, while {key} of this run is not given and cannot be inferred",
                expected=f"{key} of both runs or of none",
                do=f"Give {key}, e.g. MuECallback({key}=4e9, ...), or leave base.{key} out if it is not to count. It cannot "
                f"be inferred because of {error.args[0]}",
            ) from None
    return sizes


def _find(names: tuple[str, ...], *owners: object | None) -> float | None:
    """The first positive number of one of these names among attributes and hyperparameters of the owners, in order."""
    for owner in owners:
        hparams = getattr(owner, "hparams", {}) if isinstance(owner, (LightningModule, LightningDataModule)) else {}
        for name in names:
            for value in (getattr(owner, name, None), hparams.get(name)):
                if isinstance(value, Real) and not isinstance(value, bool) and value > 0:  # type: ignore[operator]
                    return float(value)
    return None
