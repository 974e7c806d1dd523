"""A run is taken by one process only, comes back from the storage as it ended, and is given up when its process is dead."""

import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.sweeps import axis, plan

from lightning_mue.analysis.sweep.plan import Job, Point
from lightning_mue.analysis.sweep.storage import Outcome, SweepStorage, to_trials
from lightning_mue.analysis.sweep.workers import Workers


@pytest.fixture
def swept():
    return plan(axes=(axis(width=[64, 128]),), settings={"gate": ("linear", "sqrt")}, seeds=3)


@pytest.fixture
def join(tmp_path, swept):
    """Joins the sweep as a process of its own would."""
    return lambda plan=swept, **options: SweepStorage(str(tmp_path / "journal.log"), "sweep", plan, **options)


def jobs_of(swept):
    return [Job(c, Point(rate), seed) for c in swept.cells() for rate in swept.rates for seed in range(swept.seeds)]


def test_what_was_run_comes_back(join, swept):
    first, (a, b, c, *_) = join(), jobs_of(swept)
    first.finish(first.take(a), Outcome(1.5, tokens=100.0, compute=1e6, seconds=2.0))
    first.finish(first.take(b), Outcome(math.inf))
    first.finish(first.take(c), Outcome(math.nan, error="status 1: boom"))
    found = join().entries()
    assert [(e.job, e.state) for e in found] == [(a, "finished"), (b, "finished"), (c, "crashed")]
    assert (found[0].outcome.loss, found[0].outcome.tokens, found[0].outcome.compute) == (1.5, 100.0, 1e6)
    assert (found[1].outcome.loss, found[2].outcome.error) == (math.inf, "status 1: boom")
    one, other = to_trials(found)
    assert (one.rule, one.size, one.settings, one.lr) == ("none", {"width": 64}, {"gate": "linear"}, a.point.lr)
    assert other.loss == math.inf


@pytest.mark.parametrize("database", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["journal", "sqlite"])
def test_of_all_who_want_a_run_one_gets_it(tmp_path, swept, database):
    place = f"sqlite:///{tmp_path}/sweep.db" if database else str(tmp_path / "journal.log")
    wanted = jobs_of(swept)[:4]
    processes = [SweepStorage(place, "sweep", swept) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        taken = list(pool.map(lambda process: [process.take(job) for job in wanted], processes))
    for job, ids in zip(wanted, zip(*taken, strict=True), strict=True):
        assert sum(i is not None for i in ids) == 1, (job, ids)
    entries = processes[0].entries()
    assert sorted(map(str, (e.job for e in entries))) == sorted(map(str, wanted))


def test_a_finished_run_is_not_taken_again_and_a_crashed_one_is(join, swept):
    storage, (a, b, *_) = join(), jobs_of(swept)
    storage.finish(storage.take(a), Outcome(1.0))
    storage.finish(storage.take(b), Outcome(math.nan, error="boom"))
    assert join().take(a) is None
    assert join().take(b) is not None


def test_a_run_of_a_dead_process_is_given_up_at_once(join, swept, monkeypatch):
    job = jobs_of(swept)[0]
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    theirs, ours = join(), join()
    sign = theirs.workers.sign()
    theirs._study.set_user_attr(f"worker {theirs.workers.id}", {**sign, "pid": dead.pid, "started": 1})
    dead.wait()
    trial_id = theirs.take(job)
    assert ours.entries() == []
    assert ours.take(job) is not None
    assert not theirs.finish(trial_id, Outcome(1.0))  # it is too late for that process
    theirs.note(trial_id, 3, 1.0)
    assert [e.state for e in ours.entries()] == ["running"]


def test_a_run_of_a_living_process_is_left_alone(join, swept):
    theirs, ours = join(), join(lease=0.0)
    theirs.beat()
    theirs.take(jobs_of(swept)[0])
    for _ in range(3):
        assert [e.state for e in ours.entries()] == ["running"]


def test_of_another_machine_only_the_count_is_seen():
    us, sign = Workers(lease=0.05), {"count": 1, "machine": "another", "pid": os.getpid(), "started": 5}
    assert not us.is_dead("they", sign)
    time.sleep(0.06)
    assert not us.is_dead("they", {**sign, "count": 2})  # it has counted on meanwhile
    assert not us.is_dead("they", {**sign, "count": 2})
    time.sleep(0.06)
    assert us.is_dead("they", {**sign, "count": 2})
    assert not us.is_dead("silent", None)  # killed before its first sign, or about to give it
    time.sleep(0.06)
    assert us.is_dead("silent", None)
    assert not us.is_dead(us.id, None)


def test_a_process_whose_number_was_given_to_another_is_dead():
    us = Workers()
    sign = Workers().sign()
    assert not us.is_dead("they", sign)
    assert us.is_dead("they", {**sign, "started": sign["started"] - 1})


@pytest.mark.parametrize(
    ("options", "differs"),
    [
        ({"axes": (axis(width=[64, 256]),)}, r"axes: .*128.* there, .*256.* here"),
        ({"metric": "train/loss"}, "metric: val/loss there, train/loss here"),
        ({"rates": (0.1, 0.2)}, r"rates: \[.*0\.04\] there, \[0\.1, 0\.2\] here"),
        ({"settings": {}}, r"settings\.gate: \['linear', 'sqrt'\] there, None here"),
    ],
)
def test_another_sweep_is_refused_by_what_differs(join, swept, options, differs):
    join()
    given = {"axes": swept.axes, "settings": swept.settings, **options}
    with pytest.raises(ValueError, match=rf"found another sweep, with .*{differs}.*expected no sweep, or this one"):
        join(plan(**given))


def test_a_budget_may_grow_and_shrink(join, swept):
    storage, jobs = join(), jobs_of(swept)
    for seed, job in enumerate(jobs[:3]):
        assert job.seed == seed
        storage.finish(storage.take(job), Outcome(1.0))
    fewer = plan(axes=swept.axes, settings=swept.settings, seeds=2, extend=9)
    assert [e.job for e in join(fewer).entries()] == jobs[:2]


@pytest.mark.slow
def test_a_database_that_cannot_be_opened_is_refused(swept, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(ValueError, match=r"--storage: found .*unable to open database file.*expected a database"):
        SweepStorage("sqlite:////no/such/folder/x.db", "sweep", swept)
    with pytest.raises(ValueError, match=r"--storage: found ModuleNotFoundError: .*pg8000"):
        SweepStorage("postgresql+pg8000://x/y", "sweep", swept)
