"""Sweeps without training: a config, a runner whose runs end at once with a known loss, and a watcher that remembers."""

from __future__ import annotations

import copy
import math

from lightning_mue.analysis.sweep.axes import Axis
from lightning_mue.analysis.sweep.plan import make_plan
from lightning_mue.analysis.sweep.storage import Outcome

CONFIG = {
    "seed_everything": 0,
    "trainer": {"callbacks": None, "max_steps": 100, "accumulate_grad_batches": 1, "devices": "auto", "num_nodes": 1},
    "model": {
        "class_path": "mine.Model",
        "init_args": {
            "width": 64,
            "gate": "linear",
            "context_length": 32,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1}},
        },
    },
    "data": {"class_path": "mine.Data", "init_args": {"batch_size": 4, "seed": 7}},
}
LR = "model.init_args.optimizer.init_args.lr"


def axis(**values):
    names = tuple(values)
    return Axis(names, tuple(zip(*values.values(), strict=True)))


def plan(config=CONFIG, **options):
    given = {"rates": None, "lr_key": None, "command": (), "metric": "val/loss", **options}
    return make_plan(copy.deepcopy(config), **given)


class FakeRunner:
    """Runs of loss (log2 lr - optimum)^2; of each start it keeps (lr, seed, width)."""

    def __init__(self, optimum=-6.0, ends_after=0, stop_at=None, losses=None):
        self.optimum, self.ends_after, self.stop_at, self.losses = optimum, ends_after, stop_at, losses
        self.starts, self.stopped = [], []

    def start(self, config, folder, slot):
        arguments = config["model"]["init_args"]
        lr = arguments["optimizer"]["init_args"]["lr"]
        if self.stop_at is not None and len(self.starts) >= self.stop_at:
            raise KeyboardInterrupt
        self.starts.append((lr, config["seed_everything"], arguments["width"]))
        loss = (math.log2(lr) - self.optimum) ** 2 if self.losses is None else self.losses(*self.starts[-1])
        return FakeRun(self, self.starts[-1], loss)


class FakeRun:
    """A run that ends when it has been looked at so many times; a loss may be an `Outcome`, or a `Progress` without an end."""

    def __init__(self, runner, start, loss):
        self.runner, self.start, self.loss, self.looks = runner, start, loss, 0

    def progress(self):
        return self.loss if isinstance(self.loss, tuple) else None

    def outcome(self):
        self.looks += 1
        if self.looks <= self.runner.ends_after or isinstance(self.loss, tuple):
            return None
        return self.loss if isinstance(self.loss, Outcome) else Outcome(self.loss, seconds=1.0)

    def stop(self):
        self.runner.stopped.append(self.start)


class Watch:
    """Remembers how runs ended."""

    def __init__(self):
        self.outcomes = []

    def started(self, job):
        pass

    def ended(self, job, outcome, folder):
        self.outcomes.append((job, outcome))

    def state(self, entries, missing, parts):
        self.known = len(entries) + missing
