"""The runs of one seed: the quickstart without a fault, and one copy of it for each fault, made at the step where that begins.

A copy is a forked process, so that all runs of a seed are the same one up to the fault, and that part is trained once. Each writes
the metrics of every step as ``metrics.csv`` in a folder of its own, and ``run.json`` when it has ended. Runs on a POSIX system.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from faults import FAULTS
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger

from lightning_mue.callbacks import HealthMonitor, MuECallback, PrecisionMonitor, TokenMonitor
from lightning_mue.cli.lightning_cli import MuECLI

_CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
HEALTHY = "healthy"


@dataclass(frozen=True)
class Setting:
    """How long the runs are, and where the faults are in them.

    Attributes:
        steps: Optimizer steps.
        at: The step at which a fault begins.
        ramp: Steps over which a fault that can grow grows to its full size; 1: at once.
        context: Positions of a sequence (the quickstart has 256).
        batch: Sequences of a batch (the quickstart has 16).
    """

    steps: int = 150
    at: int = 50
    ramp: int = 50
    context: int = 128
    batch: int = 8


def name_of(fault: str) -> str:
    """A fault's name as that of a folder."""
    return "".join(c if c.isalnum() else "-" for c in fault)


def folder_of(out: Path, fault: str, seed: int) -> Path:
    """Where a run writes."""
    return out / f"seed-{seed}" / name_of(fault)


class _Forks(Callback):
    """Makes a copy of the run for each fault, at most ``jobs`` at a time; the copies go on with the fault."""

    def __init__(self, out: Path, faults: Sequence[str], seed: int, setting: Setting, jobs: int) -> None:
        self.out, self.faults, self.seed, self.setting, self.jobs = out, faults, seed, setting, jobs
        self.fault = HEALTHY
        self.only_copies = (folder_of(out, HEALTHY, seed) / "run.json").exists()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """At the step of the faults: waits until the copies have ended, then goes on as the healthy run."""
        if trainer.global_step != self.setting.at or self.fault != HEALTHY:
            return
        working: set[int] = set()
        for fault in self.faults:
            if len(working) >= self.jobs:
                working.remove(os.wait()[0])
            child = os.fork()
            if child == 0:
                self.fault = fault
                _becomes(trainer, folder_of(self.out, fault, self.seed))
                spoil = FAULTS[fault](self.setting.at, self.setting.ramp)
                trainer.callbacks = [self, spoil, *trainer.callbacks[1:]]  # type: ignore[attr-defined]  # a new list: Lightning reads the old one
                spoil.on_train_batch_start(trainer, pl_module, batch, batch_idx)
                return
            working.add(child)
        while working:
            working.remove(os.wait()[0])
        if self.only_copies:
            os._exit(0)


def _becomes(trainer: Trainer, folder: Path) -> None:
    """The metrics so far, and those that follow, go to another folder."""
    old = trainer.loggers[0]
    trainer.loggers = [new := _logger(folder)]
    new.experiment.metrics_keys = list(old.experiment.metrics_keys)  # type: ignore[attr-defined]
    shutil.copy(Path(old.log_dir) / "metrics.csv", folder)  # type: ignore[arg-type]  # an experiment begins by deleting it


def _logger(folder: Path) -> CSVLogger:
    """A logger of a folder, without what a run that did not end has left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return CSVLogger(folder, name="", version="")


def train(out: Path, seed: int, faults: Sequence[str], setting: Setting, jobs: int = 1) -> None:
    """Trains the healthy run of a seed and its copies with these faults; call it in a process of its own."""
    torch.set_num_threads(1)  # a process with threads must not fork
    forks = _Forks(out, faults, seed, setting, jobs)
    start, ended = time.perf_counter(), "ran to its end"
    cli = MuECLI(_arguments(seed, setting), run=False)
    trainer = cli.trainer
    trainer.loggers = [_logger(folder_of(out, "prefix" if forks.only_copies else HEALTHY, seed))]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, MuECallback):
            callback.seed = seed  # which draws the weights, whatever seed_everything says
    dropped = (
        HealthMonitor,
        LearningRateMonitor,
        SaveConfigCallback,
    )  # the verdict is made from the metrics afterwards, and is the same one
    kept = [c for c in trainer.callbacks if not isinstance(c, dropped)]  # type: ignore[attr-defined]
    trainer.callbacks = [forks, *kept, PrecisionMonitor(), TokenMonitor()]  # type: ignore[attr-defined]
    try:
        trainer.fit(cli.model, cli.datamodule)
    except Exception as error:  # what a fault does to a run is a result
        ended = f"{type(error).__name__}: {error}"
    trainer.loggers[0].save()
    folder = folder_of(out, forks.fault, seed)
    seconds = round(time.perf_counter() - start, 1)
    told = {"fault": forks.fault, "seed": seed, "ended": ended, "seconds": seconds, **asdict(setting)}
    (folder / "run.json").write_text(json.dumps(told, indent=1) + "\n")
    if forks.fault != HEALTHY:
        os._exit(0)  # what stands behind the call of `train` is the parent's


def _arguments(seed: int, setting: Setting) -> list[str]:
    data, model = "--data.init_args", "--model.init_args"
    return [
        "--config",
        str(_CONFIG),
        f"--seed_everything={seed}",
        f"--trainer.max_steps={setting.steps}",
        "--trainer.log_every_n_steps=1",
        "--trainer.logger=false",
        "--trainer.limit_val_batches=0",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_checkpointing=false",
        f"{data}.seed={seed}",
        f"{data}.batch_size={setting.batch}",
        f"{data}.context_length={setting.context}",
        f"{model}.context_length={setting.context}",
    ]
