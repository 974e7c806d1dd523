"""Sizes of a run in tokens, inferred from Trainer, datamodule and module without changing any of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_mue.callbacks.mue.checks import refuse_other_plan
from lightning_mue.checks import mismatch, value_error
from lightning_mue.names import BATCHES, LENGTHS
from lightning_mue.namespaces import is_lightning
from lightning_mue.parameterizations import ScalingPlan
from lightning_mue.parameterizations.reading.base import RUN_KEYS, Base, load_base

_KNOWN_LENGTH = {"expected": "a run of known length", "do": "Set max_steps of the Trainer (and max_epochs: -1)."}


def known_to(base: Base | None) -> dict[str, float | str]:
    """``tokens`` and ``batch_tokens``, as far as a base holds them; for these this run's are needed."""
    if isinstance(base, (str, Path)):
        base = load_base(base).run
    return {key: base[key] for key in RUN_KEYS if key in base} if isinstance(base, Mapping) else {}


def infer_batch_tokens(trainer: Trainer | None, pl_module: object, datamodule: object | None = None) -> float:
    """Tokens in one optimizer step over all ranks.

    That is ``datamodule.tokens_per_batch`` (of one process), or the batch size times the length of a sequence (see `BATCHES` and
    `LENGTHS`), found as attributes or hyperparameters of the datamodule, else of the module; times accumulation and the number
    of data-parallel replicas. The batch size of a DataLoader that the trainer has made comes first. The trainer need not be set up.

    Raises:
        LookupError: Saying what was looked for.
    """
    if trainer is None:
        raise LookupError(mismatch("trainer", found="no trainer", expected="one, to infer batch_tokens"))
    tokens, how = _micro_batch(trainer, pl_module, datamodule)
    factor, copies = _accumulation(trainer), replicas(trainer)
    batches = _batches(trainer)
    if batches is not None and factor > batches:
        rank_zero_warn(
            f"MuECallback: an epoch has {batches} batches, fewer than accumulate_grad_batches={factor}: a step has these."
        )
        factor = batches
    if _in_fit(trainer):
        rank_zero_info(
            f"MuECallback: batch_tokens = {tokens * factor * copies:g}: {how}, x {factor} (accumulation) x {copies} (replicas); "
            "a sequence counts in full, with its padding"
        )
    return tokens * factor * copies


def _micro_batch(trainer: Trainer, pl_module: object, datamodule: object | None) -> tuple[float, str]:
    """Tokens of one batch of one process, and how they were found."""
    tokens = _find(("tokens_per_batch",), datamodule)
    if tokens is not None:
        return tokens[0], f"{tokens[0]:g} ({tokens[1]})"
    loaders = _loaders(trainer)
    if len(loaders) > 1:
        found = f"{len(loaders)} training loaders, of each of which a step has a batch, and no tokens_per_batch"
        raise LookupError(mismatch("datamodule", found=found, expected="tokens_per_batch, to infer batch_tokens"))
    rows = _loader_size(loaders[0]) if loaders else None
    size = (float(rows), "batch_size of the DataLoader") if rows else _find(BATCHES, datamodule, pl_module)
    length = _find(LENGTHS, datamodule, pl_module)
    if size is None or length is None:
        missing = "batch_size" if size is None else f"sequence length ({', '.join(LENGTHS)})"
        where = " or ".join(type(owner).__name__ for owner in (datamodule, pl_module) if owner is not None)
        found = f"no {missing} and no tokens_per_batch among the attributes and hparams of {where}"
        raise LookupError(mismatch("datamodule", found=found, expected="one of these, to infer batch_tokens"))
    return size[0] * length[0], f"{size[0]:g} ({size[1]}) x {length[0]:g} ({length[1]})"


