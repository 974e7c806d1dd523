"""``lightning-mue``: Lightning's commands from YAML files, those of `MuETrainer`, and some that need no Trainer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_mue.callbacks import ThroughputMonitor
from lightning_mue.cli.report import report_command
from lightning_mue.cli.summary import summarize
from lightning_mue.cli.trainer import MuETrainer

#: Commands that need the model's shapes only, not its weights.
_ON_META = ("explain", "export-plan", "dry-run", "coord-check")
#: Option as users write it -> as the parser knows it; "+" appends to a list.
_SPELLINGS = {"--axis": "--axis+", "--save-base": "--save_base", "--tensor-parallel": "--tensor_parallel"}
_PACKAGE = Path(__file__).parents[1]
#: Commands that are not a Trainer's: name -> what takes the rest of the command line, and one sentence for --help.
_OTHER_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "report": (report_command, "RUN_DIR...: one HTML page with the verdict on runs (needs no config)."),
}


class MuECLI(LightningCLI):
    """LightningCLI in subclass mode: configs choose model, data, optimizer, scheduler and callbacks by class path.

    The optimizer is an ``OptimizerCallable`` of the model, called in ``configure_optimizers``. Lightning's automatic
    optimizer would be built before FSDP2 replaces the parameters, and would then train nothing.
    """

    def __init__(self, args: Any = None, run: bool = True) -> None:
        super().__init__(
            LightningModule,
            trainer_class=MuETrainer,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_kwargs={"prog": "lightning-mue", "epilog": _epilog()},
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands, and those of `MuETrainer`."""
        return {**LightningCLI.subcommands(), **{command: {"model", "datamodule"} for command in _ON_META}}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reads the command line, in which ``--axis`` may be given several times."""
        if args is None or isinstance(args, list):
            given = sys.argv[1:] if args is None else args
            self.config = parser.parse_args([_spelled(arg) for arg in given])
        else:
            super().parse_arguments(parser, args)

    def instantiate_classes(self) -> None:
        """Makes model, data and trainer; for the commands in ``_ON_META`` without memory for the weights."""
        with torch.device("meta") if self.subcommand in _ON_META else nullcontext():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes the trainer, with a ThroughputMonitor unless the config has one or asks for a barebones trainer."""
        configured = self._get(self.config_init, "trainer.callbacks") or []
        callbacks = configured if isinstance(configured, list) else [configured]
        has_one = any(isinstance(callback, ThroughputMonitor) for callback in callbacks)
        if not has_one and not self._get(self.config_init, "trainer.barebones"):
            self.trainer_defaults = {"callbacks": [ThroughputMonitor()]}
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Prints a summary after a training."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            summarize(self.trainer, self.model, self.datamodule)


def _epilog() -> str:
    return "\n".join(f"lightning-mue {name} {does}" for name, (_, does) in _OTHER_COMMANDS.items())


def _spelled(arg: str) -> str:
    """An argument as the parser knows it.

    Example:
        >>> _spelled("--axis=width=64,128")
        '--axis+=width=64,128'
    """
    name, equals, value = str(arg).partition("=")
    return f"{_SPELLINGS.get(name, name)}{equals}{value}"


def main(args: list[str] | None = None) -> None:
    """Entry point of ``lightning-mue``.

    An error in the input is printed in one paragraph, without a traceback; set LIGHTNING_MUE_TRACEBACK=1 to see it.
    """
    given = sys.argv[1:] if args is None else args
    try:
        if given and given[0] in _OTHER_COMMANDS:
            _OTHER_COMMANDS[given[0]][0](given[1:])
        else:
            MuECLI(args)
    except (ValueError, TypeError, OSError) as error:
        message = _message_of_package(error)
        if message is None or os.environ.get("LIGHTNING_MUE_TRACEBACK"):
            raise
        print(f"lightning-mue: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def _message_of_package(error: BaseException | None) -> str | None:
    """The message of an error that this package raised, also if the configuration parser has wrapped it; else None."""
    while error is not None:
        traceback = error.__traceback__
        while traceback is not None and traceback.tb_next is not None:
            traceback = traceback.tb_next
        if traceback is not None and _PACKAGE in Path(traceback.tb_frame.f_code.co_filename).parents:
            return str(error)
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    main()
