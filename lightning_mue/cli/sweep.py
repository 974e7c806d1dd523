"""``lightning-mue sweep``: trains a config at several learning rates, sizes, rules and seeds."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from rich.console import Console

from lightning_mue.analysis.certificate import certify
from lightning_mue.analysis.sweep.axes import parse_axis, parse_range, parse_rates, parse_rules, parse_values
from lightning_mue.analysis.sweep.plan import SweepPlan, make_plan
from lightning_mue.analysis.trials import Trial
from lightning_mue.checks import require_positive, require_size, value_error
from lightning_mue.cli.certify import write_and_show
from lightning_mue.cli.parsing.groups import fold_groups
from lightning_mue.cli.parsing.parser import WordsParser
from lightning_mue.cli.sweep_check import check_builds
from lightning_mue.console import wide_console
from lightning_mue.files import whole_file


def sweep_command(args: Sequence[str], cli: type[LightningCLI]) -> None:
    """Reads the options, runs the sweep, and prints the best rates.

    Args:
        args: The rest of the command line.
        cli: Class that builds a model from a config.

    Raises:
        ValueError: Before the first trial, for anything that cannot be swept.
        SystemExit: With status 1 if a trial crashed, 130 or 143 if the sweep was interrupted.
    """
    if importlib.util.find_spec("optuna") is None:
        do = "Run: pip install 'lightning_mue[sweep]'"
        raise value_error("lightning-mue sweep", found="no package optuna", expected="optuna", do=do)
    options, plan = read_plan(args)
    if not plan.command:
        check_builds(plan, cli)
    signal.signal(signal.SIGTERM, lambda *_: _exit(143))
    try:
        _run(options, plan)
    except KeyboardInterrupt:
        _exit(130)


def read_options(args: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of a sweep in a command line, and the rest, which is the training command's."""
    return _parser().parse_known_args(args)


def read_plan(args: Sequence[str]) -> tuple[argparse.Namespace, SweepPlan]:
    """The options of a command line, and the plan that they make.

    Raises:
        ValueError: For anything that cannot be swept.
    """
    options, overrides = read_options(args)
    configs = [part for path in options.config for part in ("--config", path)]
    command = tuple(shlex.split(options.command))
    return options, _plan(options, command, resolve_config(command, [*configs, *overrides]))


def resolve_config(command: Sequence[str], given: Sequence[str]) -> dict[str, Any]:
    """The configuration that a command makes of its arguments, defaults included.

    Raises:
        ValueError: If the command refuses them.
    """
    from lightning_mue.analysis.sweep.runner import OWN_COMMAND

    called = [*(command or OWN_COMMAND), *given, "--print_config"]
    done = subprocess.run(called, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    # What else the command prints stands before LightningCLI's header.
    printed = re.split(r"^# (?:lightning\.pytorch|pytorch_lightning)==.*$", done.stdout, flags=re.MULTILINE)[-1]
    try:
        config = yaml.safe_load(printed) if done.returncode == 0 else None
    except yaml.YAMLError:
        config = None
    if not isinstance(config, dict) or "trainer" not in config or "model" not in config:
        told = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-4:])
        do = f"Try: {shlex.join(called)}"
        found = f"status {done.returncode} and {told!r}" if told else f"status {done.returncode} and no config"
        expected = "a command and a config of LightningCLI, such as `lightning-mue fit` takes"
        raise value_error("--config", found=found, expected=expected, do=do)
    return config if command else fold_groups(config)


def _plan(options: argparse.Namespace, command: tuple[str, ...], config: dict[str, Any]) -> SweepPlan:
    require_positive(**{"--seeds": options.seeds, "--trials": options.trials})
    require_size(**{"--extend": options.extend})
    return make_plan(
        config,
        command=command,
        metric=options.metric,
        lr_key=options.lr_key,
        rates=None if options.lr is None else parse_rates(options.lr),
        axes=tuple(parse_axis(parts) for parts in options.axis),
        rules=() if options.rules is None else parse_rules(options.rules),
        settings=_by_key("--set", (parse_values("--set", text) for text in options.set)),
        search=_by_key("--search", (parse_range("--search", text) for text in options.search)),
        seeds=options.seeds,
        extend=options.extend,
        samples=options.trials,
    )


