"""``lightning-mue coord-check``: reads the axes, builds the models and batches of a config, and reports the check."""

from __future__ import annotations

import tempfile
from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from torch import nn
from torch.optim import Optimizer

from lightning_mue.analysis import CoordinateCheck, coordinate_check
from lightning_mue.callbacks import MuECallback
from lightning_mue.checks import brief, value_error
from lightning_mue.console import wide_console
from lightning_mue.parameterizations.reading.base import RUN_KEYS, build_base


def check_sizes(
    trainer: Trainer,
    model: LightningModule,
    axes: Sequence[str],
    datamodule: LightningDataModule | None,
    callback: MuECallback,
    *,
    base: dict[str, Any] | None,
    rule: str | None,
    alpha: float | None,
    lr: float | None,
    **options: Any,
) -> CoordinateCheck:
    """Runs the coordinate check of a config with the device and gradient clipping of its trainer.

    The arguments are those of `MuETrainer.coord_check`; the callback gives the parameterization where they are None.
    """
    factory = getattr(model, "optimizer", None)
    with Console(stderr=True).status("coordinate check") as status:
        return coordinate_check(
            partial(_at_size, model),
            _parse_axes(axes),
            training_batches(trainer, model, datamodule),
            rule=callback.rule if rule is None else rule,
            base=_without_run(model, callback.base if base is None else base),
            optimizer=factory if callable(factory) and not isinstance(factory, Optimizer) else None,
            lr=lr,
            lr_factor=0.1 if lr is None else 1.0,
            trainer_options={
                "accelerator": "cpu" if trainer.strategy.root_device.type == "cpu" else "auto",
                "gradient_clip_val": trainer.gradient_clip_val,
                "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
            },
            on_run=lambda run: status.update(f"coordinate check: {run}"),
            alpha=callback.alpha if alpha is None else alpha,
            roles=callback.roles,
            multipliers=callback.multipliers,
            preset=callback.preset,
            **options,
        )


def check_output(output: str) -> None:
    """Makes the folder of the report, before anything is trained.

    Raises:
        ValueError: It is a file, or cannot be made or written to.
    """
    try:
        Path(output).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output).close()
    except OSError as error:
        expected = "a folder that can be written to"
        raise value_error("--output", found=f"{output!r} ({brief(error)})", expected=expected) from error


def report(check: CoordinateCheck, output: str) -> None:
    """Prints the check, and writes coordinates.csv and, if matplotlib is installed, coordinates.png to a folder."""
    folder = Path(output)
    check.to_csv(folder / "coordinates.csv")
    wide_console().print(check)
    try:
        check.plot(folder / "coordinates.png")
    except ModuleNotFoundError as error:
        wide_console().print(f"note: coordinates.png was not drawn. {error}")


def _parse_axes(axes: Sequence[str]) -> list[dict[str, Any]]:
    """Reads ``["width=64,128", "n_heads=2,4"]`` as the sizes ``[{"width": 64, "n_heads": 2}, ...]``."""
    values: dict[str, list[Any]] = {}
    for axis in axes:
        name, equals, given = axis.partition("=")
        if not equals or not name or not given:
            example = "For example --axis width=64,128,256,512."
            raise value_error("--axis", found=repr(axis), expected="name=value,value,...", do=example)
        if name in values:
            do = "Give all of its values at once."
            raise value_error("--axis", found=f"{name} twice", expected="each axis once", do=do)
        values[name] = [yaml.safe_load(value) for value in given.split(",")]
    lengths = {name: len(given) for name, given in values.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise value_error("--axis", found=found, expected="equally many values for axes that vary together")
    if min(lengths.values(), default=0) < 2:
        found = " ".join(axes) or "none"
        raise value_error("--axis", found=found, expected="at least two sizes", do="Better give four.")
    return [dict(zip(values, size, strict=True)) for size in zip(*values.values(), strict=True)]


def _at_size(model: LightningModule, **size: Any) -> nn.Module:
    """Builds the module with other hyperparameters."""
    try:
        return build_base(model, size)
    except (ValueError, TypeError, ArgumentError) as error:
        reason: BaseException = error
        while (deeper := reason.__cause__ or reason.__context__) is not None:
            reason = deeper  # the configuration parser wraps the module's message in a long text of its own
        raise value_error(
            "--axis",
            found=", ".join(f"{name}={value}" for name, value in size.items()),
            expected=f"a size at which {type(model).__name__} can be built",
            do=str(reason).removeprefix("base."),
        ) from error


def _without_run(model: LightningModule, base: Any) -> Any:
    """A base without its batch and duration, so that these are the same at every size.

    Returns:
        A module, the path of a saved base, or None for the first size.
    """
    if isinstance(base, dict):
        base = {key: value for key, value in base.items() if key not in RUN_KEYS} or None
    return base if base is None or isinstance(base, (str, Path)) else build_base(model, base)


def training_batches(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None) -> Iterable[Any]:
    """The training batches of the datamodule or the module itself, prepared as in ``fit``."""
    if datamodule is None and not is_overridden("train_dataloader", model):
        raise value_error(
            "data",
            found=f"none, and no train_dataloader in {type(model).__name__}",
            expected="training batches",
            do="Add `data` to the config, or train_dataloader to the module.",
        )
    source: Any = model if datamodule is None else datamodule
    trainer.strategy.connect(model)  # a datamodule may ask the trainer for its module
    source.trainer = trainer
    source.prepare_data()
    source.setup("fit")
    loader: Iterable[Any] = source.train_dataloader()
    return loader
