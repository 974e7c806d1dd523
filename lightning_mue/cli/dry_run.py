"""``lightning-mue dry-run``: reads the run off a config's trainer and data, makes the dry run, and reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch.optim import Optimizer

from lightning_mue.analysis.dry_run.run import Run, check_run, dry_run
from lightning_mue.checks import require_number, value_error
from lightning_mue.console import wide_console
from lightning_mue.files import whole_file

#: Lightning's precision -> the type of the products, where it is not that of the weights.
_AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


def make_dry_run(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    make_optimizers: Callable[[Any], Sequence[Optimizer]],
    *,
    roles: dict[str, str],
    shares_replicas: bool,
    world: int,
    tensor_parallel: int | None,
    sequences: int | None,
    gib: float | None,
    output: str | None,
) -> bool:
    """Makes and prints the dry run; the arguments are those of `MuETrainer.dry_run`.

    Returns:
        Whether every rank has enough memory.
    """
    if output is not None and Path(output).is_dir():
        raise value_error("--output", found=f"the folder {output}", expected="a file", do=f"Give {output}/dry_run.json.")
    if gib is not None:
        require_number("--gib", gib, above=0)
    run = _run(trainer, model, datamodule, world, tensor_parallel, sequences, roles, shares_replicas)
    check_run(model, run)
    model.trainer = trainer
    found = dry_run(trainer.precision_plugin.convert_module(model), run, make_optimizers)
    console = wide_console()
    sizes = f"data_parallel_size: {found.data_parallel}, tensor_parallel_size: {found.tensor_parallel}"
    console.print("strategy: DDP" if run.replicated else f"strategy: ModelParallelStrategy with {sizes}", markup=False)
    console.print(found)
    if output is not None:
        with whole_file(output) as part:
            part.write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")
        console.print(f"written: {output}", markup=False)
    if gib is None:
        return True
    console.print(found.verdict(gib), markup=False, highlight=False)
    return found.fits(gib)


def _run(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    world: int,
    tensor_parallel: int | None,
    sequences: int | None,
    roles: dict[str, str],
    shares_replicas: bool,
) -> Run:
    strategy = trainer.strategy
    replicated = isinstance(strategy, DDPStrategy) and tensor_parallel is None
    if not isinstance(strategy, (DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy)):
        expected = "ModelParallelStrategy, DDPStrategy or one device"
        do = "Give --trainer.strategy ddp, or lightning.pytorch.strategies.ModelParallelStrategy."
        raise value_error("trainer.strategy", found=type(strategy).__name__, expected=expected, do=do)
    if tensor_parallel is None and isinstance(strategy, ModelParallelStrategy):
        given = strategy._tensor_parallel_size
        # "auto" is the number of devices of one machine, as Lightning has it.
        tensor_parallel = min(world, strategy.num_processes) if given == "auto" else int(given)
    val, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
    return Run(
        world=world,
        tensor_parallel=1 if tensor_parallel is None else tensor_parallel,
        replicated=replicated,
        bucket_view=replicated and bool(strategy._ddp_kwargs.get("gradient_as_bucket_view")),  # type: ignore[attr-defined]
        sequences=getattr(datamodule, "batch_size", None) if sequences is None else sequences,
        micro_batches=trainer.accumulate_grad_batches,
        autocast=_AUTOCAST.get(str(trainer.precision)),
        clip=partial(
            model.configure_gradient_clipping, gradient_clip_val=val, gradient_clip_algorithm=algorithm
        )
        if val
        else None,
        shares_replicas=shares_replicas,
        roles=roles,
    )
