"""Runs a benchmark section by section, so that a run that is stopped leaves the sections before.

Every section has its share of the time and runs in a process of its own kind: after an error that a device does not recover
from (a bad address), a crash or a hang, a new process goes on with the next section. What went wrong is recorded as a row.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import TimeoutError, get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_common import Row, save_report, show

Report = dict[str, list[Row]]

DEVICE_LOST = 75
_GRACE = 45  # seconds that a call in C may overrun its section before the process is ended


class OutOfTime(BaseException):
    """A section's time is up. Not an Exception, so that nobody on the way takes it for a failed contender."""


class Section(NamedTuple):
    """A table of the report.

    Attributes:
        name: Its heading.
        seconds: Time after which it is stopped.
        rows: From the report so far to its rows; best a generator, whose rows are written as they come.
    """

    name: str
    seconds: float
    rows: Callable[[Report], Iterable[Row]]


def supervise(command: list[str], path: Path, attempts: int, until: float) -> Report:
    """Run `command` until it ends well, each time leaving out what is in the report at `path`; return the report.

    Args:
        command: Runs `run_sections` on a report at `path`.
        path: The report's JSON. What an earlier benchmark left there is removed.
        attempts: At most so many processes; each leaves at least one section more than the one before.
        until: When (epoch) the process that is running then is ended.
    """
    path.unlink(missing_ok=True)
    for _ in range(attempts):
        try:
            if subprocess.call([sys.executable, *command], timeout=max(until - time.time(), 0)) == 0:
                break
        except subprocess.TimeoutExpired:
            break
    return load(path)


def load(path: Path) -> Report:
    """The sections of a report; none if it is not there."""
    return json.loads(path.read_text())["sections"] if path.exists() else {}


def run_sections(
    sections: Iterable[Section], name: str, title: str, device: torch.device, folder: Path, until: float
) -> None:
    """Run the sections that the report does not have yet, each within its time and all of them until `until` (epoch)."""
    report = load(folder / f"{name}.json")

    def save() -> None:
        save_report(name, title, device, report, folder)

    for section in sections:
        if section.name in report:
            continue
        # Already there should the process die in it.
        report[section.name] = [{"error": "the process ended here"}]
        save()
        start = time.perf_counter()
        _run(section, report, min(section.seconds, until - time.time()), save)
        save()
        show(section.name, report[section.name])
        print(f"({time.perf_counter() - start:.0f} s)", flush=True)
        if any("error" in row for row in report[section.name]) and not _works(device):
            raise SystemExit(DEVICE_LOST)


def _run(section: Section, report: Report, seconds: float, save: Callable[[], None]) -> None:
    """Put the section's rows into the report as they come; then, if it was stopped or failed, one that says so."""
    rows: list[Row] = []
    try:
        if seconds <= 0:
            raise OutOfTime
        with time_limit(seconds):
            for row in section.rows(report):
                rows.append(row)
                report[section.name] = rows
                save()
    except OutOfTime:
        rows.append({"stopped": f"after {max(seconds, 0):.0f} s, its share of the time"})
    except Exception as error:
        traceback.print_exc()
        rows.append(failure(error))
    report[section.name] = rows


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in here once the time is up; end the process if that does not help (a kernel that hangs)."""

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    faulthandler.dump_traceback_later(seconds + _GRACE, exit=True)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def in_parallel(
    function: Callable[..., Row], jobs: Sequence[tuple[Any, ...]], workers: int, seconds: float
) -> Iterator[tuple[tuple[Any, ...], Row]]:
    """Jobs and their results, in order, from processes of their own: compiling kernels takes one core each time.

    Args:
        function: From a job to a row; of a module that can be imported. An error of its becomes a row.
        jobs: Arguments.
        workers: How many processes; 0: this one.
        seconds: How long to wait for one result.
    """
    if not workers:
        yield from ((job, _attempt(function, *job)) for job in jobs)
        return
    with get_context("spawn").Pool(min(workers, len(jobs)), torch.set_num_threads, (1,)) as pool:
        for job, result in [(job, pool.apply_async(_attempt, (function, *job))) for job in jobs]:
            try:
                yield job, result.get(timeout=seconds)
            except TimeoutError:
                yield job, {"error": f"no result after {seconds:.0f} s"}


def _attempt(function: Callable[..., Row], *job: object) -> Row:
    try:
        return function(*job)
    except Exception as error:  # not every exception survives the way to another process
        return failure(error)


def failure(error: Exception) -> Row:
    """A row that records an error; what is not there at all (a module that this version lacks) is `missing`."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return {"missing" if isinstance(error, ImportError) else "error": text[:400]}


def failures(report: Report) -> list[str]:
    """Checks that failed and errors, one a line."""
    return [
        f"{name}: {row}" for name, rows in report.items() for row in rows if row.get("ok") is False or row.get("error")
    ]


def _works(device: torch.device) -> bool:
    try:
        return float(torch.ones(2, device=device).sum()) == 2
    except RuntimeError:
        return False
