"""What the monitors cost: optimizer steps of the quickstart with and without them, in one run.

Trainer, model, batch and callbacks are those of configs/quickstart.yaml. In each round every kind of step comes once, in an order
of its own: without monitors, with all, with all but HealthMonitor, and with each one alone. A step is measured from before the
first callback sees its batch until the last one has. What a sample every 50th step costs is computed from that of a sampled step
and from the time inside of the monitors' hooks in a step without a sample. Host synchronizations are counted where a GPU would
wait: a value read by the host, a tensor copied to it or made from numbers of its.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
import warnings

import torch
from common import Claim, parse, result_name, save
from guard import model
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_mue import (
    ActivationOutlierMonitor,
    HealthMonitor,
    LogitsZMonitor,
    MuECallback,
    RouterMonitor,
    UpdateMonitor,
)
from lightning_mue.callbacks import metric_stream

_MONITORS = (LogitsZMonitor, ActivationOutlierMonitor, RouterMonitor, UpdateMonitor)
_ALL, _NO_JUDGE, _NONE = "all monitors", "all but HealthMonitor", "no monitor"
_KINDS = (_NONE, _ALL, _NO_JUDGE, *(cls.__name__ for cls in _MONITORS))
_HOOKS = ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end")


class Schedule:
    """Which kind of step comes when, and what was measured of it."""

    def __init__(self, rounds: int) -> None:
        order = random.Random(0)
        self.kinds = [kind for _ in range(rounds) for kind in order.sample(_KINDS, len(_KINDS))]
        self.kind = _NONE
        self.seconds: dict[str, list[float]] = {kind: [] for kind in _KINDS}
        self.inside: dict[str, list[float]] = {kind: [] for kind in _KINDS}  # of the hooks
        self.waits: dict[str, list[int]] = {kind: [] for kind in _KINDS}
        self.gathers: dict[str, list[int]] = {kind: [] for kind in _KINDS}
        self.start = self.entered = self.hooks = 0.0

    def samples(self, monitor: object) -> bool:
        """Whether a monitor samples this step."""
        return self.kind in (_ALL, _NO_JUDGE, type(monitor).__name__)


class First(Callback):
    """Before all monitors."""

    def __init__(self, schedule: Schedule) -> None:
        self.of = schedule

    def on_train_batch_start(self, trainer, *_):
        """A step begins."""
        self.of.kind = self.of.kinds[trainer.global_step]
        self.of.hooks, self.of.start = 0.0, time.perf_counter()
        self.of.entered = self.of.start

    def on_before_optimizer_step(self, *_):
        """The hooks begin."""
        self.of.entered = time.perf_counter()

    on_train_batch_end = on_before_optimizer_step


class Last(Callback):
    """Behind all monitors."""

    def __init__(self, schedule: Schedule) -> None:
        self.of = schedule

    def on_train_batch_start(self, *_):
        """The hooks end."""
        self.of.hooks += time.perf_counter() - self.of.entered

    on_before_optimizer_step = on_train_batch_start

    def on_train_batch_end(self, *_):
        """A step ends."""
        now = time.perf_counter()
        self.of.seconds[self.of.kind].append(now - self.of.start)
        self.of.inside[self.of.kind].append(self.of.hooks + now - self.of.entered)


class Waits(TorchFunctionMode):
    """Counts host synchronizations; after the collective all that is read has been copied to the host already."""

    reads = (Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.numpy)

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def reset(self) -> None:
        """Before a step."""
        self.count = self.gathered = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """One call."""
        kwargs = kwargs or {}
        copied = func is Tensor.cpu or (func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None)
        self.count += copied or (func in (*self.reads, Tensor.new_tensor) and not self.gathered)
        return func(*args, **kwargs)


class Counter(Callback):
    """Counts host synchronizations and collectives of each batch; it must stand first, and be told of the end by `End`."""

    def __init__(self, schedule: Schedule) -> None:
        self.of, self.mode = schedule, Waits()

    def on_train_start(self, trainer, *_):
        """Stands in the strategy's collective."""
        gather = trainer.strategy.all_gather

        def counted(*args, **kwargs):
            self.mode.gathered += 1
            return gather(*args, **kwargs)

        trainer.strategy.all_gather = counted

    def on_train_batch_start(self, *_):
        """Counts from here."""
        self.mode.reset()
        self.mode.__enter__()