def _by_key(option: str, pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise value_error(option, found=f"{key} in two options", expected="each key once")
        found[key] = value
    return found


def _run(options: argparse.Namespace, plan: SweepPlan) -> None:
    import optuna

    from lightning_mue.analysis.sweep.loop import Sweep
    from lightning_mue.analysis.sweep.progress import ConsoleWatcher, best_rates
    from lightning_mue.analysis.sweep.runner import OWN_COMMAND, ProcessRunner
    from lightning_mue.analysis.sweep.storage import SweepStorage, to_trials

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    output = Path(options.output).resolve()
    _claim_folder(output, plan)
    storage = SweepStorage(options.storage or str(output / "journal.log"), options.name, plan)
    jobs, threads, devices = resources(plan.config, options.jobs)
    runner = ProcessRunner(plan.command or OWN_COMMAND, plan.metric, threads, devices)
    with ConsoleWatcher(Console(), jobs) as watcher:
        entries = Sweep(storage, runner, output, jobs, watcher).run()
    console = wide_console()
    console.print(best_rates(plan, entries))
    trials = to_trials(entries)
    console.print(f"{len(trials)} trials: {output / 'trials.csv'}", markup=False, soft_wrap=True)
    if crashed := sum(e.state == "crashed" for e in entries):
        print(f"{crashed} trials crashed; the same command runs them again")
        raise SystemExit(1)
    _certify(plan, trials, output)


def _certify(plan: SweepPlan, trials: Sequence[Trial], output: Path) -> None:
    """Writes and shows the certificate of a sweep over sizes; the first value of each axis is the base."""
    if not any(len(axis.points) > 1 for axis in plan.axes):
        return
    try:
        certificate = certify(trials, {axis.names[0]: axis.points[0][0] for axis in plan.axes})
    except (ValueError, ModuleNotFoundError) as error:
        print(f"no certificate: {error}")
        return
    write_and_show(certificate, output)


def _claim_folder(output: Path, plan: SweepPlan) -> None:
    """Writes the plan into the output folder, which must not be another sweep's."""
    from lightning_mue.analysis.sweep.storage import refuse_other

    record = output / "sweep.json"
    if record.exists():
        do = "Give another --output, or the options of that sweep to continue it."
        refuse_other(f"--output {output}", json.loads(record.read_text(encoding="utf-8")), plan.to_dict(), do=do)
        return
    with whole_file(record) as temporary:
        temporary.write_text(json.dumps(plan.to_dict(), indent=1), encoding="utf-8")


def resources(config: dict[str, Any], jobs: int | None) -> tuple[int, int, list[str]]:
    """(trials at once, threads of each, devices to share out one to a trial; none where they are left alone).

    Raises:
        ValueError: If ``jobs`` is not a positive integer.
    """
    if jobs is not None:
        require_positive(**{"--jobs": jobs})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    trainer, devices = config["trainer"], []
    if trainer.get("accelerator") != "cpu" and torch.cuda.is_available():
        if trainer.get("devices") not in ("auto", None, 1, "1"):
            jobs = jobs or 1  # a trial uses several devices
        else:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    jobs = jobs or len(devices) or cores
    return jobs, max(1, cores // jobs), devices


def _exit(status: int) -> None:
    print("interrupted: the same command continues the sweep", flush=True)
    raise SystemExit(status)


#: Options that may be given several times; name -> placeholder, help.
_REPEATABLE = {
    "--config": ("FILE", "as of `lightning-mue fit`"),
    "--set": ("KEY=V,V,...", "values of another key, crossed with the sizes"),
    "--search": ("KEY=log:LOW:HIGH", "a key to search by TPE; also lin:LOW:HIGH and int:LOW:HIGH"),
}
#: Name -> default, placeholder, help.
_OPTIONS: dict[str, tuple[Any, str, str]] = {
    "--rules": (None, "RULE,...", "rules of MuECallback, e.g. sp,mup,complete-mue; none removes it"),
    "--lr": (None, "V,V,...", "rates, or log:LOW:HIGH to search (default: five around the config's, a factor 2 apart)"),
    "--lr-key": (None, "KEY", "the config's key of the learning rate, if it is not found"),
    "--trials": (20, "N", "points of a search in each cell"),
    "--seeds": (1, "N", "seeds of each point"),
    "--extend": (4, "N", "points by which a cell's grid may grow until its best is interior"),
    "--metric": ("val/loss", "NAME", "logged quantity to minimize"),
    "--jobs": (None, "N", "trials at once (default: one for each core, or for each GPU)"),
    "--output": ("sweep", "FOLDER", "for the trials and their table"),
    "--storage": (None, "URL", "database that several machines share (default: a journal in the output folder)"),
    "--name": ("sweep", "NAME", "name of the sweep in the storage"),
    "--command": ("", "CMD", "your own LightningCLI, e.g. 'python train.py fit'"),
}
_AXIS = (
    "sizes: an argument of the module, a key of the config, tokens or batch_tokens; several in one --axis vary together, "
    "several --axis are crossed"
)


def _parser() -> argparse.ArgumentParser:
    parser = WordsParser(
        "sweep",
        description=__doc__,
        epilog="Other options go to the training command, as in `lightning-mue fit`, e.g. --trainer.max_steps 200.",
    )
    parser.add_argument("--axis", action="append", nargs="+", default=[], metavar="NAME=V,V,...", help=_AXIS)
    for name, (value, meaning) in _REPEATABLE.items():
        parser.add_argument(name, action="append", default=[], metavar=value, help=f"{meaning}; repeatable")
    for name, (default, value, meaning) in _OPTIONS.items():
        of = int if value == "N" else str
        shown = "" if default in (None, "") else f" (default: {default})"
        parser.add_argument(name, type=of, default=default, metavar=value, help=meaning + shown)
    return parser
