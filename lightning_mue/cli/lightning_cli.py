"""``lightning-mue``: fit, validate, test and predict from YAML; ``explain`` and ``coord-check`` (commands.py)."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from rich.panel import Panel
from rich.text import Text

from lightning_mue.callbacks import MuECallback
from lightning_mue.cli.commands import MuETrainer
from lightning_mue.console import wide_console
from lightning_mue.data.base import LanguageDataModule
from lightning_mue.sharded import is_sharded

#: Commands that need the model's description only, not its weights.
_ON_META = ("explain", "coord-check")
#: What people write -> what the parser calls it: "+" appends to a list.
_SPELLINGS = {"--axis": "--axis+", "--save-base": "--save_base"}


class MuECLI(LightningCLI):
    """LightningCLI in subclass mode: configs choose model, data, optimizer, scheduler and callbacks by class path.

    The optimizer is an ``OptimizerCallable`` of the model, built in ``configure_optimizers``: Lightning's automatic one is
    built before FSDP2 replaces the parameters, and would then train nothing.
    """

    def __init__(self, args: Any = None, run: bool = True) -> None:
        super().__init__(
            LightningModule,
            trainer_class=MuETrainer,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_kwargs={"prog": "lightning-mue"},
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands and ours."""
        return {**LightningCLI.subcommands(), **{command: {"model", "datamodule"} for command in _ON_META}}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reads the command line, in which ``--axis`` may be given several times."""
        if args is None or isinstance(args, list):
            given = sys.argv[1:] if args is None else args
            self.config = parser.parse_args([_spelled(arg) for arg in given])
        else:
            super().parse_arguments(parser, args)

    def instantiate_classes(self) -> None:
        """Makes model, data and trainer; where the model is only described, without memory for its weights."""
        with torch.device("meta") if self.subcommand in _ON_META else nullcontext():
            super().instantiate_classes()

    def after_fit(self) -> None:
        """Ends a training with a summary."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            summarize(self.trainer, self.model, self.datamodule)


def _spelled(arg: str) -> str:
    """An argument as the parser knows it.

    Example:
        >>> _spelled("--axis=width=64,128")
        '--axis+=width=64,128'
    """
    name, equals, value = str(arg).partition("=")
    return f"{_SPELLINGS.get(name, name)}{equals}{value}"


def summarize(trainer: Trainer, model: LightningModule, datamodule: LightningDataModule | None) -> None:
    """Prints what a person wants to know after a training.

    Args:
        trainer: The trainer after fit.
        model: The trained module.
        datamodule: Its data, from which the prompt of the text sample is taken.
    """
    console = wide_console()
    callback = next((c for c in trainer.callbacks if isinstance(c, MuECallback)), None)  # type: ignore[attr-defined]
    if callback is not None and callback.plan is not None:
        console.print(callback.plan)
    metrics = trainer.callback_metrics
    lines = [f"{name}: {float(metrics[name]):.4f}" for name in ("val/bits_per_byte", "val/loss") if name in metrics]
    lines.append(f"steps: {trainer.global_step}")
    checkpoint = trainer.checkpoint_callback
    best = getattr(checkpoint, "best_model_path", "")
    if best:
        lines.append(f"checkpoint: {_relative(best)}")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            lines.append(f"logs: {_relative(logger.log_dir)}")
            lines.append(f"look at them: tensorboard --logdir {_relative(logger.root_dir)}")
            lines.append("  (page CUSTOM SCALARS: is the run healthy; page TEXT: the parameterization)")
    console.print(Panel(Text("\n".join(lines)), title="lightning-mue", title_align="left"))
    sample = _sample(model, datamodule)
    if sample is not None:
        prompt, continuation = sample
        console.print(Panel(Text.assemble((prompt, "dim"), continuation), title="text sample", title_align="left"))


def _sample(model: LightningModule, datamodule: LightningDataModule | None) -> tuple[str, str] | None:
    """(prompt from the validation data, the model's continuation), for models of bytes that can generate."""
    generate = getattr(model, "generate", None)
    if any(is_sharded(p) for p in model.parameters()):
        return None  # the other ranks are not here to run their shards
    if (
        not isinstance(datamodule, LanguageDataModule)
        or not callable(generate)
        or getattr(model, "vocab_size", None) != 256
    ):
        return None
    batch = next(iter(datamodule.val_dataloader()), None)
    if batch is None:
        return None
    prompt = batch["tokens"][0, :96].to(model.device)
    tokens = generate(prompt, 240, temperature=0.7, seed=0).tolist()
    decode = lambda ids: bytes(ids).decode(errors="replace")  # noqa: E731
    return decode(tokens[: len(prompt)]), decode(tokens[len(prompt) :])


def _relative(path: str | Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def main(args: list[str] | None = None) -> None:
    """Entry point of ``lightning-mue``.

    A mistake in the input is told in one paragraph, without a traceback; set LIGHTNING_MUE_TRACEBACK=1 to see it.
    """
    try:
        MuECLI(args)
    except (ValueError, TypeError, OSError) as error:
        message = _told_by_us(error)
        if message is None or os.environ.get("LIGHTNING_MUE_TRACEBACK"):
            raise
        print(f"lightning-mue: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def _told_by_us(error: BaseException | None) -> str | None:
    """The message of a check of this package, also where the configuration parser has wrapped it in its own words."""
    while error is not None:
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        if traceback is not None and Path(__file__).parents[1] in Path(traceback.tb_frame.f_code.co_filename).parents:
            return str(error)
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    main()
