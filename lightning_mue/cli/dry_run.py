"""``lightning-mue dry-run``: reads the run off a config's trainer and data, and reports."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from lightning_mue.analysis.dry_run.report import DryRun
from lightning_mue.analysis.dry_run.run import Run, check_run
from lightning_mue.callbacks import MuECallback
from lightning_mue.checks import require_number, value_error
from lightning_mue.console import wide_console
from lightning_mue.files import whole_file

#: Lightning's precision -> the type of the products, where it is not that of the weights.
_AUTOCAST = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}


def read_run(
    trainer: Trainer,
    model: LightningModule,
    datamodule: LightningDataModule | None,
    *,
    world: int,
    tensor_parallel: int | None,
    sequences: int | None,
) -> Run:
    """The run that a config describes, on so many ranks; the arguments are those of `MuETrainer.dry_run`.

    Raises:
        ValueError: If the strategy is another one, or the ranks cannot be divided so.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, (DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy)):
        expected = "ModelParallelStrategy, DDPStrategy or one device"
        do = "Give --trainer.strategy ddp, or lightning.pytorch.strategies.ModelParallelStrategy."
        raise value_error("trainer.strategy", found=type(strategy).__name__, expected=expected, do=do)
    if tensor_parallel is None and isinstance(strategy, ModelParallelStrategy):
        given = strategy._tensor_parallel_size
        tensor_parallel = strategy.num_processes if given == "auto" else int(given)
    replicated = isinstance(strategy, DDPStrategy) and tensor_parallel is None
    clip = partial(
        model.configure_gradient_clipping,
        gradient_clip_val=trainer.gradient_clip_val,
        gradient_clip_algorithm=trainer.gradient_clip_algorithm,
    )
    run = Run(
        world=world,
        tensor_parallel=1 if tensor_parallel is None else tensor_parallel,
        replicated=replicated,
        bucket_view=replicated and bool(strategy._ddp_kwargs.get("gradient_as_bucket_view")),  # type: ignore[union-attr]
        sequences=getattr(datamodule, "batch_size", None) if sequences is None else sequences,
        micro_batches=trainer.accumulate_grad_batches,
        autocast=_AUTOCAST.get(str(trainer.precision)),
        clip=clip if trainer.gradient_clip_val else None,
        shares_replicas=any(isinstance(each, MuECallback) for each in trainer.callbacks),  # type: ignore[attr-defined]
    )
    check_run(model, run)
    return run


def check_report(gib: float | None, output: str | None) -> None:
    """Checks the options of the report.

    Raises:
        ValueError: If the memory is not above 0, or the output is a folder.
    """
    if output is not None and Path(output).is_dir():
        found = f"the folder {output}"
        raise value_error("--output", found=found, expected="a file", do=f"Give {output}/dry_run.json.")
    if gib is not None:
        require_number("--gib", gib, above=0)


def report_dry_run(found: DryRun, run: Run, gib: float | None, output: str | None) -> bool:
    """Prints a dry run, and writes it as JSON to a file.

    Returns:
        Whether every rank has enough memory.
    """
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
