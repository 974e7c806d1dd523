"""The sweep itself: takes runs from the storage, trains as many at once as there are slots, and stops those that diverge."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Protocol

from lightning_mue.analysis.sweep.curve import Curve, wanted_points
from lightning_mue.analysis.sweep.plan import Job, Point, SweepPlan
from lightning_mue.analysis.sweep.runner import Progress, Runner, Running
from lightning_mue.analysis.sweep.search import sample
from lightning_mue.analysis.sweep.storage import Entry, Outcome, SweepStorage, to_trials
from lightning_mue.analysis.trials import write_trials
from lightning_mue.checks import value_error

#: A run is held against the others from this twentieth on.
_JUDGED = 5
#: Seconds between looks at the own trials, and at the storage when nothing has happened.
_LOOK, _READ = 0.2, 2.0
#: So many runs that crash, before one is finished, end the sweep.
_CRASHES = 3


class Watcher(Protocol):
    """Shows a sweep to someone."""

    def started(self, job: Job) -> None:
        """A run was started here."""

    def ended(self, job: Job, outcome: Outcome, folder: Path) -> None:
        """A run that was started here has ended."""

    def state(self, entries: Sequence[Entry], missing: int, parts: Sequence[float]) -> None:
        """All runs in the storage, how many are missing as far as is known, and how far those that run here are."""


@dataclass
class _Active:
    job: Job
    trial_id: int
    running: Running
    folder: Path
    slot: int
    told: Progress | None = None


class Sweep:
    """Trains what a plan lacks in its storage, until nothing is missing and no other process has anything to finish.

    Args:
        storage: The storage, with the plan.
        runner: What starts a run.
        folder: Folder for ``trials.csv`` and the trials' folders.
        jobs: Runs at once.
        watcher: What shows the progress.
    """

    def __init__(self, storage: SweepStorage, runner: Runner, folder: Path, jobs: int, watcher: Watcher) -> None:
        self.storage, self.plan, self.runner = storage, storage.plan, runner
        self.folder, self.jobs, self.watcher = folder, jobs, watcher
        self._active: list[_Active] = []
        self._written = -1
        #: Crashes of earlier calls, which are tried again.
        self._forgiven = {e.id for e in storage.entries() if e.state == "crashed"}

    def run(self) -> list[Entry]:
        """Runs the sweep, and returns all its runs.

        If it is interrupted, the runs that it has begun are stopped and given back.
        """
        try:
            while True:
                self.storage.beat()
                entries = self._entries()
                self._drop_lost(entries)
                self._refuse_crashes(entries)
                while len(self._active) < self.jobs and (job := next(missing_jobs(self.plan, entries), None)):
                    self._start(job)
                    entries = self._entries()
                self._show(entries)
                busy = any(e.state == "running" for e in entries)
                if not busy and next(missing_jobs(self.plan, entries), None) is None:
                    return entries
                self._watch(entries, time.monotonic() + _READ)
        finally:
            for active in self._active:
                active.running.stop()
                self.storage.give_up(active.trial_id)

    def _entries(self) -> list[Entry]:
        return [e for e in self.storage.entries() if e.id not in self._forgiven]

    def _start(self, job: Job) -> None:
        if (trial_id := self.storage.take(job)) is None:
            return
        slot = min(set(range(self.jobs)) - {active.slot for active in self._active})
        # The id makes the folder that of this try: a run that was given up may not be quite dead yet.
        folder = self.folder / "trials" / f"{re.sub(r'[^A-Za-z0-9=.+-]+', '_', str(job))}-{trial_id}"
        try:
            running = self.runner.start(self.plan.config_of(job), folder, slot)
        except BaseException:
            self.storage.give_up(trial_id)
            raise
        self._active.append(_Active(job, trial_id, running, folder, slot))
        self.watcher.started(job)

    def _drop_lost(self, entries: Sequence[Entry]) -> None:
        """Stops the runs that another process took over, because this one was asleep for long."""
        own = {e.id for e in entries}
        for active in [a for a in self._active if a.trial_id not in own]:
            active.running.stop()
            self._active.remove(active)

    def _watch(self, entries: Sequence[Entry], until: float) -> None:
        """Looks at the own runs until one ends or it is time to read the storage again."""
        ended = False
        while not ended and time.monotonic() < until:
            for active in list(self._active):
                outcome = active.running.outcome()
                if outcome is None and self._has_diverged(active, entries):
                    active.running.stop()
                    outcome = Outcome(math.inf)
                if outcome is not None:
                    self._active.remove(active)
                    if self.storage.finish(active.trial_id, outcome):
                        self.watcher.ended(active.job, outcome, active.folder)
                    ended = True
            time.sleep(0 if ended else _LOOK)

    def _has_diverged(self, active: _Active, entries: Sequence[Entry]) -> bool:
        told = active.running.progress()
        if told is None or told == active.told:
            return False
        active.told = told
        if math.isinf(told.loss):
            return True
        twentieth = int(told.part * 20)
        self.storage.note(active.trial_id, twentieth, told.loss)
        others = [e for e in entries if e.job.cell == active.job.cell and e.id != active.trial_id]
        return is_far_above(told.loss, twentieth, others)

    def _refuse_crashes(self, entries: Sequence[Entry]) -> None:
        """Ends a sweep in which nothing works."""
        crashed = [e for e in entries if e.state == "crashed"]
        if len(crashed) >= _CRASHES and not any(e.state == "finished" for e in entries):
            found, do = f"{len(crashed)} that crashed, the last with {crashed[-1].outcome.error!r}", "See their logs."
            raise value_error("trials", found=found, expected="runs that train", do=do)

    def _show(self, entries: Sequence[Entry]) -> None:
        """Writes the table of trials if there are new ones, and tells the watcher."""
        trials = to_trials(entries)
        if len(trials) != self._written:
            write_trials(self.folder / "trials.csv", trials)
            self._written = len(trials)
        if self.plan.search:
            missing = len(self.plan.cells()) * self.plan.samples * self.plan.seeds - len(entries)
        else:
            missing = sum(1 for _ in missing_jobs(self.plan, entries))
        self.watcher.state(entries, missing, [a.told.part if a.told else 0.0 for a in self._active])


def is_far_above(loss: float, twentieth: int, others: Sequence[Entry]) -> bool:
    """Whether a run has diverged, by the training losses of other runs of its cell after as many twentieths.

    That is so from a quarter of the run on, if its loss is as far above the start as the best other one's is below it, and as far
    as losses move within a run, which is mostly noise in runs that hardly learn. The start is the median of the first losses
    noted. No unit of loss and no zero of it is assumed.
    """
    starts = [e.early[min(e.early)] for e in others if e.early]
    now = [e.early[twentieth] for e in others if twentieth in e.early]
    if twentieth < _JUDGED or not now:
        return False
    start, best = median(starts), min(now)
    moves = median(max(e.early.values()) - min(e.early.values()) for e in others if e.early)
    return best < start and loss > start + max(start - best, moves)


def missing_jobs(plan: SweepPlan, entries: Sequence[Entry]) -> Iterator[Job]:
    """The runs that nobody has finished or runs, as far as is known now: an extension is known once a grid is finished.

    Of a search one sample at a time is known.
    """
    by_cell: dict[str, list[Entry]] = {}
    for entry in entries:
        by_cell.setdefault(str(entry.job.cell), []).append(entry)
    for cell in plan.cells():
        of_cell = by_cell.get(str(cell), [])
        there = {(e.job.point, e.job.seed) for e in of_cell}
        curve = curve_of(plan, of_cell)
        points = list(curve) if plan.search else wanted_points(plan, curve)
        lacking = [Job(cell, p, seed) for seed in range(plan.seeds) for p in points if (p, seed) not in there]
        yield from lacking
        if plan.search and len(curve) < plan.samples and not lacking:
            yield Job(cell, sample(plan, curve), 0)


def curve_of(plan: SweepPlan, of_cell: Sequence[Entry]) -> Curve:
    """Point -> mean loss of a cell, over the runs of its seeds; of several tries of a run the last counts."""
    losses: dict[Point, dict[int, float | None]] = {}
    for entry in of_cell:
        loss = None if entry.state == "running" else entry.outcome.loss
        losses.setdefault(entry.job.point, {})[entry.job.seed] = loss
    curve: dict[Point, float | None] = {}
    for point, by_seed in losses.items():
        known = [loss for loss in by_seed.values() if loss is not None]
        curve[point] = sum(known) / plan.seeds if len(known) == plan.seeds else None
    return curve
