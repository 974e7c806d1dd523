"""Shows a sweep: a bar with the time left in a terminal, a line for each run elsewhere; at the end a table of the best rates."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from lightning_mue.analysis.sweep.curve import next_rate
from lightning_mue.analysis.sweep.loop import curve_of
from lightning_mue.analysis.sweep.plan import Job, SweepPlan
from lightning_mue.analysis.sweep.runner import LOG, last_lines
from lightning_mue.analysis.sweep.storage import Entry, Outcome

#: Lines of a failed run's log that are shown.
_LINES = 12


class ConsoleWatcher:
    """Prints runs as they end; in a terminal there is a bar below.

    Args:
        console: Where to print.
        jobs: Runs at once in this process.
    """

    def __init__(self, console: Console, jobs: int) -> None:
        self.console, self.jobs = console, jobs
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._bar = Progress(*columns, console=console)
        self._task = self._bar.add_task("sweep", total=None, left="", visible=console.is_terminal)
        self._over, self._known, self._left = 0, 0, ""

    def __enter__(self) -> ConsoleWatcher:
        if self.console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bar.stop()

    def started(self, job: Job) -> None:
        """Nothing: the bar counts what runs."""

    def ended(self, job: Job, outcome: Outcome, folder: Path) -> None:
        """Prints how a run ended; of one that crashed, the end of its log."""
        took = f" ({_duration(outcome.seconds)})" if outcome.seconds == outcome.seconds else ""
        self._over += 1
        self._print(f"[{self._over} of {self._known}{self._left}] {job}: {_ending(outcome)}{took}")
        if outcome.error:
            self._print(f"{last_lines(folder / LOG, _LINES)}\nthe whole log: {folder / LOG}")

    def state(self, entries: Sequence[Entry], missing: int, parts: Sequence[float]) -> None:
        """Updates the bar and what the next line says: runs that are over, of those known, and the time left."""
        self._over = sum(e.state != "running" for e in entries)
        self._known = len(entries) + max(0, missing)
        seconds = time_left(entries, missing, parts)
        self._left = "" if seconds is None else f", about {_duration(seconds)} left"
        what = f"sweep, {len(parts)} running here"
        self._bar.update(
            self._task, completed=self._over, total=self._known, description=what, left=self._left.lstrip(", ")
        )

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def time_left(entries: Sequence[Entry], missing: int, parts: Sequence[float]) -> float | None:
    """Seconds until all known runs are over, by the mean duration of those that are; None before the first one.

    Args:
        entries: All runs.
        missing: Runs that nobody has begun.
        parts: How far the runs of this process are, each in [0, 1].
    """
    seconds = [e.outcome.seconds for e in entries if e.outcome.seconds == e.outcome.seconds]
    running = sum(e.state == "running" for e in entries)
    if not seconds or not running:
        return None
    # All processes together have as many runs at once as there are now.
    return statistics.mean(seconds) * (missing + running - sum(parts)) / running


def best_rates(plan: SweepPlan, entries: Sequence[Entry]) -> Table:
    """A table of each cell's best point, with what is wrong with it as an optimum."""
    table = Table(title="best learning rates", title_justify="left")
    for name in ("cell", "runs", "best lr", *(name for name in plan.search if name != "lr"), plan.metric, ""):
        table.add_column(name)
    for cell in plan.cells():
        of_cell = [e for e in entries if str(e.job.cell) == str(cell)]
        curve = {p: loss for p, loss in curve_of(plan, of_cell).items() if loss is not None and not math.isnan(loss)}
        if not curve:
            table.add_row(str(cell), str(len(of_cell)), *["-"] * (len(table.columns) - 3), "no run was finished")
            continue
        best = min(curve, key=lambda p: curve[p])
        searched = [f"{value:.4g}" for _, value in best.searched]
        loss, remark = curve[best], _remark(plan, {p.lr: value for p, value in curve.items()})
        table.add_row(str(cell), str(len(of_cell)), f"{best.lr:.4g}", *searched, f"{loss:.4f}", remark)
    return table


def _remark(plan: SweepPlan, losses: dict[float, float]) -> str:
    if plan.search or len(plan.rates) < 2:
        return ""
    if all(math.isinf(loss) for loss in losses.values()):
        return "all diverged: raise --extend"
    if next_rate(losses) is None:
        return ""
    return "not between two finite losses: raise --extend"


def _ending(outcome: Outcome) -> str:
    if outcome.error:
        return f"crashed ({outcome.error})"
    return "diverged" if math.isinf(outcome.loss) else f"{outcome.loss:.4f}"


def _duration(seconds: float) -> str:
    """A duration in words.

    Example:
        >>> _duration(600)
        '10 min'
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
