"""``lightning-mue``: Lightning's commands from YAML files, those of `MuETrainer`, and some that need no Trainer."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_mue.callbacks import MuECallback, ThroughputMonitor
from lightning_mue.callbacks.checkpointing.callback import TERMINATED, resume_path
from lightning_mue.callbacks.checkpointing.loading import before_loading, refuse_code
from lightning_mue.callbacks.trial_report import TrialReport
from lightning_mue.checks import value_error
from lightning_mue.class_paths import check_class_paths
from lightning_mue.cli.certify import certify_command
from lightning_mue.cli.forecast import forecast_command
from lightning_mue.cli.parsing.groups import add_groups, with_groups
from lightning_mue.cli.parsing.parser import BriefParser
from lightning_mue.cli.parsing.raised import KINDS, message_of
from lightning_mue.cli.parsing.values import check_checkpoint, check_values
from lightning_mue.cli.parsing.words import check_environment, check_words
from lightning_mue.cli.report import report_command
from lightning_mue.cli.summary import summarize
from lightning_mue.cli.sweep import sweep_command
from lightning_mue.cli.trainer import MuETrainer

#: Commands that need the model's shapes only, not its weights.
_ON_META = ("explain", "export-plan", "dry-run", "coord-check")
#: Option as users write it -> as the parser knows it; "+" appends to a list.
_SPELLINGS = {"--axis": "--axis+", "--save-base": "--save_base", "--tensor-parallel": "--tensor_parallel"}
#: Of several configs, each overrides those before it.
_REPEATABLE = ("--config", "-c", "--axis")
#: Commands that are not a Trainer's: name -> what takes the rest of the command line, and one sentence for --help.
_OTHER_COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "certify": (
        certify_command,
        "SWEEP_DIR...: does the rate hold at every size of a sweep? A page and an exit status.",
    ),
    "forecast": (
        lambda args: forecast_command(args, MuECLI),
        "SWEEP_DIR... --config ...: loss and best rate of a larger run, written before it starts.",
    ),
    "sweep": (lambda args: sweep_command(args, MuECLI), "--config ...: learning rates over sizes, rules and seeds."),
    "report": (report_command, "RUN_DIR...: one HTML page with the verdict on runs (needs no config)."),
}


class MuECLI(LightningCLI):
    """LightningCLI in subclass mode: configs choose model, data, optimizer, scheduler and callbacks by class path.

    The optimizer is an ``OptimizerCallable`` of the model, called in ``configure_optimizers``. Lightning's automatic
    optimizer would be built before FSDP2 replaces the parameters, and would then train nothing.
    """

    def __init__(self, args: Any = None, run: bool = True) -> None:
        given = sys.argv[1:] if args is None else args
        if run and isinstance(given, list) and given and given[0] in (every := self.subcommands()):
            # The parser of a command takes a third of a second: the others are not made.
            self.subcommands = lambda: {given[0]: every[given[0]]}  # type: ignore[method-assign]
        super().__init__(
            LightningModule,
            trainer_class=MuETrainer,
            subclass_mode_model=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_class=BriefParser,
            parser_kwargs={"prog": "lightning-mue", "epilog": _epilog()},
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's commands, and those of `MuETrainer`."""
        return {**LightningCLI.subcommands(), **{command: {"model", "datamodule"} for command in _ON_META}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds callbacks by name."""
        add_groups(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Reads the command line, in which ``--axis`` may be given several times, and take several values."""
        if args is None or isinstance(args, list):
            given = [str(arg) for arg in (sys.argv[1:] if args is None else args)]
            BriefParser.given, BriefParser.commands = given, [*type(self).subcommands(), *_OTHER_COMMANDS]
            check_words(given, _REPEATABLE)
            self.config = parser.parse_args(_spelled(given))
        else:
            super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        if (callbacks := with_groups(self.config[command] if command else self.config)) is not None:
            edited = {"trainer": {"callbacks": callbacks}}
            self.config = parser.parse_object({command: edited} if command else edited, self.config)

    def _parse_ckpt_path(self) -> None:
        """Looks at the values that were given, then reads the hyperparameters of a checkpoint."""
        command = self.config.get("subcommand")
        config = self.config[command] if command else self.config
        check_values(config)
        check_checkpoint(config.get("ckpt_path"))
        super()._parse_ckpt_path()

    def instantiate_classes(self) -> None:
        """Makes model, data and trainer; for the commands in ``_ON_META`` without memory for the weights."""
        check_class_paths(self.config.get(str(self.subcommand), self.config), "", typed=True)
        with torch.device("meta") if self.subcommand in _ON_META else nullcontext():
            super().instantiate_classes()
        arguments = self.config_init.get(self.subcommand) or {}
        if arguments.get("ckpt_path") == "auto":
            arguments["ckpt_path"] = resume_path(self.trainer)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes the trainer, with a ThroughputMonitor unless the config has one or asks for a barebones trainer."""
        configured = self._get(self.config_init, "trainer.callbacks") or []
        callbacks = configured if isinstance(configured, list) else [configured]
        if (count := sum(isinstance(callback, MuECallback) for callback in callbacks)) > 1:
            do = "Remove all but one; --mue.KEY VALUE changes an argument of the config's."
            raise value_error("trainer.callbacks", found=f"{count} MuECallbacks", expected="one", do=do)
        has_one = any(isinstance(callback, ThroughputMonitor) for callback in callbacks)
        if not has_one and not self._get(self.config_init, "trainer.barebones"):
            self.trainer_defaults = {"callbacks": [ThroughputMonitor()]}
        if self._get(self.config_init, "ckpt_path") == "auto":
            # The same command again meets the configuration that it saved. Without a logger, it is saved where users keep theirs.
            name = {} if self._get(self.config_init, "trainer.logger") else {"config_filename": "saved_config.yaml"}
            self.save_config_kwargs = {**self.save_config_kwargs, "overwrite": True, **name}
        trainer = super().instantiate_trainer(**kwargs)
        before_loading(trainer, refuse_code)
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """A configuration may name any checkpoint, also at a URL, so only plain data is read from it."""
        arguments = super()._prepare_subcommand_kwargs(subcommand)
        if "weights_only" in self._subcommand_method_arguments[subcommand]:
            if arguments.get("weights_only") is False:
                do = "A checkpoint with other objects runs their code: load it in Python, by Trainer.fit(..., weights_only=False)."
                raise value_error("weights_only", found=False, expected="true (or null)", do=do)
            arguments["weights_only"] = True
        return arguments

    def after_fit(self) -> None:
        """Prints a summary after a training, except in a trial of a sweep, which has no reader."""
        is_trial = any(isinstance(callback, TrialReport) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        if self.trainer.is_global_zero and not (is_trial or self.trainer.fast_dev_run):  # type: ignore[attr-defined]
            summarize(self.trainer, self.model, self.datamodule)


def _epilog() -> str:
    return "\n".join(f"lightning-mue {name} {does}" for name, (_, does) in _OTHER_COMMANDS.items())


def _spelled(args: Iterable[Any]) -> list[str]:
    """Arguments as the parser knows them; one --axis may have several, as in `sweep`.

    Example:
        >>> _spelled(["--axis=width=64,128", "n_heads=2,4"])
        ['--axis+=width=64,128', '--axis+', 'n_heads=2,4']
    """
    spelled: list[str] = []
    axes = -1  # values of the last option so far, if that is --axis
    for arg in map(str, args):
        if arg.startswith("-"):
            name, equals, value = arg.partition("=")
            spelled.append(f"{_SPELLINGS.get(name, name)}{equals}{value}")
            axes = len(equals) if name == "--axis" else -1
        else:
            spelled += ["--axis+", arg] if axes > 0 else [arg]
            axes += axes >= 0
    return spelled


def _see_current_folder() -> None:
    """Lets a config name classes in files of the current folder, as ``python -m`` does; what is installed comes first."""
    folder = os.getcwd()
    if not (getattr(sys.flags, "safe_path", False) or {"", folder} & set(sys.path)):
        sys.path.append(folder)


def main(args: list[str] | None = None) -> None:
    """Entry point of ``lightning-mue``.

    An error in the input is printed in one paragraph, without a traceback; set LIGHTNING_MUE_TRACEBACK=1 to see it.
    """
    given = sys.argv[1:] if args is None else args
    _see_current_folder()
    try:
        check_environment()
        if given and given[0] in _OTHER_COMMANDS:
            _OTHER_COMMANDS[given[0]][0](given[1:])
        else:
            MuECLI(args)
    except SIGTERMException:  # its status is 0, which a scheduler reads as success
        raise SystemExit(TERMINATED) from None
    except KINDS as error:
        message = message_of(error)
        if message is None or os.environ.get("LIGHTNING_MUE_TRACEBACK"):
            raise
        print(f"lightning-mue: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
