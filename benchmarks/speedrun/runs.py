"""Final losses of runs, kept in a file, so that a measurement that was stopped goes on and none is done twice."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from entries import Entry
from task import Task, train

#: Multiples of an entry's rates that the transfer columns compare.
FACTORS = (0.5, 1.0, 2.0)


def rated(entry: Entry, factor: float) -> Entry:
    """The entry with all of its rates multiplied."""
    keys = [
        f"optimizer.init_args.{key}" for key in ("lr", "adamw_lr") if key in entry.settings["optimizer"]["init_args"]
    ]
    return entry.changed({key: entry.value(key) * factor for key in keys})


def key_of(task: Task, entry: Entry, what: dict[str, Any]) -> str:
    """A hash of all that a run's loss depends on, and of how the run is called."""
    sizes = {"base": task.base, "sizes": task.sizes(what["column"])}
    data = {"context": task.context, "batch": task.batch, "val_batches": task.val_batches}
    of = {**sizes, **data, "settings": entry.settings, **what}
    return hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]


class NotRun(Exception):
    """A run that the file does not have."""


class Runs:
    """Runs of a task.

    Args:
        task: What is trained.
        path: File of one JSON object a line, appended to.
        trains: Whether runs that the file does not have are trained; otherwise they raise `NotRun`.
    """

    def __init__(self, task: Task, path: Path, trains: bool = True) -> None:
        self.task, self.path, self.trains = task, path, trains
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.found = {row["key"]: row for row in map(json.loads, lines)}

    def loss(self, entry: Entry, column: str, steps: int, seed: int, rule: str = "sp", factor: float = 1.0) -> float:
        """Validation loss of one run, in nats per byte; trained now unless the file has it."""
        what: dict[str, Any] = {"entry": entry.name, "column": column, "steps": steps, "seed": seed}
        what |= {"rule": rule, "factor": factor}
        key = key_of(self.task, entry, what)
        if key not in self.found:
            if not self.trains:
                raise NotRun(what)
            start = time.perf_counter()
            loss = train(self.task, rated(entry, factor), column, steps, seed, rule)
            row = {"key": key, **what, "loss": loss, "seconds": round(time.perf_counter() - start, 1)}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(*(f"{name} {value}" for name, value in row.items() if name != "key"), flush=True)
            self.found[key] = row
        return self.found[key]["loss"]

    def losses(self, entry: Entry, column: str, steps: int, seeds: int, **how: Any) -> dict[int, float]:
        """Loss by seed, of seeds 0 to `seeds - 1`."""
        return {seed: self.loss(entry, column, steps, seed, **how) for seed in range(seeds)}
