"""Trials as processes: the configuration that makes a run a trial, its folder, and what it tells while it runs."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml

from lightning_mue.analysis.sweep.config import Config
from lightning_mue.analysis.sweep.storage import Outcome
from lightning_mue.files import TRIAL_PROGRESS, TRIAL_RESULT, TRIAL_WATCHED, whole_file

#: lightning-mue itself, with the interpreter of this process.
OWN_COMMAND = (sys.executable, "-m", "lightning_mue.cli.lightning_cli", "fit")
#: Files of a trial's folder; LightningCLI itself writes a config.yaml.
CONFIG, LOG = "trial.yaml", "log.txt"
#: Callbacks that need what a trial has not: checkpoints of every trial, and a terminal.
_LEFT_OUT = ("Checkpoint", "ProgressBar")


class Progress(NamedTuple):
    """How far a run is, in [0, 1], and its mean training loss since the report before; inf if no loss was finite."""

    part: float
    loss: float


class Running(Protocol):
    """A run that was started."""

    def progress(self) -> Progress | None:
        """What it told last."""

    def outcome(self) -> Outcome | None:
        """How it ended; None while it runs."""

    def stop(self) -> None:
        """Ends it now."""


class Runner(Protocol):
    """Starts runs."""

    def start(self, config: Config, folder: Path, slot: int) -> Running:
        """Starts a run in one of the slots for parallel runs."""


@dataclass(frozen=True)
class ProcessRunner:
    """Starts each trial as a process of its own.

    Args:
        command: What trains, without a config, e.g. `OWN_COMMAND`.
        metric: Logged quantity that is the result.
        threads: Threads of each process.
        devices: Visible devices that are shared out over the slots, one each; empty leaves them as they are.
    """

    command: Sequence[str]
    metric: str
    threads: int
    devices: Sequence[str] = ()

    def start(self, config: Config, folder: Path, slot: int) -> Running:
        """Writes the config and starts the process; what it prints goes to ``log.txt``."""
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / CONFIG) as temporary:
            temporary.write_text(
                yaml.safe_dump(as_trial(config, folder, self.metric), sort_keys=False), encoding="utf-8"
            )
        environment = {**os.environ, TRIAL_WATCHED: "1", "PYTHONUNBUFFERED": "1"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        if self.devices:
            environment["CUDA_VISIBLE_DEVICES"] = self.devices[slot % len(self.devices)]
        with (folder / LOG).open("w") as log:
            process = subprocess.Popen(
                [*self.command, "--config", str(folder / CONFIG)],
                stdin=subprocess.PIPE,  # held open: it ends when this process dies, however it dies
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        return TrialProcess(process, folder)


class TrialProcess:
    """A trial's process and its folder."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self._process, self._folder, self._since = process, folder, time.monotonic()

    def progress(self) -> Progress | None:
        """What the process told last; None before its first report."""
        told = _read(self._folder / TRIAL_PROGRESS)
        return None if told is None else Progress(told["part"], _number(told["loss"]))

    def outcome(self) -> Outcome | None:
        """How it ended; None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        self._close()
        seconds, told = time.monotonic() - self._since, _read(self._folder / TRIAL_RESULT)
        if status != 0 or told is None:
            why = f"status {status}" if status else "no result: TrialReport did not run"
            return Outcome(math.nan, error=f"{why}: {last_lines(self._folder / LOG, 1)[:300]}", seconds=seconds)
        tokens, compute = (math.nan if told[name] is None else told[name] for name in ("tokens", "compute"))
        return Outcome(_number(told["loss"]), tokens=tokens, compute=compute, seconds=seconds)

    def stop(self) -> None:
        """Ends the process and those that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close()

    def _close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()


def as_trial(config: Config, folder: Path, metric: str) -> Config:
    """A copy of a configuration that writes into a folder only: no checkpoints, no bar, its metrics in ``metrics.csv``."""
    new = copy.deepcopy(config)
    trainer = new["trainer"]
    given = trainer.get("callbacks") or []
    kept = [c for c in (given if isinstance(given, list) else [given]) if not c["class_path"].endswith(_LEFT_OUT)]
    report = {
        "class_path": "lightning_mue.callbacks.trial_report.TrialReport",
        "init_args": {"folder": str(folder), "metric": metric},
    }
    logger = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": str(folder), "name": "", "version": ""},
    }
    trainer |= {"callbacks": [*kept, report], "logger": logger, "default_root_dir": str(folder)}
    trainer |= {"enable_checkpointing": False, "enable_progress_bar": False}
    return new


def last_lines(path: Path, count: int) -> str:
    """The last lines of a text that say something; empty if there is none."""
    with contextlib.suppress(OSError):
        lines = [
            line.rstrip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        return "\n".join(lines[-count:])
    return ""


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError):
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    return None


def _number(loss: float | None) -> float:
    return math.inf if loss is None else float(loss)
