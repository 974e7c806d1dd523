"""Starts trials from a process that has imported everything already, which saves the larger part of a small trial's time."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import yaml

from lightning_mue.analysis.sweep.config import Config
from lightning_mue.analysis.sweep.runner import CONFIG, LOG, TrialProcess, as_trial

_IMPORTED = ("cli.lightning_cli", "callbacks.trial_report", "data", "models", "moe", "optim")


class WarmRunner:
    """A `Runner` for trials of lightning-mue itself.

    Args:
        metric: Logged quantity that is the result.
        threads: Threads of each process.
        devices: Visible GPUs that are shared out over the slots, one each; empty leaves them as they are.
    """

    def __init__(self, metric: str, threads: int, devices: Sequence[str] = ()) -> None:
        self.metric, self.devices = metric, devices
        os.environ["OMP_NUM_THREADS"] = str(
            threads
        )  # read when torch is imported, in the process that the others come from
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([f"lightning_mue.{name}" for name in _IMPORTED])

    def start(self, config: Config, folder: Path, slot: int) -> TrialProcess:
        """Writes the config and starts the process; what it prints goes to ``log.txt``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(yaml.safe_dump(as_trial(config, folder, self.metric), sort_keys=False))
        device = self.devices[slot % len(self.devices)] if self.devices else None
        process = self._context.Process(target=_train, args=(folder, device), daemon=True)
        process.start()
        return TrialProcess(_Handle(process), folder)  # type: ignore[arg-type]


class _Handle:
    """What `TrialProcess` needs of a process, under the names of subprocess.Popen."""

    stdin = None

    def __init__(self, process: BaseProcess) -> None:
        self._process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> None:
        self._process.kill()
        self._process.join()


def _train(folder: Path, device: str | None) -> None:
    """Trains in a group of processes of its own, until the end or that of the process that asked for it."""
    import controls  # noqa: F401 - registers rules

    from lightning_mue.cli.lightning_cli import main

    os.setsid()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    main(["fit", "--config", str(folder / CONFIG)])


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