class End(Callback):
    """Ends the count."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter

    def on_train_batch_end(self, *_):
        """Notes it."""
        self.counter.mode.__exit__(None, None, None)
        self.counter.of.waits[self.counter.of.kind].append(self.counter.mode.count)
        self.counter.of.gathers[self.counter.of.kind].append(self.counter.mode.gathered)


def fit(rounds: int, batch_size: int, *, count: bool = False) -> Schedule:
    """Runs so many rounds."""
    torch.manual_seed(0)
    schedule = Schedule(rounds)
    monitors = [cls(every_n_steps=1) for cls in _MONITORS]
    for monitor in monitors:
        monitor._samples = lambda *_, monitor=monitor: schedule.samples(monitor)
    tell = metric_stream.tell
    metric_stream.tell = lambda *args: tell(*args) if schedule.kind == _ALL else None
    counter = Counter(schedule)
    around = ([counter], [End(counter)]) if count else ([], [])
    base = {"width": 64, "depth": 2, "n_heads": 2, "n_experts": 0}
    tokens = [torch.randint(0, 256, (batch_size, 257)) for _ in schedule.kinds]
    batches = [{"tokens": t[:, :-1].contiguous(), "targets": t[:, 1:].contiguous()} for t in tokens]
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=len(batches),
            log_every_n_steps=10,
            callbacks=[
                MuECallback(rule="hyperp", base=base),
                First(schedule),
                *around[0],
                *monitors,
                HealthMonitor(),
                *around[1],
                Last(schedule),
            ],
            logger=TensorBoardLogger(folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model(), torch.utils.data.DataLoader(batches, batch_size=None))
    metric_stream.tell = tell
    return schedule


def measure(rounds: int, batch_size: int) -> list[dict[str, object]]:
    """Medians over rounds; the first rounds pay for warm-up."""
    timed, counted = fit(rounds + 2, batch_size), fit(3, 2, count=True)
    plain = timed.seconds[_NONE][2:]
    rows = []
    for kind in _KINDS:
        seconds, inside = timed.seconds[kind][2:], timed.inside[kind][2:]
        extra = statistics.median(a - b for a, b in zip(seconds, plain, strict=True))
        rows.append(
            {
                "part": "step",
                "what": f"quickstart, {batch_size} x 256 tokens a step: {kind}",
                "ms": 1e3 * statistics.median(seconds),
                "of a step without": statistics.median(a / b for a, b in zip(seconds, plain, strict=True)),
                "extra ms": 1e3 * extra,
                "ms in hooks": 1e3 * statistics.median(inside),
                # The last round, when all that is done once has been done.
                "host waits": counted.waits[kind][-1] - counted.waits[_NONE][-1],
                "collectives": counted.gathers[kind][-1] - counted.gathers[_NONE][-1],
            }
        )
    return rows


def claims(rows: list[dict[str, object]]) -> list[Claim]:
    """Sampled at every step, at every 50th, and between samples."""
    by_kind = {str(row["what"]).split(": ")[-1]: row for row in rows}

    def figure(kind: str, column: str) -> float:
        return float(str(by_kind[kind][column]))

    plain, off = figure(_NONE, "ms"), figure(_NONE, "ms in hooks")
    return [
        Claim("step with all monitors at every step / without", "at most", 1.2, figure(_ALL, "of a step without")),
        Claim(
            "the same at every 50th step",
            "at most",
            1.02,
            1 + (figure(_ALL, "extra ms") / 50 + off) / plain,
        ),
        Claim("time in hooks of a step without a sample / step", "at most", 0.001, off / plain),
        Claim("host synchronizations of a sampled step", "at most", 8, figure(_ALL, "host waits")),
        Claim("collectives of a sampled step", "at most", 1, figure(_ALL, "collectives")),
    ]


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parse(parser)
    warnings.simplefilter("ignore")
    save(result_name("monitors"), measure(args.rounds, args.batch_size), claims, part=["part"], strict=args.strict)


if __name__ == "__main__":
    main()