def steps(trainer: Trainer, optimizers: int | None = None) -> int:
    """Optimizer steps of the run; where manual optimization steps several optimizers a batch, they count as one.

    The trainer need not be set up; as it then has no optimizers, give their number.

    Raises:
        LookupError: If they are not known yet.
    """
    max_epochs, several = trainer.max_epochs, max(1, len(trainer.optimizers) if optimizers is None else optimizers)
    # Lightning holds global_step, which counts every optimizer's steps, against max_steps after each batch.
    max_steps = -(-trainer.max_steps // several) if trainer.max_steps > 0 else trainer.max_steps
    timed = any(type(c).__name__ == "Timer" for c in trainer.callbacks)  # type: ignore[attr-defined]
    if max_epochs is None or max_epochs == -1:
        if max_steps > 0:
            _warn_of_time(timed, "max_steps")
            return max_steps
        found = "max_time alone" if timed else "neither max_steps nor max_epochs"
        raise LookupError(mismatch("max_steps", found=found, **_KNOWN_LENGTH))
    batches = _batches(trainer)
    if batches is None:
        found = f"max_epochs={max_epochs} with epochs of a length that is not known before the data is loaded"
        raise LookupError(mismatch("max_steps", found=found, **_KNOWN_LENGTH))
    _warn_of_time(timed, "max_epochs")
    scheduling = _scheduling(trainer)
    # The last batches of an epoch are stepped with, however few they are.
    of_epochs = sum(-(-batches // _factor(scheduling, epoch)) for epoch in range(max_epochs))
    return min(of_epochs, max_steps) if max_steps > 0 else of_epochs


def _tokens(trainer: Trainer, batch_tokens: float, optimizers: int | None) -> float:
    """Tokens of the run: those of its batches, where they can be counted, since the last step of an epoch may have fewer."""
    total, batches = steps(trainer, optimizers), _batches(trainer)
    scheduling = _scheduling(trainer)
    if batches is None:
        return batch_tokens * total
    most = max(scheduling.values())
    if len(set(scheduling.values())) > 1:
        rank_zero_warn(
            f"MuECallback: accumulation changes during the run ({scheduling}); the given batch_tokens is read as that of the "
            f"factor {most}, to count the tokens of the run."
        )
    micro, seen, epoch, done = batch_tokens / min(most, batches), 0, 0, 0
    while done < total:
        factor = _factor(scheduling, epoch)
        of_epoch = -(-batches // factor)
        if of_epoch > total - done:
            return micro * (seen + (total - done) * factor)
        if len(scheduling) == 1:  # all epochs are alike
            whole = (total - done) // of_epoch
            done, seen, epoch = done + whole * of_epoch, seen + whole * batches, epoch + whole
        else:
            done, seen, epoch = done + of_epoch, seen + batches, epoch + 1
    return micro * seen


def _warn_of_time(timed: bool, limit: str) -> None:
    if timed:
        rank_zero_warn(
            f"MuECallback: the run's length in tokens was read from {limit}; if max_time (or a Timer) ends the run before, give "
            "`tokens` instead."
        )


def _scheduling(trainer: Trainer) -> dict[int, int]:
    """First epoch -> accumulated batches."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if is_lightning(callback, "GradientAccumulationScheduler"):
            last = trainer.max_epochs if trainer.max_epochs not in (None, -1) else float("inf")
            return {epoch: factor for epoch, factor in {0: 1, **callback.scheduling}.items() if epoch < max(1, last)}
    return {0: trainer.accumulate_grad_batches}


def _factor(scheduling: Mapping[int, int], epoch: int) -> int:
    return scheduling[max(first for first in scheduling if first <= epoch)]


def _accumulation(trainer: Trainer) -> int:
    scheduling = _scheduling(trainer)
    factors = set(scheduling.values())
    if len(factors) > 1:
        found = f"a GradientAccumulationScheduler with {scheduling}: batches of several sizes"
        raise LookupError(mismatch("accumulate_grad_batches", found=found, expected="one size of batch in the run"))
    return factors.pop()


def _in_fit(trainer: Trainer) -> bool:
    state = getattr(trainer, "state", None)
    return (
        str(getattr(getattr(state, "fn", None), "value", "")) == "fit"
        and trainer.fit_loop._data_source.instance is not None
    )


def _load(trainer: Trainer) -> None:
    """Loads the training data in a fit, so that its batches can be counted; Lightning goes on with what is loaded here.

    Not where a run is or may be resumed: Lightning gives a loader its place while it sets it up, from what it reads after this.
    """
    resumes = trainer.ckpt_path is not None or trainer.strategy.restore_checkpoint_after_setup
    if _in_fit(trainer) and trainer.fit_loop._combined_loader is None and not (trainer.fast_dev_run or resumes):  # type: ignore[attr-defined]
        trainer.fit_loop.setup_data()


def refuse_other_sizes(plan: ScalingPlan, sizes: Mapping[str, Any], saved: ScalingPlan | None) -> None:
    """Holds the sizes in a plan that was made before the data was loaded against those that were inferred after.

    Raises:
        ValueError: If they differ; a resumed run's at all, another's by more than 2 %: that run may be told them.
    """
    axes = {**plan.axes, **{key: size for key, size in sizes.items() if isinstance(size, (int, float))}}
    if saved is not None:
        refuse_other_plan(saved, replace(plan, axes=axes), plan.multipliers)
        return
    for key in RUN_KEYS:
        if key in plan.axes and abs(axes[key] / plan.axes[key] - 1) > 0.02:
            raise value_error(
                key,
                found=f"{plan.axes[key]:g}, inferred before the data was loaded, while the data gives {axes[key]:g}",
                expected="the same; under this strategy the data cannot be loaded before the plan is made",
                do=f"Give MuECallback({key}={axes[key]:g}, ...).",
            )


def _batches(trainer: Trainer) -> int | None:
    """Batches of an epoch of this process, under all limits of the trainer; None if not known (yet), or without an end."""
    count = trainer.num_training_batches if trainer.train_dataloader is not None else 0
    return int(count) if 0 < count < float("inf") else None


def _loaders(trainer: Trainer) -> list[Any]:
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else list(combined.flattened)


def _loader_size(loader: object) -> int | None:
    """Rows in a batch of a DataLoader, also of one with a batch sampler; None if it does not say."""
    for owner in (getattr(loader, "batch_sampler", None), loader):
        size = getattr(owner, "batch_size", None)
        if isinstance(size, int) and size > 0 and getattr(loader, "batch_sampler", None) is not None:
            return size
    return None


def replicas(trainer: Trainer) -> int:
    """Number of data-parallel replicas, each with batches of its own; tensor-parallel ranks see the same batches."""
    strategy: Any = trainer.strategy
    if is_lightning(strategy, "ModelParallelStrategy") and strategy._device_mesh is None:  # not set up: `explain`
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
    if trainer is not None and any(sizes.get(key) is None for key in known):
        _load(trainer)
    for key in sorted(known):  # batch_tokens first
        if sizes.get(key) is not None:
            continue
        if key == "tokens" and trainer is not None and getattr(trainer, "fast_dev_run", False):
            sizes[key] = known[key]  # a trial of the code: the few steps that it makes are not the run's length
            continue
        try:
            batch = sizes.get("batch_tokens") or infer_batch_tokens(trainer, pl_module, datamodule)
            sizes[key] = batch if key == "batch_tokens" or trainer is None else _tokens(trainer, batch, optimizers)
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


def _find(names: tuple[str, ...], *owners: object | None) -> tuple[float, str] | None:
    """The first positive number of one of these names among attributes and hyperparameters of the owners, and where it is."""
    for owner in owners:
        ours = is_lightning(owner, "LightningModule") or is_lightning(owner, "LightningDataModule")
        hparams = getattr(owner, "hparams", {}) if ours else {}
        for name in names:
            for value in (getattr(owner, name, None), hparams.get(name)):
                if isinstance(value, Real) and not isinstance(value, bool) and value > 0:  # type: ignore[operator]
                    return float(value), f"{name} of {type(owner).__name__}"
    return None
